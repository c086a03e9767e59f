"""formats/conversations.py: LLaVA's talks."""

import pytest
from small import BLUE, RED, SEEN, check, data_of, picture, refused_record, source, write

from formats.pictures import MEAN_COLOUR

CHAT = source("conversations")
SYSTEM = (
    "▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . "
    "▁The ▁assistant ▁gives ▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁user ' s "
    "▁questions . ▁USER :"
)
TALKS = r"""[
    {"id": "1", "image": "d/one.png", "conversations": [
        {"from": "human", "value": "<image>\nWhere is the cross?"},
        {"from": "gpt", "value": "It is red."},
        {"from": "human", "value": "Is the circle"},
        {"from": "gpt", "value": "small"}]},
    {"id": "2", "conversations": [
        {"from": "gpt", "value": "half a turn"},
        {"from": "human", "value": "Where is the cross?"},
        {"from": "gpt", "value": "small"},
        {"from": "human", "value": "unanswered"}]},
    {"id": "3", "image": ["d/one.png", "two.png"], "conversations": [
        {"from": "human", "value": "<image> and <image>"},
        {"from": "gpt", "value": "no"}]}
]"""

ASKED = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "ho"}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "im/d/one.png", picture())
    write(tmp_path / "im/two.png", picture(RED))
    write(tmp_path / "a.json", TALKS)
    return tmp_path


def test_targets_are_every_answer_and_its_eos_alone(folder):
    data = data_of(folder, CHAT)
    turns = [
        f"{SYSTEM} {SEEN} ▁ <0x0A> W here ▁is ▁the ▁cross ? ▁ASSISTANT :",
        "▁I t ▁is ▁red . </s>",
        "▁USER : ▁Is ▁the ▁circle ▁ASSISTANT :",
        "▁small </s>",
    ]
    check(data, 0, *turns)


def test_there_may_be_no_image_or_several_and_half_a_turn_is_left_out(folder):
    data = data_of(folder, CHAT)
    asked = f"{SYSTEM} ▁Where ▁is ▁the ▁cross ? ▁ASSISTANT :"
    check(data, 1, asked, "▁small </s>", colours=[])
    asked = f"{SYSTEM} {SEEN} ▁ ▁and {SEEN} ▁ ▁ASSISTANT :"
    check(data, 2, asked, "▁no </s>", colours=[BLUE, RED])


@pytest.mark.parametrize(
    "value, asked",
    [
        ("which?\n<image>", "\nwhich?"),
        ("which <image>is it?", "\nwhich is it?"),
        ("<image>", ""),
    ],
)
def test_an_only_picture_stands_in_front_of_its_turn_wherever_its_mark_is(folder, value, asked):
    talk = [{"from": "human", "value": value}, GPT]
    write(folder / "a.json", [{"image": "two.png", "conversations": [ASKED, GPT, *talk]}])
    [item] = data_of(folder, CHAT).samples()
    _, (question, _) = item.turns
    assert question == f"USER: <image><ImageHere>{asked} ASSISTANT:"


def test_a_picture_is_padded_to_a_square_with_the_mean_colour(folder):
    write(folder / "im/d/one.png", picture(size=(40, 20)))
    data = data_of(folder, CHAT)
    _, _, [pixels] = data.sample(data.sources[0], 0, 0)
    assert tuple(pixels[0, 0]) == MEAN_COLOUR and tuple(pixels[8, 0]) == BLUE


def test_llava_models_see_the_placeholder_without_the_word_before_it(folder):
    item = next(data_of(folder, CHAT, image_mark="<ImageHere>").samples())
    assert item.prompt.endswith("USER: <ImageHere>\nWhere is the cross? ASSISTANT:")


HUMAN = {"from": "human", "value": "<image> hi"}
SAY = {"id": "1", "image": "a.png", "conversations": [HUMAN, GPT]}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"conversations": []}, "turns must alternate"),
        ({"conversations": [HUMAN, HUMAN]}, "turns must alternate"),
        ({"conversations": ["hi", "ho"]}, "'from' is missing"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "is no text"),
        ({"image": None}, "1 <image> for 0 images"),
        ({"image": [7]}, "is no text"),
    ],
)
def test_a_bad_record_is_refused_by_file_number_and_id(tmp_path, change, says):
    assert f"a.json: record 0 (id 1): {says}" in refused_record(tmp_path, CHAT, SAY, change)
