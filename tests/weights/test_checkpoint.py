"""Our own checkpoint directory: round trips, interruption at every point, older formats."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import model, same

import weights
import weights.checkpoint
import weights.files
from iaa import grow
from model import init
from support.errors import BadInput
from support.files import read_json
from weights.checkpoint import load, save


class Tokens:
    files = {"tokenizer.model": b"a sentencepiece model", "more.json": b"{}"}


def test_what_is_saved_is_what_is_loaded_in_its_own_dtypes(tmp_path):
    m = model()
    m.vit.to(torch.bfloat16)
    folder = tmp_path / "c"
    save(folder, m, Tokens, {"stage": 1}, {"x.exp_avg": torch.ones(3)}, {"step": 7})
    again = load(folder)
    assert same(m, again) and again.config == m.config
    assert {name: (folder / name).read_bytes() for name in Tokens.files} == Tokens.files
    assert read_json(folder / "state.json") == {"step": 7}
    assert read_json(folder / "config.json")["training"] == {"stage": 1}
    optimizer = weights.files.load_tensors(folder / "optimizer.safetensors")
    assert torch.equal(optimizer["x.exp_avg"], torch.ones(3))
    assert load(folder, image_size=32).config.vit.image_size == 32
    assert same(load(folder, dtype=torch.float64), m.double())


def written_as_format_1(path, value):
    """weights.checkpoint.write_json as it was: a branch stood in the LLM's config."""
    if path.name == "config.json":
        value["format"] = 1
        del value["model"]["vit"]["prefix"]
        if "branch" in value:
            branch = value.pop("branch")
            value["model"]["llm"]["branches"] = {branch["name"]: branch["after"]}
    path.write_text(json.dumps(value))


def test_checkpoints_of_format_1_load_branches_too(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.checkpoint, "write_json", written_as_format_1)
    m = model()
    tensors = dict(m.named_parameters())
    for number in range(2):  # the ViT had q, k and v as one matrix
        block = f"vit.blocks.{number}"
        qkv = [tensors.pop(f"{block}.{part}.weight") for part in "qkv"]
        tensors[f"{block}.qkv.weight"] = torch.cat(qkv)
        for part in "qv":
            tensors[f"{block}.{part}_bias"] = tensors.pop(f"{block}.{part}.bias")
    save(tmp_path / "base", (m, tensors))
    base = load(tmp_path / "base")
    assert same(base, m)
    assert weights.describe(tmp_path / "base") == (m.config, None)
    branched = grow(base, "mm", [0])
    init(branched.branch, 3)
    save(tmp_path / "mm", branched, base=tmp_path / "base")
    assert same(load(tmp_path / "mm"), branched)
    assert weights.describe(tmp_path / "mm") == (m.config, {"name": "mm", "after": [0]})


class Killed(BaseException):
    pass


def interrupt(monkeypatch, after):
    """The `after`-th operation on the disk does not happen, nor does any that would follow; -> how many are left."""
    left = [after]

    def guard(f):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return f(*args, **kwargs)

        return call

    for name in ("write_text", "write_bytes", "rename", "mkdir"):
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))
    monkeypatch.setattr(weights.files, "save_file", guard(weights.files.save_file))
    monkeypatch.setattr(shutil, "rmtree", guard(shutil.rmtree))
    monkeypatch.setattr(os, "fsync", guard(lambda handle: None))  # no power is cut here
    return left


def test_a_save_interrupted_at_any_point_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path, monkeypatch
):
    old, new = model(0), model(1)
    path = tmp_path / "c"
    seen = []
    left = [0]
    while left[0] <= 0:
        save(path, old, Tokens)
        with monkeypatch.context() as patch:
            left = interrupt(patch, len(seen))
            try:
                save(path, new, Tokens)
            except Killed:
                pass
        found = load(path)
        seen.append(same(found, new))
        assert seen[-1] or same(found, old)
        save(path, new, Tokens)  # and the next save clears up
        assert same(load(path), new) and os.listdir(tmp_path) == ["c"]
    assert 10 < len(seen) < 100 and seen == sorted(seen)
    assert not seen[0] and seen[-1]


def test_the_newest_whole_step_is_found(tmp_path):
    for step in (5, 40, 100):
        save(tmp_path / f"step-{step:08d}", model(step))
    (tmp_path / "step-00000200").mkdir()  # one that never got its config
    assert weights.find(tmp_path).name == "step-00000100"
    assert same(load(tmp_path), model(100))
    with pytest.raises(BadInput, match="no checkpoint here.*train.py"):
        weights.find(tmp_path / "nowhere")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_file_without_a_checksum_is_not_believed(lost, tmp_path):
    save(tmp_path, model())
    sums = read_json(tmp_path / "checksums.json")
    del sums[lost]
    weights.checkpoint.write_json(tmp_path / "checksums.json", sums)
    with pytest.raises(BadInput, match="is not what was written"):
        load(tmp_path)
