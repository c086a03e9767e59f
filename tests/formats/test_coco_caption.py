"""formats/coco_caption.py: the official captions JSON."""

import re

import pytest
from small import RED, SEEN, check, data_of, picture, refusal, source, write

COCO = source("coco-caption")
CAPTIONS = """{
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "height": 24, "width": 32},
        {"id": 4, "file_name": "b.png"}
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A red circle."},
        {"image_id": 4, "id": 2, "caption": "a cross"},
        {"image_id": 9, "id": 3, "caption": "the red circle"}
    ]
}"""


def test_training_takes_each_caption_and_evaluation_each_image_with_all_of_them(tmp_path):
    write(tmp_path / "im/COCO_val2014_000000000009.jpg", picture())
    write(tmp_path / "im/b.png", picture(RED))
    write(tmp_path / "a.json", CAPTIONS)
    data = data_of(tmp_path, COCO)
    one, two = data.samples()
    assert one.answers == ["a cross"] and one.fields["image_id"] == 4
    assert two.answers == ["A red circle.", "the red circle"] and two.fields["height"] == 24
    asked = f"{SEEN} ▁Short ▁caption :"
    check(data, 0, asked, "▁a ▁cross </s>", colours=[RED])
    check(data, 1, asked, "▁a ▁red ▁circle </s>")
    train = data_of(tmp_path, COCO, train=True)
    assert len(train.sources[0]) == 3
    check(train, 1, asked, "▁a ▁red ▁circle </s>")
    check(train, 2, asked, "▁the ▁red ▁circle </s>")


IMAGES = [{"id": 1, "file_name": "a.png"}]
SAID = [{"image_id": 1, "caption": "a cross"}]
SORTED = [{"image_id": 2, "id": 70, "caption": "a cross"}, {"image_id": 1, "id": 71}]


@pytest.mark.parametrize(
    "images, captions, says",
    [
        ([{"id": 2}], SAID, r"annotation 0, its image: .*a\.json has no record of its id"),
        (IMAGES, {}, r"a\.json: .*not an object with a list 'annotations'"),
        (IMAGES, [7], r"a\.json: is not the JSON"),
        (IMAGES, [{"image_id": 1}], r"a\.json: annotation 0: 'caption' is missing"),
        ([*IMAGES, {"id": 2, "file_name": "a.png"}], SORTED, r"annotation 1 \(id 71\): 'caption'"),
        (IMAGES * 2, SAID, r"a\.json: record 1 of 'images' has the id of another; remove one"),
        ([{"id": 1}], SAID, r"a\.json: annotation 0: 'file_name' is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path, images, captions, says):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", {"images": images, "annotations": captions})
    assert re.search(says, refusal(tmp_path, COCO))
