"""What a run will take, said before it starts; and what it took, drawn afterwards."""

import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import support.plan
import train
from model import Config, InfMLLM, LlamaConfig, RMSNorm, ViTConfig, init


def plan(capsys, *argv):
    """Totals in GiB, stage by stage, of a plan of InfMLLM-7B; and all that it said."""
    assert train.main(["--stage", "all", "--preset", "infmllm-7b", "--plan", *argv]) == 0
    said = capsys.readouterr().out
    return [float(x) for x in re.findall(r"not measured: ([\d.]+) =", said)], said


def test_a_plan_of_infmllm_7b_needs_no_weights_and_rises_from_stage_to_stage(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    one, said = plan(capsys, "--gpus", "1x139")
    eight, sharded = plan(capsys, "--gpus", "8x80", "--shard")
    assert time.monotonic() - start < 20  # two plans of at most 10 s each
    assert one == sorted(one) and eight == sorted(eight) and len(one) == len(eight) == 3
    assert 100 < one[2] < 139 and eight[2] < 80  # stage 3, fully finetuned, fits both
    assert "more than" not in said + sharded
    assert "8 ranks x 1 micro-batches x 16 rows" in sharded and "665,216 rows" in sharded
    assert "llm           1.07B     5.66B  fp32 master, bf16 frozen" in said  # stage 2: Q and V
    _, small = plan(capsys, "--gpus", "1x24")
    assert "more than the 24.0 GiB that are there: --shard or more --accum make it less" in small


def test_a_plan_counts_data_and_reads_the_time_of_a_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.json").write_text(
        json.dumps([{"image": "a.png", "question": "q", "answer": "a"}] * 40)
    )
    (tmp_path / "m.toml").write_text(
        '[[source]]\nname = "q"\nformat = "vqa"\nannotations = "q.json"\nimages = "."\n'
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text(
        json.dumps({"step": 5, "loss": 1.0, "seconds": {"step": 0.5}}) + "\n"
    )
    assert train.main("--stage 2 --data m.toml --out out --steps 100 --batch 8 --plan".split()) == 0
    said = capsys.readouterr().out
    assert (
        "samples: q 40; 20.0 epochs of 40" in said
        and "measured in out: 0.500 s a step, so 0.01 h" in said
    )


def settings(**changed):
    common = dict(stage=3, tune=None, rows=3, text=40, answer=8, dtype="fp32", recompute=False)
    return SimpleNamespace(**common | dict(shard=False, inner_layers=None) | changed)


def saved_numbers(model, s):
    """What autograd keeps of a forward pass, parameters and their views apart. A CPU has no kernel for RMSNorm, so
    where its weight trains autograd keeps the normalised input as well: that does not count."""
    config, kept = model.config, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    T = config.visual_tokens + s.text
    tokens = torch.randint(0, config.llm.vocab, (s.rows, T))
    tokens[:, : config.visual_tokens] = -1
    targets = torch.where(torch.arange(T) < T - s.answer, -100, tokens)
    size = config.vit.image_size
    images = torch.zeros(s.rows, 3, size, size, dtype=torch.uint8)

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(images, tokens, targets)
    del loss
    norms = sum(m.weight.requires_grad for m in model.llm.modules() if isinstance(m, RMSNorm))
    return sum(kept.values()) / 4 - norms * tokens.numel() * config.llm.width


@pytest.mark.parametrize(
    "stage, tune", [(1, None), (2, None), (3, None), (1, "full"), (3, "qv"), (2, "none")]
)
def test_the_memory_of_layers_is_what_autograd_keeps_of_them(stage, tune):
    s, calculated, measured = settings(stage=stage, tune=tune), [], []
    for layers in (2, 6):  # the ends are equal and fall out
        vit = ViTConfig(32, 4, 32, layers, 4, 96)
        model = init(InfMLLM(Config(vit, LlamaConfig(128, 64, layers, 4, 2, 160), grid=4)))
        model.freeze(stage, tune)
        calculated.append(support.plan.activations(model, s))
        measured.append(saved_numbers(model, s))
    assert calculated[1] - calculated[0] == pytest.approx(measured[1] - measured[0], rel=0.03)


def test_recomputing_and_sharding_make_it_less():
    with torch.device("meta"):
        model = InfMLLM(train.models.PRESETS["small"]()).freeze(3)
    common = dict(rows=4, text=64, answer=16, dtype="bf16")
    plain = support.plan.memory(model, settings(**common))
    shard = support.plan.memory(model, settings(**common, shard=True), 8)
    again = support.plan.memory(model, settings(**common | {"recompute": True}))
    assert again["activations"] < plain["activations"]
    assert shard["optimizer"] * 8 == pytest.approx(plain["optimizer"])
    assert plain["optimizer"] == 2 * plain["gradients"]
    assert sum(shard.values()) < sum(plain.values())


def test_the_curve_is_drawn_and_without_matplotlib_it_says_what_is_missing(
    tmp_path, capsys, monkeypatch
):
    lines = [{"step": n, "loss": 6.0 / n} for n in range(1, 9)] + [
        {"step": 8, "held_out": {"a": 1.0, "b": 3.0}}
    ]
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo'
    )
    assert train.main(["--plot", str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert train.main(["--plot", str(tmp_path)]) == 0
    assert "matplotlib is not installed; pip install matplotlib" in capsys.readouterr().out
    assert train.main(["--plot", str(tmp_path / "nowhere")]) == 2
    assert "no record of a step; name the folder of a run" in capsys.readouterr().err


def test_mfu_counts_what_a_stage_needs_and_images_apart_from_rows():
    config = Config(ViTConfig(32, 4, 32, 2, 4, 96), LlamaConfig(128, 64, 2, 4, 2, 160), grid=4)
    batch = type(
        "Batch", (), {"tokens": torch.zeros(6, 56), "images": torch.zeros(2, 1), "supervised": 48}
    )
    vit, adapter, llm, head = support.plan.flops(config, 40, 8, 2).values()
    assert support.plan.arithmetic(config, settings(stage=2), batch) == 2 * (vit + adapter) + 6 * (
        llm + head
    )
