"""What is drawn can be seen and read, on any picture."""

import numpy as np
import pytest
from PIL import Image

from support.drawing import NAMED, RIGHT, TRUE, WRONG, draw_boxes, sheet


def near(image, colour):
    """Which pixels are of that colour."""
    return abs(np.asarray(image).astype(int) - colour).sum(2) < 30


@pytest.mark.parametrize("ground", ["black", "white", "gold"])
def test_a_drawn_box_is_where_it_was_named_and_its_label_is_read_on_any_ground(ground):
    image = Image.new("RGB", (640, 480), ground)
    for box in ((0.25, 0.5, 0.75, 0.9), (0, 0, 1, 1), (0.9, 0.01, 1, 0.05)):
        bare, one, other = (
            near(draw_boxes(image, [(box, label, NAMED)]), NAMED)
            for label in ("", "a small dog", "god llams a")
        )
        ys, xs = bare.nonzero()
        sides = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        gaps = abs(sides - np.multiply(box, image.size * 2))
        assert (gaps < (3, 9, 3, 3)).all(), "above it stands the label"
        assert (one != other).sum() > 40, "other letters can be told from these"


def test_a_small_picture_grows_and_a_long_label_stays_inside():
    image = Image.new("RGB", (60, 60), "white")
    for box in ((0, 0, 0.1, 0.1), (0.9, 0.9, 1, 1), (0.4, 0, 0.6, 1)):
        drawn = draw_boxes(image, [(box, "a label that is far too long for it " * 3, WRONG)])
        assert drawn.size == (448, 448)
        assert near(drawn, WRONG).sum() > 2000


@pytest.mark.parametrize("box", [(0.2, 0.3, 0.6, 0.8), (0, 0, 1, 1)])
def test_labels_of_boxes_that_nearly_coincide_do_not_hide_one_another(box):
    image = Image.new("RGB", (448, 448), "white")
    beside = tuple(v * 0.98 for v in box)
    both = draw_boxes(image, [(box, "a thing", TRUE), (beside, "a thing", NAMED)])
    for place, colour in ((box, TRUE), (beside, NAMED)):
        alone = draw_boxes(image, [(place, "a thing", colour)])
        bare = draw_boxes(image, [(place, "", colour)])
        label = near(alone, colour).sum() - near(bare, colour).sum()
        assert near(both, colour).sum() > 0.8 * label


def test_a_sheet_has_a_bar_of_its_colour_under_each_picture_and_room_for_the_longest_text(tmp_path):
    cells = [(Image.new("RGB", (9, 9)), [], "short", RIGHT)] * 5
    sheet(cells, tmp_path / "short.png")
    sheet([*cells, (*cells[0][:2], "words for more lines " * 6, WRONG)], tmp_path / "long.png")
    short, long = (Image.open(tmp_path / f"{name}.png") for name in ("short", "long"))
    assert long.height - short.height > 100, "two rows have room for four lines, and not for one"
    assert near(long, RIGHT).sum() == near(short, RIGHT).sum() == 5 * near(long, WRONG).sum() > 0
