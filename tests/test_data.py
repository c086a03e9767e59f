"""data.py: formats to the token, boxes and pictures to the pixel, batches to the seed. (Bad input: test_data_bad.py)"""

import io
import json
import math
import os
import pickle
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data as D
import formats.files
import formats.json_index
from data import Data, collate
from formats.mixture import load_mixture
from formats.pictures import (
    MEAN_COLOUR,
    WHOLE,
    fractions,
    move_box,
    padded_region,
    peek,
    random_region,
    to_square,
    upright,
)
from formats.records import clean
from model import IGNORE, IMAGE
from support.errors import BadInput
from text.boxes import format_box, parse_box, parse_box_released
from text.templates import SYSTEM, prompt
from text.tokenizer import Tokenizer, encode_prompt, encode_turns, truncate

TOKENIZER = Tokenizer(Path(__file__).parent.parent / "assets/toy")
V = 4  # visual tokens per image in these tests
BLUE = (30, 60, 200)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(path, colour=BLUE, size=(32, 24), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **more)


def mixture(folder, *tables):
    lines = []
    for table in tables:
        lines += ["[[source]]"] + [f"{k} = {json.dumps(v)}" for k, v in table.items()]
    (folder / "mix.toml").write_text("\n".join(lines))
    return folder / "mix.toml"


def dump(path, content):
    path.write_text(json.dumps(content))
    return path.name


def data_of(folder, *tables, **more):
    options = {"image_size": 16, "visual": V, "context": 256, "batch": 1, "train": False, **more}
    return Data(mixture(folder, *tables), TOKENIZER, **options)


def pieces(ids):
    return [i if i < 0 else TOKENIZER.model.id_to_piece(i) for i in ids]


def tar_of(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png_bytes(colour=BLUE, size=(20, 20)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


# ---- formats: from the official layout to tokens, targets and pixels -------------------------------------------------

IMG = ["▁<", "image", ">"]  # <image> is ordinary text in front of the placeholders


def check(data, number, asked, said, answer_text, prompt_text, colour=BLUE):
    """Row `number` is BOS + asked + said, targets are `said` and nothing else, the picture is `colour`."""
    tokens, targets, pictures = data.sample(data.sources[0], number, 0)
    whole = ["<s>"] + asked + said
    assert pieces(tokens) == whole[:-1]
    assert pieces(targets) == [IGNORE] * len(asked) + said
    assert TOKENIZER.decode(targets) == answer_text
    assert all((picture == colour).all() and picture.shape == (16, 16, 3) for picture in pictures)
    item = list(data.samples())[number]
    assert item.prompt == prompt_text and item.turns[0] == (prompt_text, answer_text)
    return item


def test_caption_shards_become_prompt_and_caption(tmp_path):
    tar_of(
        tmp_path / "a" / "00.tar",
        [
            ("x/k1.png", png_bytes()),
            ("x/k1.txt", b"A Red  circle!"),
            ("x/k2.PNG", png_bytes()),
            ("x/k2.json", b'{"caption": "a blue square", "id": 5}'),
        ],
    )
    tar_of(
        tmp_path / "a" / "01.tar",
        [("k" * 120 + ".txt", b"a cross"), ("k" * 120 + ".jpg", png_bytes()), ("k3.cls", b"7")],
    )
    data = data_of(tmp_path, {"name": "c", "format": "caption-shards", "shards": "a/*.tar"})
    asked = IMG + [IMAGE] * V + ["▁Short", "▁caption", ":"]
    check(
        data,
        0,
        asked,
        ["▁a", "▁red", "▁circle", "</s>"],
        "a red circle",
        "<image><ImageHere>Short caption:",
    )
    item = check(
        data,
        1,
        asked,
        ["▁a", "▁blue", "▁square", "</s>"],
        "a blue square",
        "<image><ImageHere>Short caption:",
    )
    assert item.fields == {"key": "x/k2", "caption": "a blue square", "id": 5}
    check(data, 2, asked, ["▁a", "▁cross", "</s>"], "a cross", "<image><ImageHere>Short caption:")
    assert len(data.sources[0]) == 3


@pytest.mark.parametrize("kind", ["USTAR", "GNU", "PAX"])
def test_long_names_in_tars_of_every_kind_keep_a_picture_and_its_caption_together(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w", format=getattr(tarfile, f"{kind}_FORMAT")) as tar:
        for n in range(3):
            for ending, content in ((".png", png_bytes()), (".txt", b"caption %d" % n)):
                info = tarfile.TarInfo(
                    f"{'d' * 90}/{'e' * (95 - 90 * (kind == 'USTAR'))}{n}{ending}"
                )
                info.size = len(content)
                info.pax_headers = {"comment": "x" * 700}
                tar.addfile(info, io.BytesIO(content))
    data = data_of(tmp_path, {"name": "c", "format": "caption-shards", "shards": "a.tar"})
    assert [item.answers for item in data.samples()] == [[f"caption {n}"] for n in range(3)]


def test_coco_captions_train_on_each_caption_and_evaluate_each_image_with_all_of_them(tmp_path):
    png(tmp_path / "im" / "COCO_val2014_000000000009.jpg", BLUE)
    png(tmp_path / "im" / "b.png")
    dump(
        tmp_path / "caps.json",
        {
            "info": {"year": 2014},
            "images": [
                {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "height": 24, "width": 32},
                {"id": 4, "file_name": "b.png"},
            ],
            "licenses": [],
            "annotations": [
                {"image_id": 9, "id": 1, "caption": "A red circle."},
                {"image_id": 4, "id": 2, "caption": "a cross"},
                {"image_id": 9, "id": 3, "caption": "the red circle"},
            ],
        },
    )
    table = {"name": "coco", "format": "coco-caption", "annotations": "caps.json", "images": "im"}
    data = data_of(tmp_path, table)
    items = list(data.samples())
    assert [(item.fields["image_id"], item.answers) for item in items] == [
        (4, ["a cross"]),
        (9, ["A red circle.", "the red circle"]),
    ]
    check(
        data,
        0,
        IMG + [IMAGE] * V + ["▁Short", "▁caption", ":"],
        ["▁a", "▁cross", "</s>"],
        "a cross",
        "<image><ImageHere>Short caption:",
    )
    train = data_of(tmp_path, table, train=True)
    said = [TOKENIZER.decode(train.sample(train.sources[0], n, 0)[1]) for n in range(3)]
    assert said == ["a cross", "a red circle", "the red circle"] and train.counts == {"coco": 3}


def vqav2(folder, answers=("yes", "no", "yes")):
    png(folder / "im" / "COCO_val2014_000000000042.jpg", BLUE, quality=100)
    dump(
        folder / "q.json",
        {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": {},
            "data_subtype": "val2014",
            "questions": [
                {"image_id": 42, "question": "Is there a circle?", "question_id": 42001},
                {"image_id": 42, "question": "What colour is (the) square?!", "question_id": 42000},
            ],
        },
    )
    dump(
        folder / "a.json",
        {
            "info": {},
            "license": {},
            "data_subtype": "val2014",
            "annotations": [
                {
                    "question_type": "what",
                    "multiple_choice_answer": "red",
                    "question_id": 42000,
                    "image_id": 42,
                    "answer_type": "other",
                    "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}],
                },
                {
                    "question_type": "is",
                    "multiple_choice_answer": "yes",
                    "question_id": 42001,
                    "image_id": 42,
                    "answer_type": "yes/no",
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": i}
                        for i, a in enumerate(answers, 1)
                    ],
                },
            ],
        },
    )
    return {
        "name": "vqav2",
        "format": "vqa",
        "questions": "q.json",
        "annotations": "a.json",
        "images": "im",
    }


def test_vqav2_pair_is_joined_by_question_and_image_number(tmp_path):
    data = data_of(tmp_path, vqav2(tmp_path))
    asked = (
        IMG
        + [IMAGE] * V
        + ["▁Question", ":", "is", "▁there", "▁a", "▁circle", "?", "▁Short", "▁answer", ":"]
    )
    tokens, targets, _ = data.sample(data.sources[0], 0, 0)
    assert pieces(tokens) == ["<s>"] + asked + ["▁yes"] and pieces(targets) == [IGNORE] * len(
        asked
    ) + ["▁yes", "</s>"]
    item = list(data.samples())[1]
    assert item.prompt == "<image><ImageHere>Question:what colour is the square? Short answer:"
    assert (item.answers, item.fields["question_id"], item.fields["image_id"]) == (
        ["red"],
        42000,
        42,
    )
    assert np.abs(np.asarray(item.images[0]).astype(int) - BLUE).max() <= 2  # a JPEG's rounding


def test_vqa_training_draws_an_answer_by_count_and_evaluation_takes_the_commonest(tmp_path):
    table = vqav2(tmp_path, ["yes"] * 7 + ["no"] * 3)
    train, held = data_of(tmp_path, table, train=True), data_of(tmp_path, table)
    drawn = Counter(
        TOKENIZER.decode(train.sample(train.sources[0], 0, step)[1]) for step in range(600)
    )
    assert set(drawn) == {"yes", "no"} and 0.63 < drawn["yes"] / 600 < 0.77
    assert {TOKENIZER.decode(held.sample(held.sources[0], 0, step)[1]) for step in range(20)} == {
        "yes"
    }
    again = data_of(tmp_path, table, train=True)
    assert [again.sample(again.sources[0], 0, s)[1] for s in range(50)] == [
        train.sample(train.sources[0], 0, s)[1] for s in range(50)
    ]


def test_plain_vqa_lists_take_answers_answer_and_json_lines(tmp_path):
    png(tmp_path / "im" / "a.png")
    records = [
        {"image": "a.png", "question": "Is there a cross?", "answers": ["no", "no"]},
        {"image": "a.png", "question": "Is there a cross?", "answer": "yes"},
    ]
    dump(tmp_path / "v.json", records)
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    for name in ("v.json", "v.jsonl"):
        data = data_of(
            tmp_path, {"name": "v", "format": "vqa", "annotations": name, "images": "im"}
        )
        asked = (
            IMG
            + [IMAGE] * V
            + ["▁Question", ":", "is", "▁there", "▁a", "▁cross", "?", "▁Short", "▁answer", ":"]
        )
        text = "<image><ImageHere>Question:is there a cross? Short answer:"
        check(data, 0, asked, ["▁no", "</s>"], "no", text)
        check(data, 1, asked, ["▁yes", "</s>"], "yes", text)


def refs(folder):
    png(folder / "im" / "r.png", size=(200, 100))
    dump(
        folder / "r.json",
        [
            {
                "img_name": "r.png",
                "bbox": [24, 34, 112, 78],
                "segment_id": 3,
                "sentences": [
                    {"sent": "the red circle", "sent_id": 1},
                    {"sent": "the circle", "sent_id": 2},
                ],
            },
            {
                "img_name": "r.png",
                "bbox": [0, 0, 200, 100],
                "segment_id": 4,
                "sentences": [{"sent": "the cross", "sent_id": 7}],
            },
        ],
    )
    return {"name": "r", "format": "refcoco", "annotations": "r.json", "images": "im"}


def test_refcoco_is_a_sample_per_sentence_with_the_box_as_fractions(tmp_path):
    data = data_of(tmp_path, refs(tmp_path))
    assert data.counts == {"r": 3}
    box = ["▁", "<box>(", "0.12", ",", "0.34", "),(", "0.56", ",", "0.78", ")</box>", "</s>"]
    asked = IMG + [IMAGE] * V + ["▁<", "ref", ">", "the", "▁circle", "</", "ref", ">"]
    item = check(
        data,
        1,
        asked,
        box,
        "<box>(0.12,0.34),(0.56,0.78)</box>",
        "<image><ImageHere><ref>the circle</ref>",
    )
    assert item.box == (24, 34, 112, 78) and item.size == (200, 100) and item.fields["sent_id"] == 2
    assert (
        TOKENIZER.decode(data.sample(data.sources[0], 2, 0)[1])
        == "<box>(0.00,0.00),(1.00,1.00)</box>"
    )


def test_refcoco_read_the_other_way_round_asks_for_the_phrase(tmp_path):
    data = data_of(tmp_path, {**refs(tmp_path), "task": "region"})
    asked = (
        IMG
        + [IMAGE] * V
        + [
            "▁",
            "<box>(",
            "0.12",
            ",",
            "0.34",
            "),(",
            "0.56",
            ",",
            "0.78",
            ")</box>",
            "▁Short",
            "▁phrase",
            ":",
        ]
    )
    check(
        data,
        0,
        asked,
        ["▁the", "▁red", "▁circle", "</s>"],
        "the red circle",
        "<image><ImageHere><box>(0.12,0.34),(0.56,0.78)</box> Short phrase:",
    )


ASSISTANT = [
    "▁A",
    "▁chat",
    "▁between",
    "▁a",
    "▁curious",
    "▁user",
    "▁and",
    "▁an",
    "▁artificial",
    "▁intelligence",
    "▁assistant",
    ".",
    "▁The",
    "▁assistant",
    "▁gives",
    "▁helpful",
    ",",
    "▁detailed",
    ",",
    "▁and",
    "▁polite",
    "▁answers",
    "▁to",
    "▁the",
    "▁user",
    "'",
    "s",
    "▁questions",
    ".",
    "▁USER",
    ":",
]


def talk(folder):
    png(folder / "im" / "d" / "one.png")
    png(folder / "im" / "two.png", (200, 30, 30), size=(24, 24))
    turn = lambda who, text: {"from": who, "value": text}
    dump(
        folder / "chat.json",
        [
            {
                "id": "1",
                "image": "d/one.png",
                "conversations": [
                    turn("human", "<image>\nWhere is the cross?"),
                    turn("gpt", "It is red."),
                    turn("human", "Is the circle"),
                    turn("gpt", "small"),
                ],
            },
            {
                "id": "2",
                "conversations": [
                    turn("gpt", "half a turn"),
                    turn("human", "Where is the cross?"),
                    turn("gpt", "small"),
                    turn("human", "unanswered"),
                ],
            },
            {
                "id": "3",
                "image": ["d/one.png", "two.png"],
                "conversations": [turn("human", "<image> and <image>"), turn("gpt", "no")],
            },
        ],
    )
    return {"name": "chat", "format": "conversations", "annotations": "chat.json", "images": "im"}


def test_conversations_put_targets_on_every_answer_and_its_eos_alone(tmp_path):
    data = data_of(tmp_path, talk(tmp_path))
    first = (
        ASSISTANT
        + IMG
        + [IMAGE] * V
        + ["▁", "<0x0A>", "W", "here", "▁is", "▁the", "▁cross", "?", "▁ASSISTANT", ":"]
    )
    said, then, last = (
        ["▁I", "t", "▁is", "▁red", ".", "</s>"],
        ["▁USER", ":", "▁Is", "▁the", "▁circle", "▁ASSISTANT", ":"],
        ["▁small", "</s>"],
    )
    tokens, targets, pictures = data.sample(data.sources[0], 0, 0)
    assert pieces(tokens) == ["<s>"] + first + said + then + last[:-1]
    assert pieces(targets) == [IGNORE] * len(first) + said + [IGNORE] * len(then) + last
    # chat pads to a square with the mean colour: 32 x 24 -> 4 of 32 rows above and below
    assert (pictures[0][8] == BLUE).all() and np.abs(
        pictures[0][0].astype(int) - MEAN_COLOUR
    ).max() <= 2
    assert list(data.samples())[0].prompt == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image><ImageHere>\nWhere is the cross? "
        "ASSISTANT:"
    )


def test_conversations_may_have_no_image_or_several(tmp_path):
    data = data_of(tmp_path, talk(tmp_path))
    tokens, targets, pictures = data.sample(data.sources[0], 1, 0)
    assert pieces(tokens) == ["<s>"] + ASSISTANT + [
        "▁Where",
        "▁is",
        "▁the",
        "▁cross",
        "?",
        "▁ASSISTANT",
        ":",
        "▁small",
    ]
    assert pictures == [] and TOKENIZER.decode(targets) == "small"
    tokens, _, pictures = data.sample(data.sources[0], 2, 0)
    both = (
        IMG
        + [IMAGE] * V
        + ["▁", "▁and", "▁<", "image", ">"]
        + [IMAGE] * V
        + ["▁", "▁ASSISTANT", ":", "▁no"]
    )
    assert pieces(tokens) == ["<s>"] + ASSISTANT + both
    assert (pictures[1] == (200, 30, 30)).all() and len(pictures) == 2


def test_llava_models_see_the_placeholder_without_the_word_before_it(tmp_path):
    data = data_of(tmp_path, talk(tmp_path), image_mark="<ImageHere>")
    assert list(data.samples())[0].prompt.endswith(
        "USER: <ImageHere>\nWhere is the cross? ASSISTANT:"
    )
    assert prompt("chat", "hello", "") == SYSTEM + "USER: hello ASSISTANT:"


def test_questions_are_cleaned_as_the_released_model_expects(tmp_path):
    asked = prompt("vqa", 'What is "THIS" (really)!? #1: a~b * c;  d. ' + "word " * 60)
    assert asked.startswith("<image><ImageHere>Question:what is this really? 1 ab c d word")
    assert asked.count("word") == 42
    assert prompt("ground", "The RED circle.") == "<image><ImageHere><ref>The RED circle.</ref>"
    with pytest.raises(BadInput, match="reserved"):
        clean("a <ImageHere> b", "x")


def test_generation_starts_from_the_same_ids_as_training():
    turns = [("USER: <ImageHere> a ASSISTANT:", "red"), ("USER: b ASSISTANT:", "blue")]
    trained, _ = encode_turns(TOKENIZER, turns, V)
    asked, targets = encode_turns(TOKENIZER, [turns[0], (turns[1][0], None)], V)
    assert (
        trained[: len(asked)] == asked
        and len(targets) == len(asked)
        and asked.count(TOKENIZER.bos) == 1
    )
    assert encode_turns(TOKENIZER, [(turns[0][0], None)], V)[0] == encode_prompt(
        TOKENIZER, turns[0][0], V
    )


@pytest.mark.parametrize(
    "text",
    [
        "red",
        "a  b",
        "héllo 漢字 🙂",
        "<box>(0.12,0.34),(1.00,0.78)</box>",
        "x\ny",
        "</s> <unk>",
        "~",
    ],
)
def test_decode_undoes_encode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    noisy = (
        [TOKENIZER.bos]
        + [IMAGE] * 3
        + TOKENIZER.encode(text)
        + [TOKENIZER.eos, IGNORE, TOKENIZER.pad, 10**6]
    )
    assert TOKENIZER.decode(noisy) == text


def test_tokenizer_travels_whole_in_its_bytes_and_through_a_pickle(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.bytes)
    for copy in (Tokenizer(tmp_path), pickle.loads(pickle.dumps(TOKENIZER))):
        assert copy.encode("a red circle") == TOKENIZER.encode("a red circle")
    assert (TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos) == (0, 1, 2)


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_text_to_box_to_text_is_the_identity_for_every_coordinate():
    for n in range(101):
        for box in ([0, 0, n, 100], [n, 0, 100, 100], [0, n, 100, 100], [0, 0, 100, n]):
            text = "<box>({:.2f},{:.2f}),({:.2f},{:.2f})</box>".format(*(v / 100 for v in box))
            parsed = parse_box(text)
            assert parsed == tuple(v / 100 for v in box)
            if box[0] < box[2] and box[1] < box[3]:
                assert format_box(parsed) == text
    pieces_of = {f"{n / 100:.2f}" for n in range(101)}
    assert pieces_of <= {TOKENIZER.model.id_to_piece(i) for i in range(TOKENIZER.size)}


def test_boxes_are_parsed_strictly_and_separately_as_the_released_code_does():
    assert parse_box("It is <box>(0.1, 0.20),(1.00,1)</box>.") == (0.1, 0.2, 1.0, 1.0)
    for text in (
        "",
        "(0.1,0.2),(0.3,0.4)",
        "<box>(0.1,0.2),(0.3,0.4)",
        "<box>(0.3,0.2),(0.1,0.4)</box>",
        "<box>(1.10,0.2),(0.3,0.4)</box>",
        "<box>(.1,0.2),(0.3,0.4)</box>",
        "<box>(0x12,0.2),(0.3,0.4)</box>",
        "<box>(nan,0.2),(0.3,0.4)</box>",
        "<box>(0.1,0.2,0.3,0.4)</box>",
        "<box>(٠.1,0.2),(0.3,0.4)</box>",
    ):
        assert parse_box(text) is None, text
    assert parse_box_released("<box>(0.12,0.34),(0.56,0.78)</box>") == (0.12, 0.34, 0.56, 0.78)
    assert parse_box_released("0.12,0.34 and 0.56,0.78") == (
        0.12,
        0.34,
        0.56,
        0.78,
    )  # it wants no marks
    assert parse_box_released("<box>(0.12,0.34),(1.00,1.00)</box>") is None  # 1.00 is lost on it
    assert parse_box_released("<box>(0.1, 0.2),(0.3, 0.4)</box>") is None  # so is a space
    assert parse_box_released("<box>(0.120,0.340),(0.056,0.780)</box>")[2] == 56  # three decimals
    for x2 in range(1, 100):  # two are safe
        assert parse_box_released(f"<box>(0.00,0.10),({x2 / 100:.2f},0.20)</box>") == (
            0,
            0.1,
            x2 / 100,
            0.2,
        )


A = (0.12, 0.34, 0.56, 0.78)
BOXES = [  # text, what it is, what the released code takes it for
    ("<box>(0.12,0.34),(0.56,0.78)</box>", A, A),
    ("It is at <box>(0.12,0.34),(0.56,0.78)</box>.", A, A),
    ("<box>(0.00,0.00),(0.99,0.99)</box>", (0.0, 0.0, 0.99, 0.99), (0.0, 0.0, 0.99, 0.99)),
    ("<box>(0.00,0.00),(1.00,1.00)</box>", (0.0, 0.0, 1.0, 1.0), None),
    ("<box>(0,0),(1,1)</box>", (0.0, 0.0, 1.0, 1.0), None),
    ("<box>(0.1,0.2),(0.3,0.4)</box>", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ("<box>(0.1, 0.2), (0.3, 0.4)</box>", (0.1, 0.2, 0.3, 0.4), None),
    ("<box> ( 0.1 , 0.2 ) , ( 0.3 , 0.4 ) </box>", (0.1, 0.2, 0.3, 0.4), None),
    (
        "<box>(0.12,0.34),(0.56,0.78)</box> and <box>(0.01,0.02),(0.03,0.04)</box>",
        A,
        (0.12, 0.34, 0.03, 0.04),
    ),
    ("<box>(0.5,0.5),(0.5,0.5)</box>", (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)),
    ("<box>(0.56,0.34),(0.12,0.78)</box>", None, (0.56, 0.34, 0.12, 0.78)),
    ("<box>(0.12,0.78),(0.56,0.34)</box>", None, (0.12, 0.78, 0.56, 0.34)),
    ("", None, None),
    ("no box", None, None),
    ("<box></box>", None, None),
    ("<box>(0.12,0.34)</box>", None, None),
    ("(0.12,0.34),(0.56,0.78)", None, A),
    ("0.12,0.34,0.56,0.78", None, A),
    ("<box>0.12,0.34,0.56,0.78</box>", None, A),
    ("<box>(0.12,0.34),(0.56,0.78)", None, A),
    ("(0.12,0.34),(0.56,0.78)</box>", None, A),
    ("<box>[0.12,0.34],[0.56,0.78]</box>", None, A),
    ("<box>(0.12;0.34),(0.56;0.78)</box>", None, None),
    ("<box>(-0.12,0.34),(0.56,0.78)</box>", None, A),
    ("<box>(1.12,0.34),(0.56,0.78)</box>", None, None),
    ("<box>(0.12,0.34),(0.56,1.78)</box>", None, None),
    ("<box>(.12,.34),(.56,.78)</box>", None, None),
    ("<box>(12,34),(56,78)</box>", None, None),
    ("<box>(012,034),(056,078)</box>", None, (12.0, 34.0, 56.0, 78.0)),
    ("<box>(0.120,0.340),(0.560,0.780)</box>", A, A),
    ("<box>(0.120,0.340),(0.056,0.780)</box>", None, (0.12, 0.34, 56.0, 0.78)),
    ("<box>(nan,0.34),(0.56,0.78)</box>", None, None),
    ("<box>(0.1e1,0.34),(0.56,0.78)</box>", None, None),
    ("<BOX>(0.12,0.34),(0.56,0.78)</BOX>", None, A),
    ("<box>(0.12,0.34),\n(0.56,0.78)</box>", A, None),
    ("<box>(0.12,0.34),(0.56,0.78),(0.9,0.9)</box>", None, (0.12, 0.34, 0.9, 0.9)),
    ("<box>(0x12,0x34),(0x56,0x78)</box>", None, None),
]


def test_a_table_of_boxes_well_and_ill_formed_is_read_by_both_parsers_as_by_hand():
    assert len({text for text, _, _ in BOXES}) == len(BOXES) >= 30
    for text, strict, released in BOXES:
        assert (parse_box(text), parse_box_released(text)) == (strict, released), text


@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(320, 200), (200, 320), (256, 256)])
def test_a_box_lands_on_the_same_coloured_pixels_after_every_transform(kind, size):
    rng = np.random.default_rng(sum(size))
    for _ in range(12):
        (w, h), side = size, 128
        x1, y1 = int(rng.integers(0, w - 60)), int(rng.integers(0, h - 60))
        x2, y2 = x1 + int(rng.integers(40, w - x1)), y1 + int(rng.integers(40, h - y1))
        image = Image.new("RGB", size, (10, 10, 10))
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), (240, 200, 20))
        region = {
            "squash": lambda: WHOLE,
            "pad": lambda: padded_region(size),
            "crop": lambda: random_region(size, rng),
        }[kind]()
        try:
            moved = move_box(fractions((x1, y1, x2, y2), size, "here"), region)
        except BadInput:
            assert kind == "crop"
            continue  # nothing of it is left in this crop
        left, top, right, bottom = (v * side for v in moved)
        pixels = to_square(image, side, region)
        yellow = (pixels.astype(int) - (240, 200, 20)).__abs__().max(-1) < 60
        rows, columns = np.flatnonzero(yellow.any(1)), np.flatnonzero(yellow.any(0))
        found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert np.abs(np.array(found) - (left, top, right, bottom)).max() <= 1.5, (found, moved)
        inside = pixels[
            math.ceil(top) + 2 : math.floor(bottom) - 2, math.ceil(left) + 2 : math.floor(right) - 2
        ]
        assert (np.abs(inside.astype(int) - (240, 200, 20)) < 30).all()


def test_training_never_crops_a_task_with_boxes_and_crops_captions_by_default(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    refs(tmp_path)
    image.save(tmp_path / "im" / "r.png")
    dump(
        tmp_path / "r.json",
        [{"img_name": "r.png", "bbox": [2, 2, 9, 9], "sentences": [{"sent": "cross"}]}],
    )
    dump(tmp_path / "v.json", [{"image": "r.png", "question": "what?", "answers": ["red"]}])
    ground, vqa = (
        {"name": "r", "format": "refcoco", "annotations": "r.json", "images": "im"},
        {"name": "v", "format": "vqa", "annotations": "v.json", "images": "im"},
    )

    def seen(table):
        data = data_of(tmp_path, table, train=True)
        samples = [data.sample(data.sources[0], 0, step) for step in range(8)]
        return {pictures[0].tobytes() for _, _, pictures in samples}

    assert len(seen(ground)) == 1 and len(seen(vqa)) == 8 and len(seen({**vqa, "crop": False})) == 1
    areas = [
        (r[2] - r[0]) * (r[3] - r[1])
        for r in (random_region((64, 48), np.random.default_rng(i)) for i in range(300))
    ]
    assert 0.49 < min(areas) < 0.55 and 0.9 < max(areas) <= 1


# ---- images ----------------------------------------------------------------------------------------------------------


def opened(path, need=None):
    return np.asarray(upright(peek((str(path), 0, -1)), need)).astype(int)


def test_every_kind_of_picture_becomes_the_rgb_that_a_viewer_shows(tmp_path):
    red, save = (
        np.array((200, 40, 20)),
        lambda image, name, **k: (image.save(tmp_path / name, **k), tmp_path / name)[1],
    )
    flat = Image.new("RGB", (8, 6), tuple(red))
    grey = Image.new("L", (8, 6), 90)
    deep = Image.fromarray(np.full((6, 8), 90 * 257, np.uint16))
    half = Image.new("RGBA", (8, 6), (200, 40, 20, 0))
    clear = Image.new("P", (8, 6), 3)
    clear.putpalette([v for i in range(256) for v in (i, 0, 0)])
    assert (opened(save(flat.quantize(4), "palette.png")) == red).all()
    assert (opened(save(grey, "grey.png")) == 90).all()
    assert (opened(save(deep, "deep.png")) == 90).all()
    assert (np.abs(opened(save(flat.convert("CMYK"), "cmyk.jpg", quality=100)) - red) <= 4).all()
    assert (opened(save(half, "alpha.png")) == 255).all()
    assert (opened(save(clear, "clear.png", transparency=3)) == 255).all()
    assert (opened(save(half.convert("LA"), "la.png")) == 255).all()
    assert (opened(save(Image.new("1", (8, 6), 1), "bits.png")) == 255).all()
    later = [Image.new("RGB", (8, 6), (0, 0, 255))]
    assert (
        np.abs(opened(save(flat, "moving.gif", save_all=True, append_images=later)) - red) <= 8
    ).all()
    assert (
        np.abs(
            opened(save(flat, "moving.webp", save_all=True, append_images=later, lossless=True))
            - red
        )
        <= 2
    ).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone_and_the_upright_size_is_known_from_the_header(tmp_path, turn):
    flips = {
        2: [0],
        3: [3],
        4: [1],
        5: [5],
        6: [4],
        7: [6],
        8: [2],
    }  # Pillow transpositions that undo it
    stored = Image.fromarray(
        np.kron([[250, 10, 90], [120, 180, 40]], np.ones((16, 16))).astype(np.uint8)
    ).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "t.jpg", exif=exif, quality=100)
    wanted = stored
    for flip in flips.get(turn, []):
        wanted = wanted.transpose(Image.Transpose(flip))
    picture = peek((str(tmp_path / "t.jpg"), 0, -1))
    assert picture.size == wanted.size == upright(picture).size
    assert np.abs(opened(tmp_path / "t.jpg") - np.asarray(wanted).astype(int)).max() < 12


def test_a_jpeg_far_larger_than_needed_is_decoded_small_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1200, :1600]
    smooth = np.stack((x / 1600, y / 1200, (x + y) / 2800), -1) * 255
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "big.jpg", quality=95)
    assert opened(tmp_path / "big.jpg", 224).shape == (600, 800, 3) and opened(
        tmp_path / "big.jpg"
    ).shape == (1200, 1600, 3)
    small, full = (
        to_square(upright(peek((str(tmp_path / "big.jpg"), 0, -1)), need), 224)
        for need in (224, None)
    )
    assert np.abs(small.astype(int) - full).max() <= 3


def test_squashing_is_pillows_own_bicubic_and_padding_centres(tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    assert (
        to_square(image, 16) == np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    ).all()
    padded = Image.new("RGB", (50, 50), MEAN_COLOUR)
    padded.paste(image, (0, 10))
    padded = padded.resize((16, 16), Image.Resampling.BICUBIC)
    assert (to_square(image, 16, padded_region((50, 30))) == np.asarray(padded)).all()


# ---- batches ---------------------------------------------------------------------------------------------------------

WORDS = [
    "red",
    "blue",
    "circle",
    "square",
    "is",
    "the",
    "a",
    "there",
    "what",
    "cross",
    "large",
    "small",
]


def chat_lines(folder, count, words, image=lambda i: True, name="lines.jsonl", long=None):
    png(folder / "im" / "p.png", size=(20, 20))
    rng = random.Random(0)
    lines = []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=long(rng, i) if long else words))
        record = {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": "<image>\n" * image(i) + f"record {i}"},
                {"from": "gpt", "value": text},
            ],
        }
        if image(i):
            record["image"] = "p.png"
        lines.append(json.dumps(record))
    (folder / name).write_text("\n".join(lines))
    return {"name": name, "format": "conversations", "annotations": name, "images": "im"}


def vqa_list(folder, count, name, noise=False):
    rng = np.random.default_rng(7)
    (folder / "im").mkdir(exist_ok=True)
    for i in range(count if noise else 1):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(
            folder / "im" / f"{name}{i}.png"
        )
    dump(
        folder / f"{name}.json",
        [
            {
                "image": f"{name}{i if noise else 0}.png",
                "question": f"q {i} " + "word " * (i % 7),
                "answers": ["yes", "no", "2"],
            }
            for i in range(count)
        ],
    )
    return {"name": name, "format": "vqa", "annotations": f"{name}.json", "images": "im"}


@pytest.fixture
def mixed(tmp_path):
    return [
        {**chat_lines(tmp_path, 300, 20, image=lambda i: i % 3 > 0), "weight": 2.0},
        {**vqa_list(tmp_path, 90, "v"), "weight": 1.0},
        {**vqa_list(tmp_path, 11, "w"), "weight": 0.5},
    ]


def test_every_world_size_deals_out_the_same_global_batches_for_200_steps(tmp_path, mixed):
    data = data_of(tmp_path, *mixed, train=True, batch=16, window=4)
    for step in range(200):
        rows = data.rows(step).tolist()
        for world in (1, 2, 4, 8):
            dealt = [data.rows(step)[rank::world].tolist() for rank in range(world)]
            assert sorted(sum(dealt, [])) == sorted(rows) and {len(d) for d in dealt} == {
                16 // world
            }
            assert [dealt[i % world][i // world] for i in range(16)] == rows
    other = data_of(tmp_path, *mixed, train=True, batch=16, window=4, seed=1)
    assert [other.rows(s).tolist() for s in range(3)] != [data.rows(s).tolist() for s in range(3)]


def test_batches_are_the_rows_whatever_the_world_and_accumulation(tmp_path, mixed):
    data = data_of(tmp_path, *mixed, train=True, batch=8, window=2)

    def contents(world, accum):
        rows = []
        for rank in range(world):
            for micro in (m for micros in data.batches(3, 2, rank, world, accum) for m in micros):
                assert len(micro.tokens) == 8 // (world * accum)
                rows += [tuple(row[row != TOKENIZER.pad].tolist()) for row in micro.tokens]
        return sorted(rows)

    assert contents(1, 1) == contents(2, 1) == contents(1, 4) == contents(4, 2) == contents(8, 1)


def test_an_epoch_takes_every_sample_once_and_the_next_in_another_order(tmp_path):
    data = data_of(tmp_path, vqa_list(tmp_path, 96, "v"), train=True, batch=8, window=4)
    epochs = [
        [n for step in range(e * 12, e * 12 + 12) for _, n in data.rows(step).tolist()]
        for e in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(96))
    assert (
        len({frozenset(epoch[:32]) for epoch in epochs}) == 4
    )  # not the same batches in another order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_shuffled_is_a_permutation_for_every_size_and_key(n):
    orders = set()
    for key in range(5):
        order = D.shuffled(np.arange(n), n, np.full(n, 12345 * key + 1, np.uint64))
        assert sorted(order.tolist()) == list(range(n))
        orders.add(tuple(order.tolist()))
    assert n < 7 or len(orders) == 5


def test_the_mixture_keeps_its_shares_and_its_sources_their_epochs(tmp_path, mixed):
    data = data_of(tmp_path, *mixed, train=True, batch=32, window=4)
    rows = np.concatenate([data.rows(step) for step in range(3 * D.ROUND // 32)])
    shares = np.bincount(rows[:, 0]) / len(rows)
    assert np.abs(shares - np.array([2, 1, 0.5]) / 3.5).max() < 2 / D.ROUND
    for s, source in enumerate(data.sources):
        seen = Counter(rows[rows[:, 0] == s, 1].tolist())
        assert len(seen) == len(source) and max(seen.values()) - min(seen.values()) <= 1
    unweighted = [{k: v for k, v in t.items() if k != "weight"} for t in mixed]
    shares = data_of(tmp_path, *unweighted, train=True).shares / D.ROUND
    assert np.abs(shares - np.array([300, 90, 11]) / 401).max() < 2 / D.ROUND  # by size


def same(a, b):
    return (
        all(
            torch.equal(getattr(a, k), getattr(b, k))
            for k in ("images", "tokens", "targets", "image_positions", "target_positions")
        )
        and a.supervised == b.supervised
        and a.bad == b.bad
    )


def test_skipping_to_a_step_gives_what_running_to_it_gives_down_to_the_pixels(tmp_path):
    table = vqa_list(tmp_path, 40, "v", noise=True)  # vqa is cropped at random
    ran = list(data_of(tmp_path, table, train=True, batch=8, window=4).batches(0, 13, accum=2))
    skipped = list(data_of(tmp_path, table, train=True, batch=8, window=4).batches(9, 4, accum=2))
    assert len(skipped) == 4 and all(
        same(a, b) for x, y in zip(ran[9:], skipped) for a, b in zip(x, y)
    )
    assert not torch.equal(ran[0][0].images, ran[5][0].images)


@pytest.mark.parametrize("workers,prefetch", [(1, 2), (3, 1)])
def test_workers_and_prefetch_change_nothing_down_to_the_pixels(tmp_path, workers, prefetch):
    table = vqa_list(tmp_path, 40, "v", noise=True)
    (tmp_path / "im" / "v3.png").write_bytes(b"broken")
    state = torch.get_rng_state()
    alone, helped = (
        data_of(tmp_path, table, train=True, batch=8),
        data_of(tmp_path, table, train=True, batch=8),
    )
    a, b = (
        list(alone.batches(2, 8, accum=2)),
        list(helped.batches(2, 8, accum=2, workers=workers, prefetch=prefetch)),
    )
    assert len(a) == len(b) == 8 and all(same(x, y) for p, q in zip(a, b) for x, y in zip(p, q))
    assert alone.bad == helped.bad > 0
    assert torch.equal(state, torch.get_rng_state())  # and the trainer's own stream is untouched


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_no_picture_and_of_more_pictures_than_rows_come_as_they_are(tmp_path, workers):
    data, found = data_of(tmp_path, talk(tmp_path), batch=1), set()
    for step, [batch] in enumerate(data.batches(0, 24, workers=workers)):
        rows = [
            data.sample(data.sources[s], number, step) for s, number in data.rows(step).tolist()
        ]
        assert same(batch, collate(rows, TOKENIZER.pad, V, 16))
        found.add(sum(len(pictures) for _, _, pictures in rows))
    assert found == {0, 1, 2}


def test_a_spawned_worker_opens_the_same_data(tmp_path, mixed):
    data, key = data_of(tmp_path, *mixed, train=True, batch=8), (5, 0, 2, 0, 1)
    copy = pickle.loads(pickle.dumps(data))
    assert same(copy[key], data[key])


def waste(data, world, accum):
    """Share of padding over a window of steps, as collate pads: each micro-batch to its longest, then to BUCKET."""
    size, real, padded = data.batch // world // accum, 0, 0
    for step in range(data.window):
        for rank in range(world):
            rows = data.rows(step)[rank::world]
            for m in range(accum):
                some = rows[m * size : (m + 1) * size].tolist()
                lengths = [len(data.text(data.sources[s], n, step)[0]) for s, n in some]
                real += sum(lengths)
                padded += size * -(-max(lengths) // D.BUCKET) * D.BUCKET
    return 1 - real / padded


def test_padding_wastes_at_most_five_percent_on_lengths_like_llavas(tmp_path):
    # LLaVA-665k: 15 of 16 rows carry an image (256 tokens here) and some 150 tokens of talk, long-tailed; the rest is
    # text alone (ShareGPT), some 700 tokens with a tail far beyond the context
    with_image = lambda i: i % 16 > 0
    long = lambda rng, i: int(math.exp(rng.gauss(*(4.9, 0.7) if with_image(i) else (6.6, 0.8))))
    table = chat_lines(tmp_path, 6000, None, image=with_image, long=long)
    options = {"train": True, "batch": 64, "context": 2048, "visual": 256}
    data, unsorted = data_of(tmp_path, table, **options), data_of(tmp_path, table, **options)
    unsorted.lengths, unsorted.window = [np.ones_like(lengths) for lengths in unsorted.lengths], 8
    found = waste(data, 4, 1), waste(data, 4, 4), waste(unsorted, 4, 1)
    print("padding: {:.1%}, with 4 micro-batches {:.1%}, unsorted {:.1%}".format(*found))
    assert max(found[:2]) <= 0.05 < 0.3 < found[2]
    [[batch]] = data.batches(0, 1, 0, 4)  # and collate pads no further than that
    assert batch.tokens.shape[1] - (batch.tokens != TOKENIZER.pad).sum(1).max() < D.BUCKET


def test_a_batch_says_where_its_placeholders_and_targets_are(tmp_path):
    data = data_of(tmp_path, talk(tmp_path))
    rows = [data.sample(data.sources[0], n, 0) for n in (2, 1, 0)]
    batch = collate(rows, TOKENIZER.pad, V, 16, bucket=8, bad=["x"])
    B, T = batch.tokens.shape
    assert batch.images.shape == (3, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert B == 3 and T % 8 == 0 and T - max(len(r[0]) for r in rows) < 8
    assert batch.image_positions.tolist() == [
        b * T + t for b, r in enumerate(rows) for t, i in enumerate(r[0]) if i == IMAGE
    ]
    flat = batch.target_positions[: batch.supervised]
    assert flat.tolist() == [
        b * T + t for b, r in enumerate(rows) for t, i in enumerate(r[1]) if i != IGNORE
    ]
    assert (
        len(batch.target_positions) % 8 == 0
        and (batch.target_positions[batch.supervised :] == -1).all()
    )
    for b, (tokens, targets, _) in enumerate(rows):
        assert batch.tokens[b].tolist() == tokens + [TOKENIZER.pad] * (T - len(tokens))
        assert batch.targets[b].tolist() == targets + [IGNORE] * (T - len(targets))
    assert (batch.images[0, :, 8, 8] == torch.tensor(BLUE)).all() and (
        batch.images[1, :, 8, 8] == torch.tensor((200, 30, 30))
    ).all()
    moved = batch.to("cpu")
    assert same(batch, moved) and moved.supervised == batch.supervised and moved.bad == ["x"]


def test_a_batch_without_images_carries_one_grey_picture_that_goes_nowhere(tmp_path):
    data = data_of(tmp_path, talk(tmp_path))
    batch = collate([data.sample(data.sources[0], 1, 0)] * 2, TOKENIZER.pad, V, 16)
    assert batch.images.shape == (1, 3, 16, 16) and (batch.images == 127).all()
    assert batch.image_positions.tolist() == [-1] * V and batch.supervised == 4


def test_what_is_too_long_is_cut_before_an_image_in_training_and_refused_elsewhere(tmp_path):
    table = talk(tmp_path)
    full = data_of(tmp_path, table).sample(data_of(tmp_path, table).sources[0], 0, 0)[0]
    for context in range(V + 2, len(full)):
        held = data_of(tmp_path, table, context=len(full))
        held.context = context
        with pytest.raises(BadInput, match=f"record 0: .* context of {context}"):
            held.sample(held.sources[0], 0, 0)
        train = data_of(tmp_path, table, train=True, context=len(full))
        train.context = context
        try:
            tokens, targets, pictures = train.sample(train.sources[0], 0, 0)
        except BadInput:
            assert context < full.index(IMAGE) + V + 11
            continue  # no answer left
        assert tokens == full[:context] and len(pictures) == 1 and tokens.count(IMAGE) == V
    for cut in range(1, 9):
        kept = truncate([5, IMAGE, IMAGE, 6, IMAGE, IMAGE, 7, 8], cut)
        assert [5, IMAGE, IMAGE, 6, IMAGE, IMAGE, 7, 8][:kept].count(
            IMAGE
        ) % 2 == 0 and cut - 2 < kept <= cut


def test_an_unreadable_sample_is_replaced_by_the_next_number_counted_and_named(tmp_path):
    table = vqa_list(tmp_path, 12, "v", noise=True)
    for i in (3, 4):
        (tmp_path / "im" / f"v{i}.png").write_bytes(b"not a picture")
    data = data_of(tmp_path, table, train=True, batch=12, window=1)
    rows = [n for _, n in data.rows(0).tolist()]
    [[batch]] = list(data.batches(0, 1))
    asked = [int(TOKENIZER.decode(row).split("q ")[1].split()[0]) for row in batch.tokens.tolist()]
    assert asked == [{3: 5, 4: 5}.get(n, n) for n in rows]
    assert (
        data.bad == len(batch.bad) == 3 and sum("v3.png" in sentence for sentence in batch.bad) == 1
    )
    assert all("record" in sentence and "v.json" in sentence for sentence in batch.bad)


def test_an_index_is_kept_between_starts_and_made_anew_when_its_file_changes(tmp_path, monkeypatch):
    table = vqa_list(tmp_path, 5, "v")
    assert data_of(tmp_path, table).counts == {"v": 5}
    monkeypatch.setattr(formats.json_index, "scan", lambda *a: pytest.fail("scanned again"))
    assert data_of(tmp_path, table).counts == {"v": 5}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vqa_list(tmp_path, 6, "v")
    os.utime(tmp_path / "v.json", (1, 1))
    formats.files.opened.cache_clear()
    assert data_of(tmp_path, table).counts == {"v": 6}
    for index in (tmp_path / "cache").rglob("*.npz"):
        index.write_bytes(b"torn")
    assert data_of(tmp_path, table).counts == {"v": 6}


def test_json_is_found_by_position_whatever_its_layout_and_letters(tmp_path):
    png(tmp_path / "im" / "é.png")
    records = [
        {"image": "é.png", "question": f'naïve {i} 漢 \\ " [{{ 🙂?', "answers": ["ü"]}
        for i in range(3)
    ]
    for text in (
        json.dumps(records, indent=3),
        json.dumps(records, ensure_ascii=False),
        "\ufeff" + json.dumps(records),
        "\n".join(json.dumps(r, ensure_ascii=False) for r in records),
        "\r\n".join(map(json.dumps, records)) + "\r\n",
    ):
        (tmp_path / "v.json").write_bytes(text.encode())
        data = data_of(
            tmp_path, {"name": "v", "format": "vqa", "annotations": "v.json", "images": "im"}
        )
        assert [item.text for item in data.samples()] == [r["question"] for r in records]
        assert [item.answers for item in data.samples()] == [["ü"]] * 3


def test_relative_paths_are_relative_to_the_mixture_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    table = (
        vqa_list(tmp_path / "deep", 2, "v") if (tmp_path / "deep" / "im").mkdir() is None else None
    )
    toml = mixture(tmp_path / "deep", table)
    monkeypatch.chdir(tmp_path)
    assert (
        [len(s) for s in load_mixture("deep/mix.toml")]
        == [len(s) for s in load_mixture(toml)]
        == [2]
    )
