"""Each stage trains exactly its parts; any number of processes takes the same steps; each guard says its sentence."""

import copy
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

import data
import support.log
import support.start
import train
import weights
from support.log import records
from support.ranks import Ranks
from text.tokenizer import Tokenizer

FAST = "--workers 0 --batch 8 --log-every 1 --eval-rows 9 --eval-every 0 --score-rows 0".split()


def run(line):
    return train.main(FAST + line.split())


def refused(capsys, line):
    """The one sentence with which train.py refuses, having ended with 2 and no traceback."""
    assert run(line) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "Traceback" not in sentence, sentence
    return sentence


def tensors(folder):
    return weights.load_tensors(weights.find(folder) / "model.safetensors")


def trained(stage):
    return {n for n, p in tiny.model().freeze(stage).named_parameters() if p.requires_grad}


def changed(before, after):
    """The names of tensors that have other bits."""
    before, after = tensors(before), tensors(after)
    assert before.keys() == after.keys()
    bits = lambda tensor: tensor.view(torch.uint8)
    return {name for name in after if not torch.equal(bits(before[name]), bits(after[name]))}


# ---- the stages ------------------------------------------------------------------------------------------------------


def test_stages_in_a_row_train_exactly_their_parts_and_lower_their_held_out_loss(here, capsys):
    flags = "--steps 24 --lr 5e-3 --eval-every 24 --score-rows 1"
    assert run(f"--stage all --init start --out {here} {flags}") == 0
    said = capsys.readouterr().out
    before = "start"
    for stage, sources in ((1, ["captions"]), (2, ["captions", "vqa"]), (3, ["vqa", "chat"])):
        out = here / f"stage{stage}"
        assert changed(before, out) == trained(stage)
        first, last = (r["held_out"] for r in records(out) if "held_out" in r)
        for source in sources:
            assert last[source] < first[source] - 0.01, (stage, source)
        before = out
    for sentence in (
        f"stage 2 starts from {here}/stage1/step-00000024",
        "held-out loss",
        "-> '",
        "held out, answers generated",
        "next: python sample.py",
    ):
        assert sentence in said


def test_backbones_of_today_go_through_the_stages_and_are_resumed_and_scored(here, capsys):
    today = tiny.model(**tiny.TODAY)
    weights.save(here / "start", today, Tokenizer(tiny.TOKENIZER), {"preset": "toy"})
    assert run(f"--stage all --init {here}/start --out {here} --steps 2") == 0
    scored = "--eval-every 9 --score-rows 1"
    assert run(f"--stage 3 --out {here}/stage3 --resume --steps 4 {scored}") == 0
    assert "held out, answers generated" in capsys.readouterr().out
    assert weights.load(here / "stage3").config == today.config
    assert changed(here / "stage1", here / "stage2") >= {
        "vit.post_norm.weight",
        "llm.layers.0.v.bias",
    }


def test_frozen_weights_are_saved_with_the_bits_they_came_with_whatever_the_arithmetic(here):
    assert run(f"--stage 1 --init start --out {here} --steps 2 --dtype bf16") == 0
    assert changed("start", here) == trained(1)


def test_recomputing_activations_changes_no_loss(here):
    losses = []
    for flag in ("--no-recompute", "--recompute"):
        assert run(f"--stage 2 --init start --out {here / flag} --steps 3 {flag}") == 0
        losses.append(tiny.losses(here / flag))
    assert losses[0] == losses[1]


def test_another_adapter_starts_fresh_and_another_grid_is_taken(here, capsys):
    first = "--stage 1 --init start --steps 2"
    assert run(f"{first} --out {here}/r --adapter resampler") == 0
    assert "fresh (resampler" in capsys.readouterr().out
    assert run(f"--stage 2 --init {here}/r --out {here}/g --steps 2") == 0
    assert weights.load(here / "g").config.adapter == "resampler"
    assert run(f"{first} --out {here}/p --grid 4 --image-size 32") == 0
    config = weights.load(here / "p").config
    assert (config.visual_tokens, config.vit.image_size) == (16, 32)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def test_an_update_is_adamw_that_clips_and_decays_matrices_and_one_with_a_bad_gradient_is_none():
    model = tiny.network(adapter="resampler").freeze(2)
    rates = {"vit": 1e-2, "adapter": 2e-2, "llm": 3e-2}
    s = SimpleNamespace(lr=rates, weight_decay=1.0, warmup=0.0, steps=100)
    run = train.Run(s, Ranks(0, 1, torch.device("cpu")), model, None, None, None)
    run.optimizer = train.make_optimizer(model, s)
    run.meters = train.new_meters("cpu")
    other = copy.deepcopy(model)
    groups, pairs = [], []
    for name, q in other.named_parameters():
        if q.requires_grad:
            matrix = name.endswith("weight") and "norm" not in name
            groups.append(
                {"params": [q], "weight_decay": float(matrix), "part": name.split(".")[0]}
            )
            pairs.append((model.get_parameter(name), q))
    reference = torch.optim.AdamW(groups, betas=train.BETAS)
    for k in range(7):
        for p, q in pairs:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 10 ** (
                k - 4
            )
            q.grad = p.grad.clone()
        if k == 3:
            p.grad.view(-1)[0] = math.nan  # of one parameter: none may move, nor any moment
        else:
            torch.nn.utils.clip_grad_norm_(other.parameters(), train.CLIP)
            for group in reference.param_groups:
                group["lr"] = rates[group["part"]] * train.share_of_peak(s, k)
            reference.step()
        train.update(run, torch.zeros(()), 1)
        run.step += 1
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero():
    s = SimpleNamespace(steps=100, warmup=0.1)
    shares = [train.share_of_peak(s, step) for step in range(100)]
    assert shares[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert shares[55] == pytest.approx(0.5) and 0 < shares[99] < 1e-3


# ---- any number of processes -----------------------------------------------------------------------------------------


def steps_of(folder, line, count):
    """Five steps in `count` processes: losses and norms of gradients, held-out losses; weights after the last."""
    out = folder / f"{count} {line}".replace(" ", "")
    flags = [*FAST, *line.split(), "--out", out, "--steps", 5, "--eval-every", 5]
    codes = tiny.finish(tiny.start(folder, *flags, world=count))
    said = tiny.said(folder)
    assert codes == [0] * count, said[-3000:]
    assert "returned a view" not in said, "fully_shard hangs its work on what a layer returns"
    numbers = []
    for record in records(out):
        numbers += record.get("held_out", {}).values()
        if "loss" in record:
            numbers += [record["loss"], record["grad_norm"]]
    return numbers, tensors(out)


@pytest.mark.parametrize(
    "settings, ways",
    [
        (
            "--dtype fp64",
            [(1, "--accum 4"), (2, "--accum 2"), (4, ""), (4, "--shard --recompute")],
        ),
        ("--dtype fp32", [(2, "--shard --accum 2")]),
        ("--dtype fp64 --tune inner", [(2, ""), (2, "--shard --recompute")]),
    ],
)
def test_many_processes_take_the_steps_of_one(world, tmp_path, settings, ways):
    """Ranks, micro-batches and shards: unequal answers, and ranks whose rows have no image."""
    line = f"--stage 3 --init {world}/start --data {world}/out/toy/stage3.toml {settings}"
    numbers, after = steps_of(tmp_path, line, 1)
    for count, flags in ways:
        found, weights_of = steps_of(tmp_path, f"{line} {flags}", count)
        assert found == pytest.approx(numbers, rel=1e-5), flags
        assert weights_of.keys() == after.keys()
        if "fp64" in settings:
            for name, tensor in weights_of.items():
                assert (tensor - after[name]).abs().max() < 1e-9, (flags, name)


def test_ranks_that_were_started_differently_are_refused(world, tmp_path):
    line = f"--stage 1 --init {world}/start --data {world}/out/toy/stage1.toml --out o --steps 3"
    flags = [*FAST, *line.split()]
    processes = tiny.start(tmp_path, *flags, world=2, differ={1: ["--steps", 4]})
    assert tiny.finish(processes) == [2, 2]
    assert "the ranks differ in flags or data; start all with the same" in tiny.said(tmp_path)


# ---- what is said ---------------------------------------------------------------------------------------------------


def lone_steps(monkeypatch):
    """By the log's clock a step takes a second, and a hundred go by before the first batch."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(support.log, "time", clock)
    batches, update = data.Data.batches, train.update

    def late(*args, **how):
        now[0] += 100
        yield from batches(*args, **how)

    def slow(*args):
        now[0] += 1
        update(*args)

    monkeypatch.setattr(data.Data, "batches", late)
    monkeypatch.setattr(train, "update", slow)


def test_records_are_of_their_own_steps_and_time_after_resuming_too(here, capsys, monkeypatch):
    lone_steps(monkeypatch)
    line = f"--stage 1 --out {here} --log-every 4 --save-every 6 --keep 9"
    assert run(f"{line} --init start --steps 10") == 0
    shutil.rmtree(here / "step-00000010")
    assert run(f"{line} --resume") == 0
    first, resumed, _ = records(here)
    assert (first["step"], resumed["step"]) == (4, 8)
    assert first["samples_per_s"] == resumed["samples_per_s"] == 8
    assert resumed["tokens_per_s"] == pytest.approx(first["tokens_per_s"], rel=0.2)
    said = capsys.readouterr().out
    assert "step 4/10  01:44 gone, 02:36 to go  loss" in said
    assert "step 8/10  01:42 gone, 01:42 to go  loss" in said


def test_help_tells_the_defaults_and_stages_prints_the_table(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1, 2, 3: 300, 1000, 400 (toy); 60000, 30000, 5197 (InfMLLM)" in said
    assert train.main(["--stages"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "infmllm-7b 2 30000 256 448 256 vit 1e-05, adapter 5e-05, llm 2e-05" in said


def test_a_source_that_the_llm_has_no_words_for_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tiny.world(tmp_path))
    file = tmp_path / "out/toy/captions.json"
    rows = file.read_text()
    for text, foreign in (("a red circle", False), ("two men on a motorbike in the rain", True)):
        file.write_text(re.sub(r"a \w+ ground", text, rows))
        assert run(f"--stage 1 --init start --steps 1 --out {foreign}") == 0
        said = capsys.readouterr().out
        assert ("% of its text is read letter by letter" in said) == foreign
        assert ("source 'captions': " in said and "its own world alone" in said) == foreign


# ---- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--stage 1 --stepz 3", "unrecognized arguments: --stepz 3"),
        ("--stage 4", "invalid choice: '4'"),
        ("--stage 1 --max-bad 2", "'2' is no number from 0 to 1"),
        ("--stage 1 --lr adaptor=1", "'adaptor=1' is neither 1e-3 nor adapter=1e-3,llm=2e-5"),
        ("", "--stage: name 1, 2, 3 or all"),
        ("--stage 1 --init start --lr vit=1e-4", "--lr vit=...: stage 1 keeps the vit frozen"),
        ("--stage 1 --init start --batch 10 --accum 4", "not divisible by 1 ranks x 4 micro-"),
        ("--stage 1 --shard", "--shard spreads the state over several ranks: start with torchrun"),
        ("--stage 1 --gpus 8x80", "--gpus describes machines to --plan alone; add --plan"),
        ("--stage 1 --device cuda", "this machine shows torch no GPU"),
        ("--stage all --data x.toml", "--data is one stage's"),
        ("--stage 1 --preset infmllm-7b --init start", "is not infmllm-7b (vit patch 4 and not 14"),
        ("--stage 1 --preset infmllm-7b --vit v --llm l", "no data of its own; name a mixture"),
        ("--stage 1 --preset infmllm-7b", "starts from --vit and --llm, or from --init"),
        ("--stage 1", "python -m tools.backbones makes them"),
        ("--stage 2 --out nowhere/stage2", "nowhere/stage1: stage 2 starts from stage 1's output"),
        ("--stage 1 --init start --data none.toml", "none.toml: cannot be read"),
        ("--stage 1 --init start --out start/config.json/x", "Not a directory; mend that"),
        ("--stage 1 --init start --tokenizer none.model", "none.model: cannot be read"),
        ("--stage 1 --init start --grid 5", "grid 5 is not within the ViT's 4 patches"),
        ("--stage 1 --init start --image-size 7", "grid 2 is not within the ViT's 1 patches"),
    ],
)
def test_a_contradiction_is_refused_in_one_sentence(here, capsys, monkeypatch, line, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(support.start, "TOY_START", here / "none")
    out = "" if "--out" in line or not line else f"--out {here}"
    assert sentence in refused(capsys, f"{line} {out}")


def test_a_folder_with_a_run_in_it_is_not_written_over(here, capsys):
    line = f"--stage 1 --init start --steps 2 --out {here}"
    assert run(line) == 0
    sentence = refused(capsys, line)
    assert "holds a run (step-00000002); --resume goes on with it" in sentence


def test_updates_without_a_finite_gradient_are_counted_and_three_that_are_not_in_a_row_stop_no_run(
    here, monkeypatch
):
    gradients = train.gradients

    def sometimes_bad(run, batches, supervised):
        loss = gradients(run, batches, supervised)
        if run.step in (2, 3, 5):
            run.model.adapter.fc2.bias.grad[0] = math.nan
        return loss

    monkeypatch.setattr(train, "gradients", sometimes_bad)
    assert run(f"--stage 1 --init start --steps 8 --out {here}") == 0
    last = records(here)[-1]
    assert last["skipped"] == 3 and math.isfinite(last["loss"])


def test_samples_that_cannot_be_read_are_replaced_counted_and_named_until_too_many(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tiny.world(tmp_path))
    (tmp_path / "out/toy/images/3.png").write_bytes(b"no picture")
    line = "--stage 1 --init start --steps 6"
    assert run(f"{line} --out a") == 0
    named = (tmp_path / "a/unreadable.txt").read_text()
    bad = records(tmp_path / "a")[-1]["bad"]
    assert bad == named.count("\n") > 0 and "3.png" in named
    assert f"{bad} samples could not be read: a/unreadable.txt" in capsys.readouterr().out
    sentence = refused(capsys, f"{line} --out b --max-bad 0")
    assert "samples were unreadable, more than --max-bad 0.0; mend or remove" in sentence


def test_a_batch_without_a_supervised_token_stops_the_run(here, capsys, monkeypatch):
    collate = data.collate
    silent = lambda *args: replace(collate(*args), supervised=0)
    monkeypatch.setattr(data, "collate", silent)
    sentence = refused(capsys, f"--stage 1 --init start --out {here}")
    assert "no token of step 0's batch is supervised, so there is nothing to learn" in sentence
