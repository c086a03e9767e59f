"""Boxes on pictures, and contact sheets."""

import itertools
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support.errors import BadInput

RIGHT = (34, 197, 94)
WRONG = (239, 68, 68)
TRUE = (56, 189, 248)
NAMED = (250, 204, 21)

# of a contact sheet
CELL = 256  # pixels per picture
COLUMNS = 4  # pictures a row
LINES = 8  # of text under each, at most
LINE = 18  # pixels


def draw_boxes(image, boxes, scale=None):
    """The picture with (box in fractions, label, colour) each, enlarged if it is small.

    Lines have a dark rim and labels a ground of their own, so that both are seen on anything."""
    scale = scale or max(1, 448 / min(image.size))
    w, h = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    width = max(2, min(w, h) // 150)
    font = ImageFont.load_default(max(12, min(w, h) // 26))
    for (x1, y1, x2, y2), _, colour in boxes:
        x1, y1, x2, y2 = x1 * w, y1 * h, x2 * w, y2 * h
        pen.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline="black", width=width + 2)
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=colour, width=width)
    for n, ((x1, y1, _, y2), label, colour) in enumerate(boxes):  # no line crosses a label
        _, _, right, bottom = pen.textbbox((4, 2), label, font)
        wide, tall = right + 4, bottom + 4
        # the first label above its box, the next one below: two boxes may nearly coincide
        y = y2 * h if n % 2 else y1 * h - tall
        x = max(0, min(x1 * w, w - wide))
        y = max(0, min(y, h - tall))
        pen.rectangle((x, y, x + wide, y + tall), fill=colour, outline="black")
        pen.text((x + 4, y + 2), label, fill="black", font=font)
    return image


def sheet(cells, path):
    """A contact sheet of (image, boxes, text, colour): pictures in a grid, their text below, a bar of that colour."""
    font = ImageFont.load_default(14)
    texts = []
    for _, _, text, _ in cells:
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 34)]
        texts.append("\n".join(lines[:LINES]))
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    wide = CELL + 8
    tall = CELL + 16 + LINE * max(text.count("\n") + 1 for text in texts)
    page = Image.new("RGB", (columns * wide + 8, rows * tall + 8), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, boxes, _, colour) in enumerate(cells):
        x = 8 + i % columns * wide
        y = 8 + i // columns * tall
        page.paste(draw_boxes(image, boxes, CELL / max(image.size)), (x, y))
        pen.rectangle((x, y + CELL + 1, x + CELL - 1, y + CELL + 4), fill=colour)
        pen.multiline_text((x, y + CELL + 7), texts[i], fill="black", font=font)
    page.save(path)


def check_target(path, *inputs):
    """Whether a picture can be written there, before any work is done for it.

    What is read is never written over: a picture that is there already, and is one of the inputs or in such a folder."""
    path = Path(path)
    known = path.suffix.lower() in Image.registered_extensions()
    if not known or not path.parent.is_dir():
        raise BadInput(f"{path}: cannot be written; name a .png in a folder that exists")
    for place in filter(None, inputs):
        if path.exists() and path.resolve().is_relative_to(Path(place).resolve()):
            raise BadInput(
                f"{path}: belongs to what is read and is not written over; "
                "remove it, or name another"
            )


def unused(path):
    """The path, or, where something is there already, the same with a number."""
    path = Path(path)
    names = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())
