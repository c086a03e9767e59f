"""Our own checkpoint directory: round trips, interruption at every point, damage; and the way back to transformers."""

import json
import os
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from transformers import LlamaForCausalLM

import support.files
import weights
import weights.checkpoint
import weights.files
import weights.llama
from iaa import grow
from model import Config, InfMLLM, LlamaConfig, ViTConfig, init
from support.errors import BadInput


def tiny(seed=0):
    return init(
        InfMLLM(Config(ViTConfig(32, 8, 16, 1, 2, 24), LlamaConfig(30, 16, 1, 2, 1, 24), grid=2)),
        seed,
    )


def same(a, b):
    return all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.parameters(), b.parameters())
    )


class Tokens:
    bytes = b"a sentencepiece model"


def test_what_is_saved_is_what_is_loaded_in_its_own_dtypes(tmp_path):
    m = tiny()
    m.vit.to(torch.bfloat16)
    weights.checkpoint.save(
        tmp_path / "c", m, Tokens, {"stage": 1}, {"x.exp_avg": torch.ones(3)}, {"step": 7}
    )
    again = weights.checkpoint.load(tmp_path / "c")
    assert same(m, again) and again.config == m.config
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == Tokens.bytes
    assert support.files.read_json(tmp_path / "c" / "state.json") == {"step": 7}
    assert torch.equal(
        weights.files.load_tensors(tmp_path / "c" / "optimizer.safetensors")["x.exp_avg"],
        torch.ones(3),
    )
    assert json.loads((tmp_path / "c" / "config.json").read_text())["training"] == {"stage": 1}
    assert weights.checkpoint.load(tmp_path / "c", image_size=64).config.vit.image_size == 64
    assert (
        next(weights.checkpoint.load(tmp_path / "c", dtype=torch.float64).parameters()).dtype
        == torch.float64
    )


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(num_key_value_heads=2),
        dict(tie_word_embeddings=True),
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ],
)
def test_an_exported_language_model_gives_the_same_logits_in_transformers(changed, tmp_path):
    ours = weights.llama.load_llama(oracle.folder(oracle.llama(**changed), tmp_path / "in"))
    weights.llama.export_llama(ours, tmp_path / "out")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 96, (2, 60))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.head(ours(tokens))).abs().max() < 2e-5
    again = weights.llama.load_llama(tmp_path / "out")
    assert same(ours, again) and again.config == ours.config


def to_format_1(folder):
    """Rewrite a checkpoint as FORMAT 1 had it: the ViT's q, k, v as one matrix, a branch in the LLM's config."""
    config = json.loads((folder / "config.json").read_text())
    tensors = weights.files.load_tensors(folder / "model.safetensors")
    for name in sorted(n for n in tensors if n.startswith("vit.") and n.endswith(".k.weight")):
        block = name.removesuffix("k.weight")
        qkv = [tensors.pop(f"{block}{part}.weight") for part in "qkv"]
        tensors[f"{block}qkv.weight"] = torch.cat(qkv)
        tensors[f"{block}q_bias"] = tensors.pop(f"{block}q.bias")
        tensors[f"{block}v_bias"] = tensors.pop(f"{block}v.bias")
    config["format"] = 1
    del config["model"]["vit"]["prefix"]
    if branch := config.pop("branch", None):
        config["model"]["llm"]["branches"] = {branch["name"]: branch["after"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights.files.save_tensors(tensors, folder / "model.safetensors")
    sums = {
        n: weights.checkpoint.checksum(folder / n) for n in ("config.json", "model.safetensors")
    }
    (folder / "checksums.json").write_text(json.dumps(sums))


def test_checkpoints_of_format_1_load_branches_too(tmp_path):
    weights.save(tmp_path / "base", tiny())
    to_format_1(tmp_path / "base")
    base = weights.load(tmp_path / "base")
    assert same(base, tiny())
    assert weights.describe(tmp_path / "base") == (tiny().config, None)
    assert weights.base_of(tmp_path / "base") is None
    model = grow(base, "mm", [0])
    init(model.branch, 3)
    weights.save(tmp_path / "mm", model, base=tmp_path / "base")
    to_format_1(tmp_path / "mm")
    again = weights.load(tmp_path / "mm")
    assert same(model, again) and again.branch.after == [0]
    assert weights.describe(tmp_path / "mm") == (tiny().config, {"name": "mm", "after": [0]})
    assert weights.base_of(tmp_path / "mm") == tmp_path / "base"


class Killed(BaseException):
    pass


def interrupt(monkeypatch, after):
    """The `after`-th operation on the disk does not happen, nor does any that would follow."""
    left = [after]

    def guard(f):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return f(*args, **kwargs)

        return call

    for owner, name in (
        (weights.files, "save_file"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    return left


def test_a_save_interrupted_at_any_point_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path, monkeypatch
):
    old, new, seen = tiny(0), tiny(1), []
    for after in range(100):
        path = tmp_path / str(after) / "c"
        weights.checkpoint.save(path, old, Tokens)
        with monkeypatch.context() as patch:
            left = interrupt(patch, after)
            try:
                weights.checkpoint.save(path, new, Tokens)
            except Killed:
                pass
        found = weights.checkpoint.load(path)
        seen.append("new" if same(found, new) else "old" if same(found, old) else "neither")
        weights.checkpoint.save(path, new, Tokens)  # and the next save clears up
        assert same(weights.checkpoint.load(path), new) and [
            p.name for p in path.parent.iterdir()
        ] == ["c"]
        if left[0] > 0:
            break
    assert after > 10 and set(seen) == {"old", "new"} and seen == sorted(seen, reverse=True), seen


def test_the_newest_whole_step_is_found(tmp_path):
    for step in (5, 40, 100):
        weights.checkpoint.save(tmp_path / f"step-{step:08d}", tiny(step))
    (tmp_path / "step-00000200").mkdir()  # one that never got its config
    assert weights.checkpoint.find(tmp_path).name == "step-00000100" and same(
        weights.checkpoint.load(tmp_path), tiny(100)
    )
    with pytest.raises(BadInput, match="no checkpoint here.*train.py"):
        weights.checkpoint.find(tmp_path / "nowhere")


def test_a_checkpoint_cut_or_flipped_anywhere_is_detected(tmp_path):
    weights.checkpoint.save(tmp_path / "c", tiny(), Tokens)
    rng = torch.Generator().manual_seed(0)
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        harms = [whole[: len(whole) * i // 20] for i in range(20)]
        for _ in range(20):
            at = torch.randint(0, 8 * len(whole), (1,), generator=rng).item()
            harms.append(
                whole[: at // 8] + bytes([whole[at // 8] ^ (1 << at % 8)]) + whole[at // 8 + 1 :]
            )
        for harm in harms:
            file.write_bytes(harm)
            try:
                weights.checkpoint.load(tmp_path / "c")
            except BadInput as e:
                assert "checksum" in str(e) or "JSON" in str(e)
            else:
                assert json.loads(harm) == json.loads(whole), (
                    f"{file.name} was harmed and loaded"
                )  # a blank, say
        file.unlink()
        with pytest.raises(BadInput):
            weights.checkpoint.load(tmp_path / "c")
        file.write_bytes(whole)
    sums = json.loads((tmp_path / "c/checksums.json").read_text())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "c/checksums.json").write_text(
            json.dumps({k: v for k, v in sums.items() if k != name})
        )
        with pytest.raises(BadInput, match=f"{name}: is not what was written"):
            weights.checkpoint.load(tmp_path / "c")
    (tmp_path / "c/checksums.json").write_text(
        json.dumps(sums | {"n" * 999: [0, 0]})
    )  # no system has such
    with pytest.raises(BadInput, match="is not what was written"):
        weights.checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("harm", ["empty", "text", "cut", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_broken_foreign_files_are_one_sentence_with_file_and_remedy(name, harm, tmp_path):
    oracle.folder(oracle.llama(), tmp_path)
    if name.endswith(".bin"):
        torch.save(oracle.llama().state_dict(), tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    file = tmp_path / name
    raw = file.read_bytes()
    file.unlink()
    if harm == "folder":
        file.mkdir()
    else:
        file.write_bytes(
            {"empty": b"", "text": b"<html>not found</html>", "cut": raw[: len(raw) // 2]}[harm]
        )
    with pytest.raises(BadInput) as e:
        weights.llama.load_llama(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_weights_that_are_no_floats_are_refused_by_name(tmp_path):
    oracle.folder(oracle.llama(), tmp_path)
    tensors = weights.files.load_tensors(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
    weights.files.save_tensors(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        BadInput, match="model.norm.weight: misshapen, .48. of torch.int32 for our norm.weight"
    ):
        weights.llama.load_llama(tmp_path)


def test_a_strangers_names_are_said_without_the_commands_in_them(tmp_path):
    oracle.folder(oracle.llama(), tmp_path)
    tensors = weights.files.load_tensors(tmp_path / "model.safetensors")
    weights.files.save_tensors(
        tensors | {"a\n\x1b[2Jb": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(BadInput, match=r"\(a  \[2Jb: left over"):
        weights.llama.load_llama(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("vocab_size", 2**30),
        ("intermediate_size", 2**21),
        ("num_hidden_layers", 2.0),
    ],
)
def test_a_config_of_a_billion_layers_and_the_like_is_refused_before_any_is_made(
    tmp_path, monkeypatch, key, value
):
    oracle.folder(oracle.llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    monkeypatch.setattr(weights.llama, "on_meta", None)
    with pytest.raises(BadInput, match="config.json"):
        weights.llama.load_llama(tmp_path)


def test_shards_are_found_by_their_names_and_what_a_lost_one_held_is_named(tmp_path):
    folder = oracle.folder(oracle.llama(), tmp_path)
    whole = weights.llama.load_llama(folder)
    tensors = weights.files.load_tensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for n, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = tmp_path / f"model-0000{n}-of-00002.safetensors"
        weights.files.save_tensors({name: tensors[name] for name in names}, shard)
    assert same(whole, weights.llama.load_llama(folder))
    shard.unlink()
    with pytest.raises(BadInput, match="tensors do not fit .*: missing, nothing in the file"):
        weights.llama.load_llama(folder)


def test_whole_numbers_that_are_dropped_may_lie_in_a_file_of_weights(tmp_path):
    """The hub's CLIP has its position_ids."""
    folder = oracle.folder(oracle.clip(), tmp_path)
    tensors = weights.files.load_tensors(tmp_path / "model.safetensors")
    ids = {"embeddings.position_ids": torch.arange(17)[None]}
    whole = weights.load_vit(folder)
    weights.files.save_tensors(tensors | ids, tmp_path / "model.safetensors")
    assert same(whole, weights.load_vit(folder))
