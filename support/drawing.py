"""Boxes on pictures, and contact sheets."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support.errors import BadInput

RIGHT = (34, 197, 94)
WRONG = (239, 68, 68)
TRUE = (56, 189, 248)
NAMED = (250, 204, 21)
BLACK = (0, 0, 0)

# of a contact sheet
CELL = 256  # pixels per picture
COLUMNS = 4  # pictures a row
LINES = 8  # of text under each
LINE = 18  # pixels


def draw_boxes(image, boxes, side=448):
    """The picture with (box in fractions, label, colour) each, enlarged if it is small.

    Lines have a dark rim and labels a ground of their own, so that both are seen on anything."""
    image = resized(image, max(1, side / min(image.size)))
    w, h = image.size
    pen = ImageDraw.Draw(image)
    width = max(2, min(w, h) // 150)
    font = ImageFont.load_default(max(12, min(w, h) // 26))
    placed = []  # (box in pixels, label, colour)
    for (x1, y1, x2, y2), label, colour in boxes:
        box = (x1 * w, y1 * h, max(x1, x2) * w, max(y1, y2) * h)
        placed.append((box, label, colour))
        outline(pen, box, width // 2 + 1, BLACK, width + 2)
        outline(pen, box, width // 2, colour, width)
    taken = []
    for box, label, colour in placed:  # after all lines: no line crosses a label
        while pen.textlength(label, font) > w - 8 and len(label) > 4:
            label = label[:-4].rstrip() + "..."
        _, _, right, bottom = pen.textbbox((0, 0), label, font)
        size = (right + 8, bottom + 6)
        x, y = place_label(box, size, image.size, width, taken)
        ground = (x, y, x + size[0], y + size[1])
        taken.append(ground)
        pen.rectangle(ground, fill=colour, outline=BLACK)
        pen.text((x + 4, y + 2), label, fill=BLACK, font=font)
    return image


def resized(image, factor):
    size = [max(1, round(v * factor)) for v in image.size]
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def outline(pen, box, margin, colour, width):
    x1, y1, x2, y2 = box
    outer = (x1 - margin, y1 - margin, x2 + margin, y2 + margin)
    pen.rectangle(outer, outline=colour, width=width)


def place_label(box, size, within, width, taken):
    """Above its box, below it, or inside: where there is room."""
    x1, top, _, bottom = box
    wide, tall = size
    lowest = within[1] - tall
    x = min(x1, within[0] - wide)
    for y in (top - tall - width, bottom + width + 1, bottom - tall - width, top + width + 1):
        hidden = any(x < r and l < x + wide and y < b and t < y + tall for l, t, r, b in taken)
        if 0 <= y <= lowest and not hidden:
            return x, y
    return x, max(0, min(bottom, lowest))


def sheet(cells, path):
    """A contact sheet of (image, boxes, text, colour): pictures in a grid, their text below, a bar of that colour."""
    font = ImageFont.load_default(14)
    columns = min(COLUMNS, len(cells))
    texts = []
    for _, _, text, _ in cells:
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 34)]
        texts.append(lines[:LINES])
    tops = [8]  # of the rows, each as tall as its longest text
    for i in range(0, len(cells), columns):
        tops.append(tops[-1] + CELL + 16 + LINE * max(map(len, texts[i : i + columns])))
    page = Image.new("RGB", (columns * (CELL + 8) + 8, tops[-1]), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, boxes, _, colour) in enumerate(cells):
        x, y = 8 + i % columns * (CELL + 8), tops[i // columns]
        picture = draw_boxes(resized(image, CELL / max(image.size)), boxes, side=1)
        page.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        pen.rectangle((x, y + CELL + 1, x + CELL - 1, y + CELL + 4), fill=colour)
        for n, line in enumerate(texts[i]):
            pen.text((x, y + CELL + 7 + n * LINE), line, fill=(20, 20, 20), font=font)
    write_picture(page, path)


def check_target(path):
    """What can be said about a picture to be written before any work is done for it."""
    path = Path(path)
    why = None
    if path.suffix.lower() not in Image.registered_extensions():
        why = f"unknown ending {path.suffix!r}"
    if not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    if why:
        raise unwritable(path, why)


def write_picture(image, path):
    try:
        image.save(path)
    except (OSError, ValueError) as e:
        raise unwritable(path, e) from e


def unwritable(path, why):
    return BadInput(f"{path}: cannot be written ({why}); name a .png in a folder that exists")
