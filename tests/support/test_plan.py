"""What a run will take, said before it starts."""

import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lora
import train
from model import IGNORE, Config, InfMLLM, LlamaConfig, RMSNorm, ViTConfig, init
from support.plan import activations, arithmetic, memory


def plan(capsys, *argv):
    """Totals in GiB, stage by stage, of a plan of InfMLLM-7B; and all that it said."""
    assert train.main(["--stage", "all", "--preset", "infmllm-7b", "--plan", *argv]) == 0
    said = capsys.readouterr().out
    return [float(x) for x in re.findall(r"not measured: ([\d.]+) =", said)], said


def test_a_plan_of_infmllm_7b_needs_no_weights_and_rises_from_stage_to_stage(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    one, said = plan(capsys, "--gpus", "1x139")
    eight, sharded = plan(capsys, "--gpus", "8x80", "--shard")
    assert one == sorted(one) and eight == sorted(eight)
    assert 100 < one[2] < 139 and eight[2] < 80  # stage 3, fully finetuned, fits both
    assert "more than" not in said + sharded
    assert "8 ranks x 1 micro-batches x 16 rows" in sharded and "665,216 rows" in sharded
    assert "llm           1.07B     5.66B  fp32 master, bf16 frozen" in said  # stage 2: Q and V
    _, small = plan(capsys, "--gpus", "1x105")
    assert "more than the 105.0 GiB that are there: --shard or more --accum" in small


def test_a_preset_is_planned_and_trained_as_itself_whatever_model_lies_in_out(
    capsys, monkeypatch, tmp_path, world
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "start", "out/stage1/step-00000002")
    (tmp_path / "out/stage1/log.jsonl").write_text('{"step": 2, "seconds": {"step": 0.5}}\n')
    totals, said = plan(capsys)
    assert totals[1] > 40 and said.count("time per step: not measured") == 3
    train_it = "--stage 2 --preset infmllm-7b --data x.toml --steps 1"
    assert train.main(train_it.split()) == 2
    said = capsys.readouterr().err
    assert "is not infmllm-7b (vit patch 4 and not 14" in said and "leave --preset out" in said


def test_a_plan_counts_data_and_reads_the_time_of_a_run(capsys, here):
    shutil.copytree("start", here / "step-00000002")
    (here / "log.jsonl").write_text('{"step": 2, "seconds": {"step": 0.5}}\n')
    argv = "--stage 1 --init start --data out/toy/stage1.toml --steps 100 --batch 6 --plan --out"
    assert train.main([*argv.split(), str(here)]) == 0
    said = capsys.readouterr().out
    assert "samples: captions 24; 25.0 epochs of 24" in said
    assert "0.500 s a step, so 0.01 h" in said


def settings(**changed):
    common = dict(stage=3, tune=None, rows=3, text=40, answer=8, dtype="fp32", recompute=False)
    return SimpleNamespace(
        **common | dict(shard=False, inner_layers=None, rank=None, lora_on=None) | changed
    )


def saved_numbers(model, s):
    """What autograd keeps of a forward pass, parameters and their views apart. A CPU has no kernel for RMSNorm, so
    where its weight trains autograd keeps the normalised input as well: that does not count."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = tiny.rows(*[tiny.IMG + tiny.text(s.text)] * s.rows)
    targets = tokens.clone()
    targets[:, : -s.answer] = IGNORE

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    normed = []
    for m in model.llm.modules():
        if isinstance(m, RMSNorm) and m.weight.requires_grad:
            m.register_forward_hook(lambda module, inputs, out: normed.append(out.nbytes))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tiny.pictures(s.rows), tokens, targets)
    return (sum(kept.values()) - sum(normed)) / 4


@pytest.mark.parametrize("backbones", [{}, tiny.TODAY])
@pytest.mark.parametrize(
    "stage, tune, on",
    [
        (1, None, None),
        (2, None, None),
        (3, None, None),
        (1, "full", None),
        (3, "qv", None),
        (2, "none", None),
        (3, "lora", ["k"]),
        (2, "lora", ["o", "up"]),
        (3, "lora", ["q", "v", "gate", "down"]),
    ],
)
def test_the_memory_of_layers_is_what_autograd_keeps_of_them(stage, tune, on, backbones):
    s, calculated, measured = settings(stage=stage, tune=tune), [], []
    for layers in (2, 6):  # the ends are equal and fall out
        vit = ViTConfig(32, 4, 32, layers, 4, 96, **backbones.get("vit", {}))
        llm = LlamaConfig(128, 64, layers, 4, 2, 160, **backbones.get("llm", {}))
        model = init(InfMLLM(Config(vit, llm, grid=2)))
        if on:
            model = lora.grow(model, 8, on)
        model.freeze(stage, tune)
        calculated.append(activations(model, s))
        measured.append(saved_numbers(model, s))
    assert calculated[1] - calculated[0] == pytest.approx(measured[1] - measured[0], rel=0.03)


def test_recomputing_and_sharding_make_it_less():
    with torch.device("meta"):
        model = InfMLLM(train.models.PRESETS["small"]()).freeze(3)
    plain = memory(model, settings(dtype="bf16"))
    assert plain["optimizer"] == 2 * plain["gradients"]
    recomputed = memory(model, settings(dtype="bf16", recompute=True))
    assert recomputed["activations"] < plain["activations"] / 2
    shared = memory(model, settings(dtype="bf16", shard=True), 8)
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] * 8 == pytest.approx(plain[part])
    assert plain["work"] < shared["work"]  # a layer is gathered at a time


@pytest.mark.parametrize("backbones", [{}, tiny.TODAY])
@pytest.mark.parametrize("stage, tune", [(1, None), (2, None), (3, None), (1, "full"), (3, "qv")])
def test_arithmetic_is_what_a_counter_counts_of_images_and_of_rows(stage, tune, backbones):
    m = tiny.network(**backbones).freeze(stage, tune)
    images, tokens, targets = tiny.batch()  # two images, three rows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        m(images, tokens, targets).backward()
    batch = SimpleNamespace(images=images, tokens=tokens, supervised=12)
    ours = arithmetic(m.config, settings(stage=stage, tune=tune), batch)
    # the counter takes causal attention for full and sees the head of 12 targets made again
    width = m.config.llm.heads * m.config.llm.head_dim
    attention = 3 * 2 * 2 * tokens.numel() * tokens.shape[1] * width
    assert counter.get_total_flops() == ours + attention + 2 * 12 * 32 * 50
