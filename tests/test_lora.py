"""LoRA: thin matrices beside an LLM's own; the base stays itself, and a merged model is a plain one."""

import copy
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import lora
import sample
import support.plan
import support.start
import train
import weights
import weights.merge
from support.errors import BadInput
from weights.checkpoint import add_branch, find, load, save

QUICK = "--workers 0 --batch 8 --log-every 1 --eval-rows 12 --score-rows 0 --eval-every 0"
ALL = list(lora.MATRICES)


def grown(on=ALL, rank=3, **changed):
    """A small model and low-rank matrices that have moved away from where they begin."""
    torch.manual_seed(4)
    m = lora.grow(tiny.network(**changed), rank, on)
    rng = torch.Generator().manual_seed(5)
    for p in m.branch.layers.parameters():
        p.data += torch.randn(p.shape, generator=rng) * 0.1
    return m


def plain(m):
    """The merged model in memory."""
    shapes, tensors = lora.merged(m)
    shapes.load_state_dict(tensors, assign=True)
    return shapes


# ---- what it computes ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_one_computes_the_bases_function_to_the_bit_and_is_the_same_for_a_seed():
    base, asked = tiny.network(), tiny.batch()[:2]
    fresh = lora.grow(tiny.network(), 4, ALL)
    assert torch.equal(fresh(*asked), base(*asked))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(lora.grow(tiny.network(), 4, ["q"]).llm.layers[1].q.low.down.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_it_is_w_x_plus_b_a_x_and_a_bias_stays():
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    low = lora.LowRank(linear, 2)
    low.up.weight.normal_()
    beside = lora.Beside(linear, low)
    want = linear(x) + x @ low.down.weight.T @ low.up.weight.T
    assert torch.allclose(beside(x), want, rtol=1e-5, atol=1e-6)
    assert set(beside.state_dict()) >= {"weight", "bias"} and beside.bias is linear.bias
    with pytest.raises(AssertionError, match="low-rank matrices already"):
        lora.grow(lora.grow(tiny.network(), 2, ["q"]), 2, ["q"])


@torch.no_grad()
@pytest.mark.parametrize("on", [*([name] for name in ALL), ALL])
def test_a_merged_model_says_the_same(on):
    m = grown(on)
    images, tokens, _ = tiny.batch()
    ours, theirs = m(images, tokens), plain(m)(images, tokens)
    before = tiny.network()(images, tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - before).abs().max() > 1e-2 * ours.abs().max()
    prompts = [[1, *tiny.IMG, 7, 8, 9], [1, *tiny.IMG, 11, 12]]
    for beams in (1, 3):
        said, wanted = (
            sample.generate_ids(model, images, prompts, max_new_tokens=9, eos=2, beams=beams)
            for model in (m, plain(m))
        )
        assert said == wanted


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_the_merged_models_and_nowhere_else(stage):
    m = grown().freeze(stage, "lora")
    own = set(m.branch.parameters())
    assert own == {p for p in m.parameters() if p.requires_grad}
    assert own == set(m.adapter.parameters()) | {
        p for name, p in m.named_parameters() if ".low." in name
    }
    same = plain(copy.deepcopy(m)).requires_grad_(True)
    gradients = []
    for recompute in (False, True):
        m.llm.recompute = recompute
        m.zero_grad()
        m(*tiny.batch()).backward()
        assert {p for p in m.parameters() if p.grad is not None} == own
        gradients.append([p.grad for p in own])
    assert all(map(torch.equal, *gradients))
    same(*tiny.batch()).backward()
    for name, module in m.named_modules():
        if isinstance(module, lora.Beside):
            g = same.get_parameter(f"{name}.weight").grad
            low = module.low
            for ours, want in (
                (low.up.weight.grad, g @ low.down.weight.T),
                (low.down.weight.grad, low.up.weight.T @ g),
            ):
                assert (ours - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize("on", [["q", "v"], ["k", "o", "down"], ALL])
def test_flops_equal_what_a_counter_counts(on):
    m = grown(on).freeze(2, "lora")
    images, tokens = tiny.pictures(1), tiny.rows([1, *tiny.IMG, *tiny.text(10)])
    targets = tokens.masked_fill(torch.arange(15) < 9, -100)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        m(images, tokens, targets).backward()
    ours = sum(support.plan.flops(m.config, 11, 6, 2, "lora", rank=3, on=on).values())
    # the counter takes causal attention for full and sees the head made again
    ours += 3 * 2 * 2 * 15 * 15 * 32 + 2 * 6 * 32 * 50
    assert counter.get_total_flops() == ours


# ---- training --------------------------------------------------------------------------------------------------------


def run(line):
    assert train.main(f"{QUICK} {line}".split()) == 0


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """out: six steps of stage 2 from `start`, every second one saved; in a copy of `world` to write into."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "plot", lambda folder: None)
        run(
            "--stage 2 --tune lora --rank 4 --lora-on down,q --init start --steps 6 --save-every 2 "
            "--keep 9 --out out/lora"
        )
    return folder


@pytest.fixture
def here(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(train, "plot", lambda folder: None)
    return tmp_path


def test_a_checkpoint_holds_the_matrices_and_the_adapter_alone_and_names_its_base(here):
    folder = find("out/lora")
    saved = weights.load_tensors(folder / "model.safetensors")
    adapter = [f"adapter.{name}" for name, _ in tiny.model().adapter.named_parameters()]
    own = [
        f"layers.{layer}.{on}.{side}.weight"
        for layer in (0, 1)
        for on in ("q", "down")
        for side in ("down", "up")
    ]
    assert set(saved) == {f"llm.branches.lora.{name}" for name in own + adapter}
    assert all(t.any() and t.dtype == torch.float32 for t in saved.values())
    assert weights.describe(folder)[1] == {"rank": 4, "on": ["q", "down"]}
    assert os.path.samefile(weights.base_of(folder), "start")
    assert tiny.same(load("start"), tiny.model())
    m = load(folder)
    for name, p in tiny.model().named_parameters():
        assert torch.equal(m.get_parameter(name), p) != name.startswith("adapter."), name


def test_it_goes_on_to_the_byte_after_a_stop_and_into_the_next_stage(here, capsys):
    whole, cut = Path("out/lora"), Path("out/cut")  # as deep: the base is named from where it lies
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step-00000004")
    shutil.rmtree(cut / "step-00000006")
    run(f"--stage 2 --resume --save-every 2 --keep 9 --out {cut}")
    assert "next: python train.py --stage 3 --tune lora --init" in capsys.readouterr().out
    for file in ("model.safetensors", "optimizer.safetensors", "config.json"):
        last = Path("step-00000006", file)
        assert (cut / last).read_bytes() == (whole / last).read_bytes()
    assert tiny.losses(cut) == tiny.losses(whole)

    run(f"--stage 3 --tune lora --steps 1 --init {whole} --out {here}/next")
    assert weights.describe(here / "next")[1] == {"rank": 4, "on": ["q", "down"]}
    assert os.path.samefile(weights.base_of(here / "next"), "start")


@pytest.mark.slow
def test_it_trains_alike_on_one_process_under_ddp_and_sharded(here):
    losses, saved = {}, {}
    for name, ranks, *more in (("one", 1), ("ddp", 2), ("shard", 2, "--shard")):
        argv = (
            "--stage 3 --tune lora --rank 4 --lora-on q,k,v,o,gate,up,down --steps 4 --dtype fp64"
        )
        argv = f"{argv} {QUICK} --init {os.getcwd()}/start --data {os.getcwd()}/out/toy/stage3.toml"
        argv = [*argv.split(), "--out", here / name, *more]
        codes = tiny.finish(tiny.start(here, *argv, world=ranks))
        assert codes == [0] * ranks, tiny.said(here)[-3000:]
        losses[name] = list(tiny.losses(here / name).values())
        saved[name] = weights.load_tensors(find(here / name) / "model.safetensors")
    for name in ("ddp", "shard"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-9)
        assert saved[name].keys() == saved["one"].keys()
        for key, t in saved["one"].items():
            assert torch.allclose(saved[name][key], t, rtol=1e-6, atol=1e-9), key


def test_a_base_that_is_pieced_together_is_written_beside_it(here, capsys):
    base = load("start")
    weights.export_llama(base.llm, here / "llm")
    flags = f"--stage 2 --tune lora --init start --llm {here}/llm --tokenizer {tiny.TOKENIZER}"
    run(f"{flags} --steps 1 --out {here}/o")
    assert f"is written to {here}/o/base" in capsys.readouterr().out
    assert tiny.same(load(here / "o/base").llm, base.llm)
    assert weights.describe(here / "o")[1] == {"rank": 16, "on": ["q", "v"]}
    assert tiny.same(load(here / "o/base").vit, load(here / "o").vit)


# ---- used ------------------------------------------------------------------------------------------------------------


def test_sampling_and_evaluation_take_it_alone_or_as_a_branch_of_its_base(here, capsys):
    common = "--data out/toy/heldout.toml --beams 1 --max-new-tokens 4 --limit 2 --json --out"

    def answers(ckpt, out):
        evaluate.main(f"--ckpt {ckpt} {common} {here / out}".split())
        return (here / out / "predictions.jsonl").read_text()

    assert answers("out/lora", "own") == answers("start --branch out/lora", "added")
    sample.main(
        "--ckpt out/lora --image out/toy/images/0.png --prompt hi --max-new-tokens 3".split()
    )
    with pytest.raises(BadInput, match="none: is neither a folder nor a branch .* has lora"):
        support.start.load_model("out/lora", device="cpu", branch="none")


@torch.no_grad()
def test_a_merged_model_needs_nothing_else(here, capsys):
    weights.merge.main(["out/lora", "--out", str(here / "merged")])
    assert "--ckpt" in capsys.readouterr().out
    m, merged = load("out/lora"), load(here / "merged")
    assert weights.base_of(here / "merged") is None and not hasattr(merged, "branch")
    asked = (torch.rand(2, 3, 16, 16), torch.tensor([[1] + tiny.IMG + [7, 8]] * 2))
    ours, theirs = m(*asked), merged(*asked)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert not torch.equal(merged.llm.layers[0].q.weight, load("start").llm.layers[0].q.weight)
    assert (
        support.start.load_model(here / "merged", device="cpu")[1].size == merged.config.llm.vocab
    )
    with torch.enable_grad():
        run(f"--stage 3 --init {here}/merged --steps 1 --out {here}/next")


def test_without_its_base_or_with_another_it_is_refused_in_a_sentence(here):
    alone = here / "far/away/lora"
    shutil.copytree(find("out/lora"), alone)
    with pytest.raises(BadInput, match="is a branch of .*start, .*--ckpt BASE --branch BRANCH"):
        load(alone)
    with pytest.raises(BadInput, match="is a branch of .*start, "):
        weights.merge.main([str(alone)])
    other = alone / weights.read_checked(alone, "config.json")["base"]["path"]
    save(Path(os.path.normpath(other)), tiny.model(1))
    with pytest.raises(BadInput, match="this model has other weights; take the base"):
        load(alone)
    with pytest.raises(BadInput, match="this model has other weights"):
        add_branch(load("out/lora"), "out/lora")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--init start --tune lora --lora-on x", "'x' names others than q, k, v, o, gate, up"),
        ("--init start --tune lora --lora-on q,", "'q,' names others than q"),
        ("--init start --tune lora --rank 0", "'0' is no number from 1"),
        ("--init start --rank 4", "--rank and --lora-on describe what --tune lora trains"),
        ("--init start --tune lora --branch mm", "describe what --tune inner trains"),
        ("--init start --tune lora --lr vit=1", "keeps the vit frozen"),
        ("--init out/lora", "is a branch, lora; --tune lora trains it on"),
        ("--init out/lora --tune inner", "is a branch, lora; --tune lora trains it on"),
        ("--init out/lora --tune lora --rank 8", "has LoRA of rank 4 on q, down; leave out --rank"),
        ("--out out/lora --resume --rank 8", "--rank: the run in out/lora has 4 and not 8"),
    ],
)
def test_flags_that_contradict_it_are_refused(flags, sentence, here, capsys):
    assert train.main(f"--stage 2 --out {here}/refused {flags}".split()) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_a_plan_counts_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = "--stage 3 --preset infmllm-7b --plan --gpus 1x24 --tune"
    assert train.main(f"{plan} lora --rank 16 --lora-on q,v".split()) == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 16 on q, v of every layer of the LLM" in said
    assert re.search(r"llm +8.39M +6.74B  fp32", said), said
    assert "vit               0   986.98M" in said
