"""formats/json_index.py: records of JSON and JSON lines by position."""

import json
import re

import pytest
from small import ASK, data_of, picture, refusal, source, write

VQA = source("vqa")


def test_records_are_found_whatever_the_layout_and_the_letters(tmp_path):
    write(tmp_path / "im/é.png", picture())
    records = []
    for n in range(3):
        question = f'naïve {n} 漢 \\ " [{{ 🙂?' + "x" * n * 5000
        records.append({"image": "é.png", "question": question, "answers": ["ü"]})
    for text in (
        json.dumps(records, indent=3),
        "\ufeff" + json.dumps(records, ensure_ascii=False),
        "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "\r\n\r\n".join(map(json.dumps, records)) + "\r\n",
    ):
        write(tmp_path / "a.json", text)
        items = list(data_of(tmp_path, VQA).samples())
        assert [item.text for item in items] == [record["question"] for record in records]
        assert [item.answers for item in items] == [["ü"]] * 3


SOUND = json.dumps([ASK] * 3)


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "a.json: is not the JSON"),
        ("[]", "no records"),
        (SOUND[:60], "a.json: is not the JSON.*fetch it again"),
        (SOUND.replace("}, {", "} {"), "a.json: is not the JSON"),
        (SOUND.encode("utf-16"), "a.json: is not the JSON in UTF-8"),
        (SOUND.replace("what", "é").encode("latin-1"), "a.json: record 0: .*UTF-8"),
        ('{"id": 1, "question": [}\n', "a.json: record 0: is not valid JSON"),
        ("[7]", "a.json: record 0: is int, not an object"),
    ],
)
def test_what_is_no_list_of_records_is_refused_by_name(tmp_path, content, says):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", content)
    assert re.search(says, refusal(tmp_path, VQA))


def test_a_file_that_is_not_there_or_is_none_is_refused_by_name(tmp_path, no_file):
    (tmp_path / "im").mkdir()
    assert "a.json is not there" in refusal(tmp_path, VQA)
    no_file(tmp_path / "a.json")
    assert "a.json: is no regular file" in refusal(tmp_path, VQA)
