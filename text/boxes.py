"""Boxes as text."""

import re

from support.errors import BadInput

NUMBER = r"\s*(0(?:\.\d+)?|1(?:\.0+)?)\s*"
BOX = re.compile(rf"<box>\s*\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)\s*</box>", re.ASCII)


def format_box(box):
    """Fractions (x1, y1, x2, y2) -> text. Two decimals: with three, the released parser misreads every x2 < 0.1.

    At most 0.99 is written, as the released parser cannot read 1.00."""
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):  # NaN is in no order
        raise BadInput(
            f"box {tuple(box)} is degenerate or outside its image; fractions must be 0 <= x1 < x2 <= 1"
        )
    x1, y1, x2, y2 = (f"{min(v, 0.99):.2f}" for v in box)
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def parse_box(text):
    """The first box of a text as fractions; None if there is none or its corners are the wrong way round."""
    found = BOX.search(text)
    if not found:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None


def parse_box_released(text):
    """What the released code reads, its unescaped dots and misreadings included: for figures beside the paper's."""
    found = re.search(r"(0.\d+),(0.\d+).*(0.\d+),(0.\d+)", text)
    try:
        return tuple(map(float, found.groups()))
    except (AttributeError, ValueError):  # nothing found, or no numbers
        return None
