"""Inner adaptors: a branch is a deeper LLaMA put together from the base's layers and its own; the base stays itself."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import IMG, TODAY, batch, network, pictures, rows, text
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import support.plan
import support.start
import tools.backbones
import train
import weights
from iaa import grow
from model import IGNORE
from sample import generate_ids
from support.errors import BadInput
from text.tokenizer import Tokenizer
from weights.checkpoint import add_branch, find, load, save

QUICK = "--workers 0 --batch 8 --log-every 1 --eval-rows 12 --score-rows 0 --eval-every 0"


def grown():
    """A base of three layers and its branch mm, all of whose weights have moved away from the base's."""
    m = grow(network(layers=3), "mm", [0, 2])
    rng = torch.Generator().manual_seed(5)
    for p in m.branch.parameters():
        p.data += torch.randn(p.shape, generator=rng) * 0.1
    return m


def deeper(m):
    """The same function as one plain model: a layer of the branch behind each layer of the base that it follows."""
    branch = m.branch
    plain = network(layers=5)
    plain.vit, plain.adapter = m.base.vit, branch.adapter
    first, second, third = m.base.llm.layers
    plain.llm.layers = nn.ModuleList([first, branch.layers[0], second, third, branch.layers[1]])
    plain.llm.embed, plain.llm.norm, plain.llm.lm_head = branch.embed, branch.norm, branch.lm_head
    return plain


# ---- what a branch computes ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbones", [{}, TODAY])
def test_a_new_branch_computes_the_bases_function_to_the_bit(backbones):
    m = network(**backbones)
    images, tokens, _ = batch()
    fresh = grow(m, "mm", [1])
    assert len(fresh.llm.layers) == 3
    assert torch.equal(fresh(images, tokens), m(images, tokens))
    assert set(fresh.branch.parameters()).isdisjoint(m.parameters())


def test_a_branch_is_the_deeper_model_in_loss_gradients_recomputation_and_planned_memory():
    m = grown().freeze(3, "inner")
    plain, own = deeper(m), list(m.branch.parameters())
    assert {p for p in m.parameters() if p.requires_grad} == set(own)
    losses, gradients = [], []
    for model, recompute in ((m, False), (plain, False), (m, True)):
        model.llm.recompute = recompute
        losses.append(model(*batch()))
        gradients.append(torch.autograd.grad(losses[-1], own))
    assert losses[0] == losses[1] == losses[2]
    for here, there, again in zip(*gradients):
        assert torch.equal(here, there) and torch.equal(here, again)
    s = SimpleNamespace(rows=3, text=40, recompute=False)
    assert support.plan.activations(m, s) == support.plan.activations(plain, s)


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_equal_what_a_counter_counts_in_a_branch(stage):
    model = grown().freeze(stage, "inner")
    tokens = rows([1] + IMG + text(10))
    targets = tokens.masked_fill(torch.arange(15) < 9, IGNORE)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pictures(1), tokens, targets).backward()
    ours = sum(support.plan.flops(model.config, 11, 6, stage, "inner", 2).values())
    # the counter takes causal attention for full and sees the head made again
    ours += 3 * 5 * 2 * 15 * 15 * 32 + 2 * 6 * 32 * 50
    assert counter.get_total_flops() == ours


@pytest.mark.parametrize(
    "mode", [{}, {"beams": 4, "length_penalty": 0.0}, {"temperature": 0.9, "seed": 3}]
)
def test_generation_in_a_branch_is_the_deeper_models_and_text_alone_is_the_bases(mode):
    m = grown()
    seen = [[1] + IMG + text(4), [1, 5] + IMG + text(9, 2), [1] + IMG + text(2, 3)]
    alone = [[1] + text(4), [1] + text(11, 2)]
    say = lambda model, asked, images: generate_ids(
        model, pictures(images), asked, max_new_tokens=9, **mode
    )
    assert say(m, seen, 3) == say(deeper(m), seen, 3) != say(m.base, seen, 3)
    assert say(m, alone, 0) == say(network(layers=3), alone, 0)
    with pytest.raises(AssertionError, match="two calls"):
        say(m, seen[:1] + alone, 1)


def test_what_the_shipped_llm_reads_is_measured_and_tuning_harms_it():
    assets = tiny.ROOT / "assets/toy"
    llm, settings = load(assets).llm, (Tokenizer(assets), assets / "slots.safetensors", 0, 12)
    loss, right = tools.backbones.reading(llm, *settings)
    assert loss < 0.4 and right > 0.9
    for layer in llm.layers:
        layer.q.weight.data *= 1.5
    assert tools.backbones.reading(llm, *settings)[0] > 2 * loss


# ---- what is saved and loaded ----------------------------------------------------------------------------------------


def run(command):
    return train.main([*QUICK.split(), *command.split()])


@pytest.fixture(scope="module")
def branches(world, tmp_path_factory):
    """Two branches of world/start that were trained: mm on captions and questions, chat on layer 1 and talk."""
    folder = tmp_path_factory.mktemp("branches")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        patch.setattr(train, "plot", lambda folder: None)
        common = "--tune inner --init start --steps 6 --lr 1e-2 --save-every 2 --keep 9"
        assert run(f"--stage 2 {common} --out {folder}/mm") == 0
        chat = "--stage 3 --branch chat --inner-layers 1"
        assert run(f"{chat} {common} --out {folder}/chat") == 0
    return folder


@torch.no_grad()
def test_text_alone_is_the_base_to_the_bit_whatever_branches_were_trained_and_loaded(
    here, branches
):
    base = load("start")
    mm = load(branches / "mm")
    chat = add_branch(mm, branches / "chat")
    again = add_branch(base, branches / "mm")
    assert chat.base is mm.base and again.base is base
    images, tokens = torch.zeros(1, 3, 16, 16), torch.tensor([[1, *IMG, 5, 6]])
    seen = []
    for m in (mm, chat, again):
        assert torch.equal(m.text_model.llm(tokens[:, 5:]), base.llm(tokens[:, 5:]))
        seen.append(m(images, tokens))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], base(images, tokens))


def test_a_branch_trains_whole_and_its_checkpoint_holds_it_alone(here, branches):
    for branch, inner in (("mm", [0, 1]), ("chat", [1])):
        folder = find(branches / branch)
        saved = weights.load_tensors(folder / "model.safetensors")
        fresh = dict(grow(load("start"), branch, inner).branch.named_parameters())
        assert len(saved) == len(fresh)
        for name, p in fresh.items():
            assert not torch.equal(saved[f"llm.branches.{branch}.{name}"], p), name
        assert weights.describe(folder)[1] == {"name": branch, "after": inner}
        assert os.path.samefile(weights.base_of(folder), "start")


def test_a_branch_without_its_base_or_with_another_is_refused_in_a_sentence(here, branches):
    mm = here / "far/away/mm"
    shutil.copytree(find(branches / "mm"), mm)
    with pytest.raises(BadInput, match="is a branch of .*start, .*--ckpt BASE --branch BRANCH"):
        load(mm)
    shutil.copytree("start", here / "moved")
    model, _ = support.start.load_model(here / "moved", branch=str(mm))
    assert model.branch.name == "mm"
    none, _ = support.start.load_model(branches / "mm", branch="none")
    assert not hasattr(none, "branch")
    with pytest.raises(BadInput, match="this model has other weights; take the base"):
        add_branch(tiny.model(1), mm)
    with pytest.raises(BadInput, match="is a whole model and no branch"):
        add_branch(model, "start")
    with pytest.raises(BadInput, match="ground: is neither a folder nor a branch .* has mm"):
        support.start.with_branch(model, "ground")
    other = grow(load("start", image_size=8), "other", [0])
    save(here / "other", other, base="start")
    with pytest.raises(BadInput, match="are .8, 2., those of the branch mm are .16, 2."):
        add_branch(model, here / "other")
    assert load(here / "other").config.vit.image_size == 8


def test_evaluation_asks_the_branch_about_pictures_and_the_base_about_the_rest(here, branches):
    common = "--data out/toy/heldout.toml --beams 1 --max-new-tokens 8 --limit 12 --json --out"
    mm = branches / "mm"

    def answers(ckpt, out):
        evaluate.main(f"--ckpt {ckpt} {common} {here / out}".split())
        return [json.loads(line) for line in open(here / out / "predictions.jsonl")]

    base, own = answers("start", "base"), answers(mm, "mm")
    added = answers(f"start --branch {mm}", "added")
    assert own == added != base
    alone = [row for row in base if row["source"] == "chat" and row["number"] % 3]
    assert len(alone) > 4 and all(row in own for row in alone)
    with pytest.raises(BadInput, match="another weights"):
        answers(branches / "chat", "mm")


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_branch_goes_on_exactly_after_a_stop_and_into_the_next_stage(here, branches, capsys):
    whole, cut = branches / "mm", here / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step-00000004")
    shutil.rmtree(cut / "step-00000006")
    assert run(f"--stage 2 --resume --save-every 2 --keep 9 --out {cut}") == 0
    assert "next: python train.py --stage 3 --tune inner --branch mm" in capsys.readouterr().out
    for file in ("model.safetensors", "optimizer.safetensors", "config.json"):
        last = Path("step-00000006", file)
        assert (cut / last).read_bytes() == (whole / last).read_bytes()
    assert tiny.losses(cut) == tiny.losses(whole)
    assert tiny.same(load("start"), tiny.model())

    assert run(f"--stage 3 --tune inner --steps 1 --init {whole} --out {here}/next") == 0
    assert weights.describe(here / "next")[1] == {"name": "mm", "after": [0, 1]}
    assert os.path.samefile(weights.base_of(here / "next"), "start")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--init MM", "is a branch, mm; --tune inner trains it"),
        ("--init MM --tune inner --inner-layers 0", "has the branch mm after [0, 1]; leave"),
        ("--init start --tune inner --inner-layers 0,7", "has layers 0 to 1, not [0, 7]"),
        ("--init start --branch x", "describe what --tune inner trains"),
        ("--init start --tune inner --lr vit=1", "keeps the vit frozen"),
        ("--out MM --resume --tune qv", "--tune: the run in"),
    ],
)
def test_flags_that_contradict_a_branch_are_refused(flags, sentence, here, branches, capsys):
    flags = flags.replace("MM", str(branches / "mm"))
    assert train.main(f"--stage 2 --out {here}/refused {flags}".split()) == 2
    assert sentence in capsys.readouterr().err


def test_a_base_that_is_pieced_together_is_written_beside_its_branch(here, capsys):
    base = load("start")
    weights.export_llama(base.llm, here / "llm")
    flags = f"--stage 1 --tune inner --init start --llm {here}/llm --tokenizer {tiny.TOKENIZER}"
    assert run(f"{flags} --steps 1 --out {here}/o") == 0
    assert f"is written to {here}/o/base" in capsys.readouterr().out
    assert tiny.same(load(here / "o").base.llm, base.llm)
    assert load(here / "o/base").config == base.config


def test_a_plan_counts_a_branch(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train.main("--stage 2 --preset infmllm-7b --tune inner --plan --gpus 1x139".split()) == 0
    said = capsys.readouterr().out
    assert "own after 0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31 of the LLM's 32" in said
    assert "vit               0   986.98M" in said
    assert "llm           3.10B     6.74B" in said
