"""formats/parquet.py: hub datasets as they are."""

import os

import numpy as np
import pytest
from small import BLUE, RED, data_of, picture, refusal, write

pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read and written by pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

HUB = {"name": "hub", "format": "parquet", "files": "data/*.parquet"}


def image(colour=BLUE):
    return {"bytes": picture(colour), "path": "of-somebody-elses-disk.png"}


def rows_of(*rows):
    """Rows as FineVision has them, (pictures, (user, assistant), ...)."""
    return {
        "id": [f"row {n}" for n in range(len(rows))],
        "images": [pictures for pictures, *_ in rows],
        "texts": [
            [{"user": asked, "assistant": said} for asked, said in turns] for _, *turns in rows
        ],
        "source": ["x"] * len(rows),
    }


def written(folder, columns, name="0", **how):
    path = folder / f"data/{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **how)
    return path


ROWS = (
    ([image()], ("what is it?", "a square"), ("red?", "no")),
    ([], ("say yes", "yes")),
    ([image(), image(RED)], ("the same?", "no")),
    (None, ("say no", "no")),
    ([image(RED)], ("before <image> behind", "red")),
)


def test_every_row_of_every_group_and_file_by_its_number(tmp_path):
    written(tmp_path, rows_of(*ROWS[:3]), "0", row_group_size=2)
    written(tmp_path, rows_of(*ROWS[3:]), "1", row_group_size=1)
    data = data_of(tmp_path, HUB)
    assert data.counts == {"hub": 5}
    assert data.sources[0].images_each.tolist() == [1, 0, 2, 0, 1]
    items = list(data.samples())
    for item, (pictures, *turns) in zip(items, ROWS, strict=True):
        assert [answer for _, answer in item.turns] == [said for _, said in turns]
        shown = [np.asarray(picture)[0, 0].tolist() for picture in item.images]
        assert shown == [
            list(RED if one["bytes"] == picture(RED) else BLUE) for one in pictures or []
        ]
    # a text that has no mark gets its pictures in front, and so does one that has it anywhere
    asked = [item.prompt.split("USER: ")[1] for item in items]
    here = "<image><ImageHere>"
    assert asked[0] == f"{here}\nwhat is it? ASSISTANT:"
    assert asked[2] == f"{here}\n{here}\nthe same? ASSISTANT:"
    assert asked[3] == "say no ASSISTANT:"
    assert asked[4].startswith(f"{here}\nbefore ") and asked[4].endswith(" behind ASSISTANT:")


def test_columns_of_the_other_layout_and_pictures_of_a_folder(tmp_path):
    """As LLaVA-OneVision-Data has them: one picture, which may be null, and {from, value}."""
    write(tmp_path / "im/there.png", picture(RED))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    plain = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "nothing"}]
    written(
        tmp_path,
        {
            "image": [{"bytes": None, "path": "there.png"}, None],
            "conversations": [turns, plain],
        },
    )
    first, second = data_of(tmp_path, {**HUB, "images": "im"}).samples()
    assert np.asarray(first.images[0])[0, 0].tolist() == list(RED)
    assert second.images == [] and second.answers == ["nothing"]
    assert "0.parquet: row group 0, row 0: has an empty picture" in refusal(tmp_path, HUB)


def test_it_says_what_pyarrow_says(tmp_path):
    """Random rows of several groups, against pyarrow's own reading of the whole."""
    rng = np.random.default_rng(0)
    words = ["", "yes", "漢字", "a longer text \n of two lines", None]
    texts = [
        [{"user": words[rng.integers(5)], "assistant": "x"} for _ in range(rng.integers(1, 4))]
        for _ in range(100)
    ]
    path = written(tmp_path, {"texts": texts}, row_group_size=7)
    source = data_of(tmp_path, HUB).sources[0]
    whole = parquet.read_table(path).to_pylist()
    for number in rng.permutation(100).tolist():
        row = whole[number]["texts"]
        if any(turn["user"] is None for turn in row):
            continue
        record = source.read(number)
        assert record.turns == [(turn["user"], turn["assistant"]) for turn in row]
        size = sum(len(turn["user"]) + len(turn["assistant"]) for turn in row)
        assert source.lengths[number] == size


def test_a_null_text_is_a_bad_row_and_named(tmp_path):
    written(tmp_path, rows_of(ROWS[0], ([], (None, "x"))), row_group_size=1)
    assert "0.parquet: row group 1, row 0 (id row 1): is no text" in refusal(tmp_path, HUB)
    columns = rows_of(ROWS[0], ROWS[1])
    columns["texts"][1] = None
    written(tmp_path, columns)
    assert "row 1 (id row 1): turns must alternate" in refusal(tmp_path, HUB)


def test_what_is_no_such_file_is_refused_by_name(tmp_path, monkeypatch):
    path = written(tmp_path, {"question": ["a"], "answer": ["b"]})
    assert "0.parquet: has the columns answer, question, none of" in refusal(tmp_path, HUB)
    written(tmp_path, rows_of(*ROWS))
    raw = path.read_bytes()
    for damaged in (b"", raw[:-30], b"PAR1" + raw[40:], raw[:4] + b"\xff" * 60 + raw[64:]):
        path.write_bytes(damaged)
        assert "0.parquet: " in refusal(tmp_path, HUB)
    path.write_bytes(raw)
    monkeypatch.setattr("formats.parquet.LARGEST", 100)
    assert "row group 0 has" in refusal(tmp_path, HUB)


def test_a_file_that_changes_is_indexed_anew_and_noticed_while_it_is_read(tmp_path):
    path = written(tmp_path, rows_of(*ROWS[:2]), row_group_size=1)
    data = data_of(tmp_path, HUB)
    written(tmp_path, rows_of(*ROWS), row_group_size=1)
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        list(data.samples())
    assert len(list(data_of(tmp_path, HUB).samples())) == 5


def test_loaders_read_it_as_the_trainer_does(tmp_path):
    written(tmp_path, rows_of(*ROWS * 20), row_group_size=3)
    data = data_of(tmp_path, HUB, batch=4, train=True)
    alone = list(data.batches(0, 8))
    for [one], [other] in zip(alone, data.batches(0, 8, workers=2), strict=True):
        assert one.tokens.equal(other.tokens) and one.images.equal(other.images)


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    written(tmp_path, rows_of(*ROWS))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal(tmp_path, HUB)
