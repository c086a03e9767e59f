"""formats/vqa.py: VQAv2's pair of files, and plain lists."""

import re

import pytest
from small import (
    ASK,
    SEEN,
    check,
    data_of,
    picture,
    refusal,
    refused_record,
    source,
    write,
)

VQA = source("vqa")
PAIR = source("vqa", questions="q.json")
QUESTIONS = """{
    "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "Is there a circle?", "question_id": 42001},
        {"image_id": 42, "question": "What colour is (the) square?!", "question_id": 42000}
    ]
}"""
ANSWERS = """{
    "info": {}, "license": {}, "data_subtype": "val2014",
    "annotations": [
        {"question_type": "what", "multiple_choice_answer": "red", "question_id": 42000,
         "image_id": 42, "answer_type": "other",
         "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}]},
        {"question_type": "is", "multiple_choice_answer": "yes", "question_id": 42001,
         "image_id": 42, "answer_type": "yes/no",
         "answers": [{"answer": "no", "answer_confidence": "yes", "answer_id": 1},
                     {"answer": "yes", "answer_confidence": "yes", "answer_id": 2},
                     {"answer": "yes", "answer_confidence": "no", "answer_id": 3}]}
    ]
}"""

LINES = """{"image": "a.png", "question": "Is there a cross?", "answers": ["no", " no"]}
{"image": "a.png", "question": "Is there a cross?", "answer": "yes"}
"""


def test_vqav2_pair_is_joined_by_question_and_image_number(tmp_path):
    write(tmp_path / "im/COCO_val2014_000000000042.jpg", picture(size=(32, 24)))
    write(tmp_path / "q.json", QUESTIONS)
    write(tmp_path / "a.json", ANSWERS)
    data = data_of(tmp_path, PAIR)
    asked = f"{SEEN} ▁Question : is ▁there ▁a ▁circle ? ▁Short ▁answer :"
    check(data, 0, asked, "▁yes </s>")
    _, item = data.samples()
    asked = "<image><ImageHere>Question:what colour is the square? Short answer:"
    assert item.prompt == asked and item.turns == [(asked, "red")]
    assert item.fields["question_id"] == 42000 and item.fields["image_id"] == 42


def test_questions_of_a_test_split_have_no_answers_and_may_be_named_otherwise(tmp_path):
    write(tmp_path / "im/7-42.png", picture())
    write(tmp_path / "q.json", QUESTIONS)
    table = {**PAIR, "image_name": "7-{}.png"}
    del table["annotations"]
    item, _ = data_of(tmp_path, table).samples()
    assert item.answers == [] and item.size == (20, 20)
    assert "q.json: record 0 (question_id 42001): has no answers" in refusal(
        tmp_path, table
    )  # to train on


def test_plain_lists_take_answers_answer_and_json_lines(tmp_path):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", LINES)
    data = data_of(tmp_path, VQA)
    asked = f"{SEEN} ▁Question : is ▁there ▁a ▁cross ? ▁Short ▁answer :"
    check(data, 0, asked, "▁no </s>")
    check(data, 1, asked, "▁yes </s>")
    assert [item.answers for item in data.samples()] == [["no", "no"], ["yes"]]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"question": None}, "'question' is missing"),
        ({"image": None}, "'image' is missing"),
        ({"answers": 3}, "'answers' is int and no list"),
        ({"answers": [3]}, "is no text"),
    ],
)
def test_a_bad_record_is_refused_by_file_and_number(tmp_path, change, says):
    assert f"a.json: record 0: {says}" in refused_record(tmp_path, VQA, ASK, change)


ASKED = '{"questions": [{"question_id": 1, "image_id": 1, "question": "what?"}]}'
SAID = '{"annotations": [{"question_id": 1, "answers": [{"answer": "red"}]}]}'
NOTHING = '{"annotations": []}'


@pytest.mark.parametrize(
    "answers, name, says",
    [
        (
            NOTHING,
            "a.png",
            r"record 0 \(question_id 1\), its answers: .*a\.json has no record of its id",
        ),
        (
            SAID.replace("]}]", ']}, {"question_id": 1}]'),
            "a.png",
            r"record 1 of 'annotations' has the question_id of another; remove one",
        ),
        (
            SAID,
            "{:06d}{}.png",
            "`image_name` is .* it may hold one",
        ),
        (SAID, "", r"q\.json: has no 'data_subtype'; add image_name"),
        (SAID, "{:>3000000000}.png", "`image_name` is '{:>3000000000}.png'"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(tmp_path, answers, name, says):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "q.json", ASKED)
    write(tmp_path / "a.json", answers)
    assert re.search(says, refusal(tmp_path, {**PAIR, "image_name": name}))
