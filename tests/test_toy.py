"""The toy world: what is said about a scene is true, by a second reading of its things and by its pixels."""

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tiny import ROOT

import toy
from data import Data
from support.errors import BadInput
from text import Tokenizer
from text.boxes import parse_box

SCENES = [toy.scene(0, split, n) for split in toy.SPLITS for n in range(250)]
COLOURS = "red|green|blue|yellow|purple|cyan"
SHAPES = "circle|square|triangle|cross"
WAYS = {  # a word of a question: the coordinate, and its sign that way
    "left": ("cx", -1),
    "right": ("cx", 1),
    "above": ("cy", -1),
    "upper": ("cy", -1),
    "below": ("cy", 1),
    "lower": ("cy", 1),
}


def named(scene, text):
    """The things that every colour, shape and size in a text fits."""
    words = set(re.sub(rf"({SHAPES})e?s\b", r"\1", text.lower().rstrip("?.")).split())
    things = scene.things
    for kind, names in (("colour", COLOURS), ("shape", SHAPES), ("size", "small|large")):
        said = words & set(names.split("|"))
        things = [t for t in things if not said or getattr(t, kind) in said]
    return things


def answer(scene, question):
    """The answer to a question, worked out from its text alone."""
    q = question.lower()
    if q.startswith("how many"):
        return str(len(named(scene, q)))
    if q.startswith("is there"):
        return "yes" if named(scene, q) else "no"
    if found := re.fullmatch(r"what (colour|shape|size) is the (.+)\?", q):
        [a] = named(scene, found[2])
        return getattr(a, found[1])
    ways = "|".join(WAYS)
    first, way, second = re.fullmatch(rf"is the (.+?) (?:in the )?({ways})(.+)\?", q).groups()
    [a] = named(scene, first)
    axis, sign = WAYS[way]
    middle = 32
    if second != " half":
        [b] = named(scene, second)
        middle = getattr(b, axis)
    return "yes" if sign * getattr(a, axis) > sign * middle else "no"


def test_no_two_scenes_are_alike_each_lies_within_the_world_and_nothing_touches():
    assert len({scene.things for scene in SCENES}) == len(SCENES)
    assert {len(scene.things) for scene in SCENES} == {1, 2, 3, 4}
    for scene in SCENES:
        assert len({t.name for t in scene.things}) == len(scene.things)
        for t in scene.things:
            low, high = {"small": (7.5, 9.5), "large": (12, 15)}[t.size]
            assert low <= t.r <= high and 0 < min(t.box) and max(t.box) < 64
        for a, b in combinations(scene.things, 2):
            left, upper, right, lower = a.box
            x1, y1, x2, y2 = b.box
            assert right < x1 or x2 < left or lower < y1 or y2 < upper


def test_held_back_pairs_are_neither_shown_nor_named_before_the_compositional_split():
    unseen = {f"{colour} {shape}" for colour, shape in toy.UNSEEN}
    for scene in SCENES:
        if scene.split == "compositional":
            assert unseen & {t.name for t in scene.things}
        else:
            said = json.dumps(list(toy.records(scene, 0)))
            assert not any(pair in said for pair in unseen)
    trained = {(t.colour, t.shape) for s in SCENES[:250] for t in s.things}
    assert trained == set(toy.PAIRS) - set(toy.UNSEEN)  # each colour and shape is known, apart


def test_the_pixels_of_a_colour_fill_its_box_as_the_shape_does_and_reach_every_side():
    filled = {"circle": 0.78, "square": 1, "triangle": 0.5, "cross": 0.59}  # by geometry
    for scene in SCENES[::5]:
        pixels = np.asarray(toy.draw(scene)).astype(int)
        colours = [t.colour for t in scene.things]
        for t in scene.things:
            if colours.count(t.colour) == 1:
                ys, xs = (np.abs(pixels - toy.COLOURS[t.colour]).max(-1) < 40).nonzero()
                found = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
                assert found == pytest.approx(t.box, abs=3), t
                x1, y1, x2, y2 = t.box
                share = len(xs) / (x2 - x1) / (y2 - y1)
                assert share == pytest.approx(filled[t.shape], abs=0.2), t


def test_captions_name_every_thing_once_from_left_to_right():
    for scene in SCENES:
        said = toy.caption(scene)
        names = [f"{t.size} {t.colour} {t.shape}" for t in sorted(scene.things, key=lambda t: t.cx)]
        assert re.findall(rf"a (\w+ (?:{COLOURS}) (?:{SHAPES}))", said) == names
        assert len(said.split()) <= 50  # where the captions of training are cut


def test_every_answer_is_true_and_none_can_be_guessed_from_its_type():
    said = {}
    for scene in SCENES + [toy.scene(3, "train", n) for n in range(1000)]:
        for kind, question, told in toy.questions(scene, random.Random(scene.number)):
            assert answer(scene, question) == told, (scene, question)
            said.setdefault(kind, Counter())[told] += 1
    assert len(said) == 12
    most = {"colour": 0.3, "shape": 0.4, "size": 0.62}
    for kind, counts in said.items():
        assert counts.total() > 600
        assert max(counts.values()) / counts.total() < most.get(kind, 0.56), (kind, counts)


def test_every_phrase_singles_out_exactly_its_thing():
    for scene in SCENES:
        for phrase, thing in toy.phrases(scene):
            assert named(scene, phrase) == [thing], (phrase, scene)
        assert {thing for _, thing in toy.phrases(scene)} == set(scene.things)


def test_conversations_mix_kinds_and_are_true():
    for scene in SCENES:
        turns = toy.conversation(scene, random.Random(scene.number))
        assert 3 <= len(turns) <= 5
        for kind, question, said in turns:
            if kind == "caption":
                assert said.lower() == toy.caption(scene) + "."
            elif kind in ("ground", "region"):
                phrase, box = (question, said) if kind == "ground" else (said, question)
                [thing] = named(scene, phrase)
                assert np.allclose(parse_box(box), np.array(thing.box) / 64, atol=0.0051)
            else:
                assert answer(scene, question) in re.split(r"\W+", said.lower())


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    assert toy.write(out, seed=5, scenes=40)
    return out


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_command_writes_the_same_bytes_for_a_seed_and_refuses_nonsense(
    written, tmp_path, monkeypatch
):
    command = [sys.executable, ROOT / "toy.py", "--seed=5", "--scenes=40", "--out=again"]
    env = os.environ | {"PYTHONHASHSEED": "1"}  # the order of sets of strings, else drawn by Python
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    assert contents(tmp_path / "again") == contents(written)
    assert toy.scene(5, "train", 0) != toy.scene(6, "train", 0)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--scenes", "0"])
    with pytest.raises(BadInput, match="--scenes: '0' is no number from 1"):
        toy.main()


def test_every_mixture_reads_and_says_what_the_scene_says(written):
    for name in ("stage1", "stage2", "stage3", "heldout", "compositional"):
        split = name if name in toy.SPLITS else "train"
        data = Data(written / f"{name}.toml", Tokenizer(ROOT / "assets/toy"), 64, 16, 256)
        for item in data.samples():
            number = item.fields["key"] if item.source == "shards" else Path(item.refs[0][0]).stem
            scene = toy.scene(5, split, int(number))
            assert item.images[0].tobytes() == toy.draw(scene).tobytes()
            if item.task == "caption":
                assert item.answers == [toy.caption(scene)]
            elif item.task == "vqa":
                assert set(item.answers) == {answer(scene, item.text)} and item.fields["type"]
            elif item.task == "chat":
                assert len(item.fields["types"]) == len(item.turns)
            else:  # ground, region
                assert named(scene, item.text)[0].box == item.box


def test_a_writing_that_was_killed_is_done_again_and_what_is_there_is_left_alone(
    tmp_path, monkeypatch
):
    out, mine = tmp_path / "w", tmp_path / "mine"
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(toy, "write_mixture", None)  # it dies at the end
        toy.write(out, scenes=5)
    assert not out.exists() and toy.write(out, scenes=5)
    assert not toy.write(out, scenes=5)
    assert toy.write(out, scenes=6) and len(list(out.glob("train/images/*"))) == 6
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(BadInput, match="not a toy world"):
        toy.write(mine, scenes=3)
    assert os.listdir(mine) == ["thesis.txt"] and set(os.listdir(tmp_path)) == {"w", "mine"}


def test_of_two_that_draw_one_world_at_once_the_first_is_kept_and_both_end_well(
    tmp_path, monkeypatch
):
    out, drawn = tmp_path / "w", []

    def overtaken(*args):  # the other begins and ends while this one draws
        monkeypatch.undo()
        other = multiprocessing.get_context("fork").Process(target=toy.write, args=(out, 0, scenes))
        other.start()
        other.join()
        drawn.append(os.stat(out).st_ino)
        toy.write_mixture(*args)

    for scenes in (5, 6):  # where nothing is, and in place of another world
        monkeypatch.setattr(toy, "write_mixture", overtaken)
        assert not toy.write(out, scenes=scenes)
        assert os.stat(out).st_ino == drawn.pop() and os.listdir(tmp_path) == ["w"]
        assert len(list(out.glob("train/images/*"))) == scenes
