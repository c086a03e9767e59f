"""Boxes as text."""

import math
import re

from support.errors import BadInput


def format_box(box):
    """Fractions (x1, y1, x2, y2) -> text. Two decimals: with three, the released parser misreads every x2 < 0.1."""
    if not (
        all(math.isfinite(v) and 0 <= v <= 1 for v in box) and box[0] < box[2] and box[1] < box[3]
    ):
        raise BadInput(
            f"box {tuple(box)} is degenerate or outside its image; fractions must be 0 <= x1 < x2 <= 1"
        )
    return "<box>({:.2f},{:.2f}),({:.2f},{:.2f})</box>".format(*box)


NUMBER = r"\s*(0(?:\.\d+)?|1(?:\.0+)?)\s*"

BOX = re.compile(rf"<box>\s*\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)\s*</box>", re.ASCII)


def parse_box(text):
    """The first box of a text as fractions, or None if there is none or its corners are the wrong way round."""
    found = BOX.search(text)
    box = tuple(float(v) for v in found.groups()) if found else None
    return box if box and box[0] <= box[2] and box[1] <= box[3] else None


def parse_box_released(text):
    """What the released code reads, its unescaped dots and misreadings included: for figures beside the paper's."""
    found = re.search(r"(0.\d+),(0.\d+).*(0.\d+),(0.\d+)", text)
    try:
        return tuple(float(v) for v in found.groups()) if found else None
    except ValueError:
        return None
