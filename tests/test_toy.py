"""The toy world: what is said about a scene is true, by a second reading of its objects and by its pixels."""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tools.backbones
import toy
from data import Data
from support.errors import BadInput
from text import Tokenizer
from text.boxes import parse_box

ROOT = Path(__file__).parent.parent
SCENES = [toy.scene(0, split, n) for split in toy.SPLITS for n in range(250)]
COLOUR, SHAPE, SIZE = (
    "red|green|blue|yellow|purple|cyan",
    "circle|square|triangle|cross",
    "small|large",
)


def objects(scene):
    """A scene as plain dictionaries; all that the checker below knows."""
    return [
        {"colour": t.colour, "shape": t.shape, "size": t.size, "x": t.cx, "y": t.cy, "box": t.box}
        for t in scene.things
    ]


def named(things, text):
    """The objects that the words of a phrase describe."""
    words = text.split()
    pick = lambda key, names: [
        t for t in things if not (set(words) & set(names.split("|"))) or t[key] in words
    ]
    return [
        t for t in pick("colour", COLOUR) if t in pick("shape", SHAPE) and t in pick("size", SIZE)
    ]


def answer(things, question):
    """The answer to a question, worked out from its text alone; None if it is not understood or not answerable."""
    q, yes = question.lower().rstrip("?"), lambda truth: "yes" if truth else "no"
    singular = re.sub("crosses", "cross", re.sub(r"(circle|square|triangle|object)s\b", r"\1", q))
    if q.startswith("how many"):
        return str(len(named(things, singular)))
    if q.startswith("is there"):
        return yes(named(things, q))
    if found := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)", q):
        [a], [b] = named(things, found[1]), named(things, found[3])
        return yes(
            {
                "left of": a["x"] < b["x"],
                "right of": a["x"] > b["x"],
                "above": a["y"] < b["y"],
                "below": a["y"] > b["y"],
            }[found[2]]
        )
    if found := re.fullmatch(r"is the (.+) in the (left|right|upper|lower) half", q):
        [a], middle = named(things, found[1]), toy.SIDE / 2
        return yes(
            {
                "left": a["x"] < middle,
                "right": a["x"] > middle,
                "upper": a["y"] < middle,
                "lower": a["y"] > middle,
            }[found[2]]
        )
    if found := re.fullmatch(r"what (colour|shape|size) is the (.+)", q):
        [a] = named(things, found[2])
        return a[found[1]]
    return None


def test_scenes_are_within_the_world_and_nothing_touches():
    for scene in SCENES:
        pairs = [(t.colour, t.shape) for t in scene.things]
        assert 1 <= len(pairs) == len(set(pairs)) <= 4
        for t in scene.things:
            low, high = toy.SIZES[t.size]
            assert low - 0.01 <= t.r <= high + 0.01 and 7.5 <= t.r <= 15
            assert 0 < t.box[0] < t.box[2] < 64 and 0 < t.box[1] < t.box[3] < 64
        for a in scene.things:
            for b in scene.things:
                apart = (
                    a.box[2] < b.box[0]
                    or b.box[2] < a.box[0]
                    or a.box[3] < b.box[1]
                    or b.box[3] < a.box[1]
                )
                assert a is b or apart
    assert set(Counter(len(s.things) for s in SCENES)) == {1, 2, 3, 4}


def test_a_scene_is_a_function_of_seed_split_and_number_and_no_two_are_alike():
    assert toy.scene(0, "train", 7) == toy.scene(0, "train", 7) and toy.scene(
        0, "train", 7
    ) != toy.scene(1, "train", 7)
    again = [toy.scene(0, split, n).things for split in toy.SPLITS for n in range(2000)]
    assert len(set(again)) == len(again)  # train and held-out scenes never meet
    pictures = {hashlib.sha1(toy.draw(s).tobytes()).digest() for s in SCENES}
    assert len(pictures) == len(SCENES)


def test_held_back_pairs_are_neither_shown_nor_named_before_the_compositional_split():
    unseen = {f"{colour} {shape}" for colour, shape in toy.UNSEEN}
    for scene in SCENES:
        shown = {t.name for t in scene.things} & unseen
        assert bool(shown) == (scene.split == "compositional")
        if scene.split != "compositional":
            said = json.dumps(list(toy.records(scene, 0)))
            assert not [pair for pair in unseen if pair in said]
    others = {(t.colour, t.shape) for s in SCENES if s.split == "train" for t in s.things}
    assert others == set(toy.PAIRS) - set(
        toy.UNSEEN
    )  # every colour and every shape is known, apart


def test_pixels_inside_a_box_hold_the_objects_colour_and_none_of_it_lies_outside():
    for scene in SCENES[::5]:
        pixels = np.asarray(toy.draw(scene)).astype(int)
        for t in scene.things:
            near = np.abs(pixels - toy.COLOURS[t.colour]).max(-1) < 40
            x1, y1, x2, y2 = t.box
            inside = near[math.ceil(y1) : math.floor(y2), math.ceil(x1) : math.floor(x2)]
            filled = {"circle": 0.78, "square": 1, "triangle": 0.5, "cross": 0.59}[
                t.shape
            ]  # of its box, by geometry
            assert abs(inside.mean() - filled) < 0.2, (t, inside.mean())
            same = [o for o in scene.things if o.colour == t.colour]
            for o in same:
                near[
                    math.floor(o.box[1]) : math.ceil(o.box[3]),
                    math.floor(o.box[0]) : math.ceil(o.box[2]),
                ] = False
            assert not near.any()
            if len(same) == 1:  # the box is tight: colour reaches every side
                soft = np.abs(pixels - scene.ground).max(-1) > 25
                rows = soft[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)]
                edges = rows[:2].any(), rows[-2:].any(), rows[:, :2].any(), rows[:, -2:].any()
                assert all(edges), (t, edges)


def test_captions_name_every_object_once_from_left_to_right():
    for scene in SCENES:
        said = re.findall(rf"a ({SIZE}) ({COLOUR}) ({SHAPE})", toy.caption(scene))
        there = [
            (o["size"], o["colour"], o["shape"])
            for o in sorted(objects(scene), key=lambda o: o["x"])
        ]
        assert said == there
        assert (
            len(toy.caption(scene).replace(",", "").split()) <= 50
        )  # the captions of training are cut there


def test_every_answer_is_what_a_second_reading_of_the_scene_gives():
    kinds = Counter()
    for scene in SCENES:
        for kind, question, said in toy.questions(scene, random.Random(scene.number)):
            assert answer(objects(scene), question) == said, (scene, question)
            kinds[kind] += 1
    assert (
        set(kinds)
        == {
            "colour",
            "shape",
            "size",
            "count",
            "exists",
            "exists-colour",
            "exists-shape",
            "left",
            "right",
            "above",
            "below",
            "half",
        }
        and min(kinds.values()) > 300
    )


def test_no_answer_can_be_guessed_from_its_question_type():
    said = {}
    for n in range(1500):
        for kind, _, a in toy.questions(toy.scene(3, "train", n), random.Random(n)):
            said.setdefault(kind, Counter())[a] += 1
    for kind, counts in said.items():
        share = counts.most_common(1)[0][1] / sum(counts.values())
        limit = {"colour": 0.3, "shape": 0.4, "count": 0.6, "size": 0.62, "exists-shape": 0.6}.get(
            kind, 0.56
        )  # small fits
        assert share < limit, (kind, counts)


def test_every_phrase_singles_out_exactly_its_object():
    for scene in SCENES:
        for phrase, thing in toy.phrases(scene):
            assert [o["box"] for o in named(objects(scene), phrase)] == [thing.box], (phrase, scene)
        assert {t for _, t in toy.phrases(scene)} == set(scene.things)


def test_conversations_mix_kinds_and_are_true():
    for scene in SCENES:
        things, turns = objects(scene), toy.conversation(scene, random.Random(scene.number))
        assert 3 <= len(turns) <= 5
        for kind, question, said in turns:
            if kind == "caption":
                assert said.lower().rstrip(".") == toy.caption(scene)
            elif kind == "ground":
                [thing] = named(things, question.rstrip("?"))
                assert np.allclose(parse_box(said), np.array(thing["box"]) / 64, atol=0.0051)
            elif kind == "region":
                box = np.array(parse_box(question)) * 64
                [thing] = [t for t in things if np.allclose(box, t["box"], atol=0.4)]
                assert said == f"A {thing['size']} {thing['colour']} {thing['shape']}."
            else:
                assert answer(things, question) in re.split(r"\W+", said.lower())


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    assert toy.write(out, seed=5, scenes=40)
    return out


def digest(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(world, tmp_path):
    for order in ("1", "2"):  # of sets of strings, which Python draws anew for every process
        subprocess.run(
            [sys.executable, ROOT / "toy.py", "--seed=5", "--scenes=40", "--out", tmp_path / order],
            env=os.environ | {"PYTHONHASHSEED": order},
            check=True,
        )
        assert digest(world) == digest(tmp_path / order)
    toy.write(tmp_path / "other", seed=6, scenes=40)
    assert not set(digest(world).values()) & {
        v for k, v in digest(tmp_path / "other").items() if k.endswith("json")
    }


def test_every_mixture_reads_and_says_what_the_scene_says(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer, names = (
        Tokenizer(ROOT / "assets/toy"),
        {"stage1", "stage2", "stage3", "heldout", "compositional"},
    )
    assert {p.stem for p in world.glob("*.toml")} == names
    for name in names:
        split = name if name in toy.SPLITS else "train"
        data = Data(world / f"{name}.toml", tokenizer, 64, 16, 256, batch=8, train=split == "train")
        for [batch] in data.batches(0, 3):
            assert (
                batch.bad == [] and batch.supervised > 8 and batch.images.shape[1:] == (3, 64, 64)
            )
        for item in data.samples():
            number = int(
                item.fields["key"] if item.source == "shards" else Path(item.refs[0][0]).stem
            )
            scene = toy.scene(5, split, number)
            assert (np.asarray(item.images[0]) == np.asarray(toy.draw(scene))).all()
            if item.task == "caption":
                assert item.answers == [toy.caption(scene)]
            if item.task == "vqa":
                assert (
                    set(item.answers) == {answer(objects(scene), item.text)} and item.fields["type"]
                )
            if item.task == "ground":
                assert named(objects(scene), item.text)[0]["box"] == item.box
            if item.task == "region":
                assert named(objects(scene), item.text)[0]["box"] == item.box
            if item.task == "chat":
                assert len(item.fields["types"]) == len(item.turns)


def test_a_writing_that_was_killed_is_done_again_and_a_finished_one_is_left_alone(
    world, tmp_path, monkeypatch
):
    before = (world / "toy.json").stat().st_mtime_ns
    assert (
        not toy.write(world, seed=5, scenes=40)
        and (world / "toy.json").stat().st_mtime_ns == before
    )
    (tmp_path / "w.part99").mkdir()  # what a killed run leaves lies beside
    assert toy.write(tmp_path / "w", seed=5, scenes=10) and toy.write(
        tmp_path / "w", seed=5, scenes=12
    )
    assert len(list((tmp_path / "w" / "train" / "images").iterdir())) == 12
    assert not (tmp_path / f"w.part{os.getpid()}").exists()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(toy, "write_split", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        toy.write(tmp_path / "killed", scenes=3)
    assert not (tmp_path / "killed").exists() and toy.write(tmp_path / "killed", scenes=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(BadInput, match="not a toy world"):
        toy.write(tmp_path / "mine", scenes=3)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_command_writes_a_world_and_refuses_nonsense_with_exit_code_2(tmp_path):
    run = lambda *flags: subprocess.run(
        [sys.executable, str(ROOT / "toy.py"), *flags], capture_output=True, text=True, cwd=tmp_path
    )
    done = run("--out", "w", "--scenes", "3")
    assert done.returncode == 0 and (tmp_path / "w" / "toy.json").is_file(), done.stderr
    failed = run("--scenes", "0")
    assert failed.returncode == 2 and failed.stderr == (
        "argument --scenes: '0' is no number from 1; --help lists the flags\n"
    )


def test_the_shipped_tokenizer_is_what_the_code_trains(tmp_path):
    tools.backbones.train_tokenizer(tmp_path / "tokenizer.model")
    trained, shipped = Tokenizer(tmp_path), Tokenizer(ROOT / "assets/toy")
    vocabulary = lambda t: [t.model.id_to_piece(i) for i in range(t.size)]
    assert vocabulary(trained) == vocabulary(shipped)
    for text in tools.backbones.texts(seed=9, scenes=30):
        assert shipped.decode(shipped.encode(text)) == text and trained.encode(
            text
        ) == shipped.encode(text)
    box = [
        shipped.model.id_to_piece(i) for i in shipped.encode("<box>(0.12,0.34),(1.00,0.00)</box>")
    ]
    assert box == ["▁", "<box>(", "0.12", ",", "0.34", "),(", "1.00", ",", "0.00", ")</box>"]
    for word in f"{COLOUR}|{SHAPE}|{SIZE}|yes|no|left|right|above|below".split("|"):
        assert shipped.model.encode(word, out_type=str) == [f"▁{word}"], word
