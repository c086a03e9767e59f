"""text/boxes.py: boxes to text and back, by our parser and by the released code's."""

import pytest
from small import TOKENIZER

from support.errors import BadInput
from text.boxes import format_box, parse_box, parse_box_released


def test_text_to_box_to_text_is_the_identity_for_every_coordinate():
    for n in range(99):
        low, high = f"{n / 100:.2f}", f"{(n + 1) / 100:.2f}"
        text = f"<box>({low},{low}),({high},{high})</box>"
        box = parse_box(text)
        assert box == (n / 100, n / 100, (n + 1) / 100, (n + 1) / 100)
        assert format_box(box) == text
        assert parse_box_released(text) == box
        assert {low, high} < set(TOKENIZER.model.encode_as_pieces(text))  # a token each


def test_the_far_edge_is_written_as_a_number_that_the_released_code_reads():
    text = "<box>(0.00,0.50),(0.99,0.99)</box>"
    assert format_box((0, 0.5, 1, 0.996)) == text
    assert parse_box(text) == parse_box_released(text) == (0, 0.5, 0.99, 0.99)


@pytest.mark.parametrize(
    "box",
    [(0, 0, 0, 1), (0, 0.5, 1, 0.4), (0, 0, 1.1, 1), (float("nan"), 0, 1, 1), (-0.1, 0, 1, 1)],
)
def test_a_box_that_is_none_is_not_written(box):
    with pytest.raises(BadInput, match="degenerate or outside"):
        format_box(box)


A = (0.12, 0.34, 0.56, 0.78)
SMALL = (0.1, 0.2, 0.3, 0.4)
BOXES = [  # text, what it is, what the released code takes it for
    ("It is at <box>(0.12,0.34),(0.56,0.78)</box>.", A, A),
    ("<box>(0,0),(1,1)</box>", (0, 0, 1, 1), None),
    ("<box>(0.1,0.20),(0.3,0.400)</box>", SMALL, SMALL),
    ("<box> ( 0.1 , 0.2 ) , ( 0.3 , 0.4 ) </box>", SMALL, None),
    ("<box>(0.12,0.34),\n(0.56,0.78)</box>", A, None),
    (
        "<box>(0.12,0.34),(0.56,0.78)</box> and <box>(0.01,0.02),(0.03,0.04)</box>",
        A,
        (0.12, 0.34, 0.03, 0.04),
    ),
    ("<box>(0.5,0.5),(0.5,0.5)</box>", (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)),
    ("<box>(0.56,0.34),(0.12,0.78)</box>", None, (0.56, 0.34, 0.12, 0.78)),
    ("<box>(0.12,0.78),(0.56,0.34)</box>", None, (0.12, 0.78, 0.56, 0.34)),
    ("0.12,0.34 and 0.56,0.78", None, A),
    ("<box>(0.12,0.34),(0.56,1.78)</box>", None, None),
    ("<box>(012,034),(056,078)</box>", None, (12, 34, 56, 78)),
    ("<box>(0.120,0.340),(0.056,0.780)</box>", None, (0.12, 0.34, 56, 0.78)),
    ("<box>(0x12,0.34),(0.56,0.78)</box>", None, None),
    ("<box>(0.1٢,0.34),(0.56,0.78)</box>", None, A),
]


@pytest.mark.parametrize("text, strict, released", BOXES)
def test_boxes_well_and_ill_formed_are_read_by_both_parsers_as_by_hand(text, strict, released):
    assert parse_box(text) == strict
    assert parse_box_released(text) == released
