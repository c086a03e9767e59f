"""Boxes on pictures, and contact sheets."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support.errors import BadInput

RIGHT, WRONG, TRUE, NAMED = (34, 197, 94), (239, 68, 68), (56, 189, 248), (250, 204, 21)

CELL, COLUMNS, LINES = (
    256,
    4,
    8,
)  # pixels per picture of a contact sheet, pictures a row, lines of text under each


def draw_boxes(image, boxes, side=448):
    """The picture with (box in fractions, label, colour) each, enlarged if it is small. Lines have a dark rim and
    labels a ground of their own, so that both are seen on anything."""
    grow = max(1, side / min(image.size))
    image = image.convert("RGB").resize(
        [round(v * grow) for v in image.size], Image.Resampling.BICUBIC
    )
    (w, h), pen = image.size, ImageDraw.Draw(image)
    width, font = max(2, min(w, h) // 150), ImageFont.load_default(max(12, min(w, h) // 26))
    for box, _, colour in boxes:
        x1, y1, x2, y2 = box[0] * w, box[1] * h, max(box[0], box[2]) * w, max(box[1], box[3]) * h
        pen.rectangle(
            (x1 - width // 2 - 1, y1 - width // 2 - 1, x2 + width // 2 + 1, y2 + width // 2 + 1),
            outline=(0, 0, 0),
            width=width + 2,
        )
        pen.rectangle(
            (x1 - width // 2, y1 - width // 2, x2 + width // 2, y2 + width // 2),
            outline=colour,
            width=width,
        )
    taken = []  # (left, top, right) of the labels so far
    for box, label, colour in boxes:  # after all lines: no line crosses a label
        while pen.textlength(label, font) > w - 8 and len(label) > 4:
            label = label[:-4].rstrip() + "..."
        _, _, right, bottom = pen.textbbox((0, 0), label, font)
        x, tall = min(max(0, box[0] * w), w - right - 8), bottom + 6
        up, down = box[1] * h, box[3] * h  # above it, below it, or inside: where there is room
        free = [
            y
            for y in (up - tall - width, down + width + 1, down - tall - width, up + width + 1)
            if 0 <= y <= h - tall
            and not any(
                x < r and left < x + right + 8 and abs(y - top) < tall for left, top, r in taken
            )
        ]
        y = free[0] if free else max(0, min(down, h - tall))
        taken.append((x, y, x + right + 8))
        dark = sum(c * k for c, k in zip(colour, (0.3, 0.59, 0.11))) < 140
        pen.rectangle((x, y, x + right + 8, y + tall), fill=colour, outline=(0, 0, 0))
        pen.text((x + 4, y + 2), label, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)
    return image


def sheet(cells, path):
    """A contact sheet of (image, boxes, text, colour): pictures in a grid, their text below, a bar of that colour."""
    font = ImageFont.load_default(14)
    columns, line = min(COLUMNS, len(cells)), 18
    texts = [
        [part for row in text.split("\n") for part in textwrap.wrap(row, 34)][:LINES]
        for _, _, text, _ in cells
    ]
    tops = [8]  # of the rows, each as tall as its longest text
    for i in range(0, len(cells), columns):
        tops.append(tops[-1] + CELL + 16 + line * max(map(len, texts[i : i + columns])))
    page = Image.new("RGB", (columns * (CELL + 8) + 8, tops[-1]), "white")
    pen = ImageDraw.Draw(page)
    for i, ((image, boxes, _, colour), lines) in enumerate(zip(cells, texts)):
        x, y = 8 + i % columns * (CELL + 8), tops[i // columns]
        small = [max(1, round(v * CELL / max(image.size))) for v in image.size]
        picture = draw_boxes(
            image.convert("RGB").resize(small, Image.Resampling.BICUBIC), boxes, side=1
        )
        page.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        pen.rectangle((x, y + CELL + 1, x + CELL - 1, y + CELL + 4), fill=colour)
        for n, text in enumerate(lines):
            pen.text((x, y + CELL + 7 + n * line), text, fill=(20, 20, 20), font=font)
    write_picture(page, path)


def check_target(path):
    """What can be said about a picture that is to be written before any work is done for it."""
    known = Path(path).suffix.lower() in Image.registered_extensions()
    why = None if known else "unknown ending" if Path(path).suffix else "no ending"
    if not Path(path).parent.is_dir():
        why = f"there is no folder {Path(path).parent}"
    if why:
        raise BadInput(f"{path}: cannot be written ({why}); name a .png in a folder that exists")


def write_picture(image, path):
    try:
        image.save(path)
    except (OSError, ValueError) as e:
        raise BadInput(
            f"{path}: cannot be written ({e}); name a .png in a folder that exists"
        ) from e
