"""formats/refcoco.py: phrases and boxes."""

import re

import pytest
from small import (
    SEEN,
    TOKENIZER,
    check,
    data_of,
    picture,
    refusal,
    refused_record,
    source,
    write,
)

REF = source("refcoco")
BOX = "▁ <box>( 0.12 , 0.34 ),( 0.56 , 0.78 )</box>"
RECORDS = """[
    {"img_name": "r.png", "bbox": [24, 34, 112, 78], "segment_id": 3,
     "sentences": [{"sent": "the red circle", "sent_id": 1}, {"sent": "the circle", "sent_id": 2}]},
    {"img_name": "r.png", "bbox": [-1, 0, 201, 100], "segment_id": 4,
     "sentences": [{"sent": "the cross", "sent_id": 7}]}
]"""


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "im/r.png", picture(size=(200, 100)))
    write(tmp_path / "a.json", RECORDS)
    return tmp_path


def test_a_sample_per_sentence_has_the_box_as_fractions(folder):
    data = data_of(folder, REF)
    assert data.counts == {"refcoco": 3}
    check(data, 1, f"{SEEN} ▁< ref > the ▁circle </ ref >", f"{BOX} </s>")
    item = list(data.samples())[1]
    assert item.box == (24, 34, 112, 78) and item.size == (200, 100)
    assert item.fields["sent_id"] == 2 and item.fields["segment_id"] == 3
    _, targets, _ = data.sample(data.sources[0], 2, 0)
    # a pixel beyond the edge is rounding
    assert TOKENIZER.decode(targets) == "<box>(0.00,0.00),(0.99,0.99)</box>"


def test_the_other_way_round_it_asks_for_the_phrase(folder):
    data = data_of(folder, {**REF, "task": "region"})
    check(data, 0, f"{SEEN} {BOX} ▁Short ▁phrase :", "▁the ▁red ▁circle </s>")


POINT = {"img_name": "a.png", "bbox": [1, 2, 9, 9], "sentences": [{"sent": "it"}]}


@pytest.mark.parametrize(
    "box",
    [
        [1, 2, 3],
        [1, 2, "3", 9],
        [1, 2, float("nan"), 9],
        [15, 2, 15, 9],  # empty
        [5, 2, 50, 9],  # beyond the right edge
    ],
)
def test_a_box_that_is_none_of_its_image_is_refused(tmp_path, box):
    said = refused_record(tmp_path, REF, POINT, {"bbox": box})
    assert re.search(r"a\.json: record 0: bbox .* in pixels of its 20 x 20 image", said)


def test_a_bad_record_is_named_by_its_place_in_the_file_and_its_ids(folder):
    write(folder / "a.json", RECORDS.replace("-1, 0, 201", "-9, 0, 201"))
    assert "a.json: record 1 (segment_id 4) (sent_id 7): bbox" in refusal(folder, REF)


def test_a_source_whose_boxes_seem_to_be_no_corners_in_pixels_is_refused_at_once(folder):
    def boxes(*found):
        write(folder / "a.json", [{**POINT, "img_name": "r.png", "bbox": box} for box in found])

    boxes([120, 60, 70, 30], [10, 10, 90, 80])  # the second makes sense either way
    said = refusal(folder, REF)
    assert "source 'refcoco': its boxes are not all" in said and "[x, y, width, height]" in said
    boxes([0.1, 0.2, 0.5, 0.6], [0.1, 0.1, 0.9, 1])
    assert "seem to be fractions" in refusal(folder, REF)
    boxes([120, 60, 70, 30], [110, 50, 190, 80])  # the first is a mistake
    assert data_of(folder, REF).counts == {"refcoco": 2}


@pytest.mark.parametrize("sentences", [[], ["it"]])
def test_a_record_without_a_sentence_is_refused(tmp_path, sentences):
    said = refused_record(tmp_path, REF, POINT, {"sentences": sentences})
    assert "a.json: record 0: 'sent' is missing" in said
