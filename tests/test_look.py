"""look.py: what a run would see of a mixture, and what is wrong with it."""

import re

import numpy as np
import pytest
from PIL import Image
from small import mixture, picture, source, write

import look
from support.drawing import TRUE
from support.errors import BadInput

BOTH = {
    "question": "what?",
    "answers": ["red"],
    "bbox": [2, 2, 9, 9],
    "sentences": [{"sent": "it"}],
}


def looked_at(folder, *tables):
    """The contact sheet, as numbers."""
    look.main([str(mixture(folder, *tables)), "--out", str(folder / "look.png")])
    return np.asarray(Image.open(folder / "look.png")).astype(int)


def test_a_look_names_what_is_wrong_counts_it_and_draws_every_source(tmp_path, capsys):
    write(tmp_path / "im/a.png", picture())
    records = [BOTH | {"image": name, "img_name": name} for name in ("a.png", "lost.png")]
    write(tmp_path / "a.json", records)
    tables = [source("vqa"), source("refcoco"), source("refcoco", name="regions", task="region")]
    wide = looked_at(tmp_path, *tables)
    said = capsys.readouterr().out
    assert len(re.findall(r"a\.json: record 1: image \S+lost\.png: is no file", said)) == 3
    for name, task in (("vqa", "vqa"), ("refcoco", "ground"), ("regions", "region")):
        assert re.search(rf"^{name} +{task} +2 +2 +1 +[\d. ]+$", said, re.MULTILINE)
    plain = looked_at(tmp_path, tables[0])
    assert wide.shape[1] > 2.8 * plain.shape[1]  # three cells and one
    boxes = lambda page: (np.abs(page - TRUE).sum(2) < 30).sum()  # and a bar under each picture
    assert boxes(wide) > 3 * boxes(plain) + 1000


def test_a_picture_of_the_data_is_never_written_over(tmp_path):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", [BOTH | {"image": "a.png"}])
    path = str(mixture(tmp_path, source("vqa")))
    with pytest.raises(BadInput, match="a.png: belongs to what is read"):
        look.main([path, "--out", str(tmp_path / "im/a.png")])
    look.main([path, "--out", str(tmp_path / "im/new.png")])
    assert (tmp_path / "im/a.png").read_bytes() == picture()


def test_the_cell_of_a_chat_shows_what_is_answered_to_its_first_question(tmp_path):
    write(tmp_path / "im/a.png", picture())
    asked = {"from": "human", "value": "is there a small red circle?"}
    sheets = []
    for answer in ("yes", "no"):
        turns = [asked | {"value": "<image>"}, {"from": "gpt", "value": answer}]
        turns += [asked, {"from": "gpt", "value": "no"}] * 9
        write(tmp_path / "a.json", [{"image": "a.png", "conversations": turns}])
        sheets.append(looked_at(tmp_path, source("conversations")))
    assert (sheets[0] != sheets[1]).any()
