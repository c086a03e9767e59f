"""Each stage trains exactly its parts; any number of processes takes the same steps; each guard says its sentence."""

import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

import support.files
import support.ranks
import support.start
import train
import weights.checkpoint
import weights.files
from data import Data
from support.errors import BadInput
from text.tokenizer import Tokenizer

FAST = ["--workers", "0", "--batch", "8", "--log-every", "1", "--eval-rows", "12"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    """The world as the current folder; runs go to a folder of their own."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "plot", lambda folder: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model waits for a second one
    yield tmp_path
    torch.set_num_threads(threads)


def run(*argv):
    return train.main([str(a) for a in (*argv, *FAST)])


def refused(capsys, *argv):
    """The one sentence with which train.py refuses, having exited with 2 and no traceback."""
    try:
        code = train.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code  # argparse's own way
    out = capsys.readouterr().err
    assert code == 2 and out.count("\n") == 1 and "Traceback" not in out, out
    return out


def hashes(folder):
    return {
        name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in weights.files.load_tensors(
            weights.checkpoint.find(folder) / "model.safetensors"
        ).items()
    }


def trains(name, stage):
    parameters = dict(tiny.model().freeze(stage).named_parameters())
    return parameters[name].requires_grad


def held_out(folder):
    return [r["held_out"] for r in map(json.loads, open(folder / "log.jsonl")) if "held_out" in r]


# ---- the stages ------------------------------------------------------------------------------------------------------


def test_stages_in_a_row_train_exactly_their_parts_and_lower_their_held_out_loss(
    here, world, capsys
):
    assert (
        run("--stage", "all", "--init", "start", "--out", here, "--steps", 24, "--lr", "5e-3") == 0
    )
    said = capsys.readouterr().out
    for stage, sources in ((1, ["captions"]), (2, ["captions", "vqa"]), (3, ["vqa", "chat"])):
        before = hashes(world / "start" if stage == 1 else here / f"stage{stage - 1}")
        after = hashes(here / f"stage{stage}")
        assert before.keys() == after.keys()
        for name in after:
            assert (before[name] != after[name]) == trains(name, stage), (stage, name)
        evaluations = held_out(here / f"stage{stage}")
        for source in sources:
            assert evaluations[-1][source] < evaluations[0][source] - 0.01, (stage, source)
    assert f"stage 2 starts from {here}/stage1/step-00000024" in said
    assert "-> '" in said and "held-out loss" in said and "next: python sample.py" in said


def test_frozen_weights_are_saved_with_the_bits_they_came_with_whatever_the_arithmetic(here, world):
    assert run("--stage", 1, "--init", "start", "--out", here, "--steps", 2, "--dtype", "bf16") == 0
    before, after = hashes(world / "start"), hashes(here)
    for name in after:
        assert (before[name] != after[name]) == trains(name, 1), name
    assert (
        support.files.read_json(weights.checkpoint.find(here) / "config.json")["training"]["dtype"]
        == "bf16"
    )


def test_recomputing_activations_changes_no_loss(here):
    for extra in ("--no-recompute", "--recompute"):
        assert (
            run(
                "--stage",
                2,
                "--init",
                "start",
                "--out",
                here / extra,
                "--steps",
                3,
                "--eval-every",
                0,
                extra,
            )
            == 0
        )
    assert tiny.losses(here / "--no-recompute") == tiny.losses(here / "--recompute")


def test_another_adapter_starts_fresh_and_another_grid_is_taken(here, capsys):
    assert (
        run(
            "--stage",
            1,
            "--init",
            "start",
            "--out",
            here / "r",
            "--steps",
            2,
            "--adapter",
            "resampler",
        )
        == 0
    )
    assert "fresh (resampler" in capsys.readouterr().out
    assert (
        run(
            "--stage", 2, "--init", here / "r", "--out", here / "g", "--steps", 2, "--eval-every", 0
        )
        == 0
    )
    assert weights.checkpoint.load(here / "g").config.adapter == "resampler"
    assert (
        run(
            "--stage",
            1,
            "--init",
            "start",
            "--out",
            here / "p",
            "--steps",
            2,
            "--grid",
            4,
            "--image-size",
            32,
        )
        == 0
    )
    config = weights.checkpoint.load(here / "p").config
    assert (config.visual_tokens, config.vit.image_size) == (16, 32)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def test_an_update_is_adamw_with_clipping_and_a_bad_gradient_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"llm": torch.nn.Linear(3, 4), "vit": torch.nn.LayerNorm(5)})
    ours = list(model.parameters())
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    s = SimpleNamespace(lr={"llm": 2e-2, "vit": 1e-2}, weight_decay=0.1, warmup=0.0, steps=100)
    ranks = support.ranks.Ranks(0, 1, torch.device("cpu"))
    run = train.Run(s, ranks, model, None, None, None)
    run.optimizer = train.make_optimizer(model, s)
    run.meters = train.new_meters(ranks.device)
    peaks, decays = (
        (2e-2, 2e-2, 1e-2, 1e-2),
        (0.1, 0, 0, 0),
    )  # matrix, bias; weight and bias of the norm
    reference = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, decays)],
        betas=train.BETAS,
        foreach=False,
    )

    def step(grads):
        for p, g in zip(ours, grads):
            p.grad = g.clone()
        train.update(run, torch.zeros(()), 1)

    for k in range(6):
        if k == 3:
            held = (*ours, *(t for p in ours for t in run.optimizer.state[p].values()))
            before = [t.clone() for t in held]
            step([torch.full_like(p, math.nan) for p in ours])
            assert all(torch.equal(a, b) for a, b in zip(before, held)) and len(held) == 16
        grads = [torch.randn_like(p) * 10 ** (k - 2) for p in ours]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(theirs, train.CLIP)
        for group, peak in zip(reference.param_groups, peaks):
            group["lr"] = peak * train.share_of_peak(s, run.step)
        reference.step()
        step(grads)
        run.step += 1
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert {state["step"].item() for state in run.optimizer.state.values()} == {6}


def test_matrices_decay_and_norms_biases_positions_do_not():
    model = tiny.model().freeze(2)
    lr = {"vit": 1, "adapter": 5e-3, "llm": 3}
    optimizer = train.make_optimizer(model, SimpleNamespace(lr=lr, weight_decay=0.1))
    names = {p: n for n, p in model.named_parameters()}
    decay = {
        names[p]: (lr[group["part"]], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decay["vit.blocks.0.fc1.weight"] == (1, 0.1) and decay["llm.layers.1.q.weight"] == (
        3,
        0.1,
    )
    assert (
        decay["vit.positions"] == decay["vit.blocks.0.norm1.weight"] == decay["vit.cls"] == (1, 0.0)
    )
    assert decay["adapter.fc1.bias"] == (5e-3, 0.0)
    assert set(decay) == {n for n in names.values() if trains(n, 2)}


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero():
    shares = [train.share_of_peak(SimpleNamespace(steps=100, warmup=0.1), k) for k in range(100)]
    assert shares[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert shares[10] == 1 and shares[55] == pytest.approx(0.5) and 0 < shares[99] < 1e-3


# ---- any number of processes -----------------------------------------------------------------------------------------


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def steps_of(world, folder, dtype, count, *extra):
    """Five steps of stage 3 in `count` processes: (weights after them, losses, gradients of the first)."""
    name = "-".join(map(str, (dtype, count, *extra))).replace("--", "")
    argv = [
        "--stage",
        3,
        "--init",
        world / "start",
        "--data",
        world / "out/toy/stage3.toml",
        "--out",
        folder / name,
        "--steps",
        5,
        *FAST,
        "--eval-every",
        0,
        "--save-every",
        0,
        "--dtype",
        dtype,
        *extra,
    ]
    if count > 1:
        codes = tiny.finish(tiny.start(folder, *argv, world=count, record=folder / "gradients"))
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "gradients", tiny.recording(train, folder / "gradients"))
            codes = [train.main([str(a) for a in argv])]
    assert codes == [0] * count, tiny.said(folder)[-3000:]
    assert "returned a view" not in tiny.said(folder), (
        "fully_shard hangs its work on what a layer returns"
    )
    tensors = weights.files.load_tensors(
        weights.checkpoint.find(folder / name) / "model.safetensors"
    )
    return (
        tensors,
        list(tiny.losses(folder / name).values()),
        torch.load(folder / "gradients", weights_only=True),
    )


def test_many_processes_take_the_steps_of_one(world, here):
    """Ranks, micro-batches and shards: unequal answers, and ranks whose rows have no image."""
    ways = [(1, "--accum", 2), (1, "--accum", 4), (2,), (4,)]
    for dtype, more in (
        ("fp64", [(4, "--shard", "--recompute")]),
        ("fp32", [(2, "--shard", "--accum", 2)]),
    ):
        weights, losses, grads = steps_of(world, here, dtype, 1)
        norm = math.sqrt(sum(g.double().square().sum() for g in grads.values()))
        assert len(losses) == 5 and norm > 0.1
        for way in ways + more:
            other_weights, other_losses, other_grads = steps_of(world, here, dtype, *way)
            assert other_losses == pytest.approx(losses, rel=0, abs=1e-5), way
            assert difference(other_grads, grads) < 1e-5 * norm, way
            if dtype == "fp64":
                assert difference(other_weights, weights) < 1e-9, way


def test_the_batches_of_that_test_have_a_rank_without_images_and_unequal_answers(world):
    data = Data(str(world / "out/toy/stage3.toml"), Tokenizer(tiny.TOKENIZER), 16, 4, 256, batch=8)
    for count in (2, 4):
        batches = [
            next(iter(data.batches(step, 1, rank, count)))[0]
            for step in range(5)
            for rank in range(count)
        ]
        assert len({batch.supervised for batch in batches}) > 2
        assert any((batch.image_positions < 0).all() for batch in batches), count


def test_ranks_that_were_started_differently_are_refused(world, tmp_path):
    common = [
        "--stage",
        1,
        "--init",
        world / "start",
        "--data",
        world / "out/toy/stage1.toml",
        "--out",
        "o",
        *FAST,
    ]
    processes = tiny.start(tmp_path, *common, "--steps", 3, world=2, differ={1: ["--steps", 4]})
    assert tiny.finish(processes) == [2, 2]
    assert "the ranks differ in flags or data; start all with the same" in tiny.said(tmp_path)


# ---- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--stage 1 --stepz 3", "unrecognized arguments: --stepz 3"),
        ("--stage 4", "invalid choice: '4'"),
        ("--stage 1 --steps 0", "'0' is no number from 1"),
        ("--stage 1 --max-bad 2", "'2' is no number from 0 to 1"),
        (
            "--stage 1 --lr adaptor=1",
            "'adaptor=1' is neither 1e-3 nor adapter=1e-3,llm=2e-5",
        ),
        ("", "--stage: name 1, 2, 3 or all"),
        (
            "--stage 1 --init start --lr vit=1e-4",
            "--lr vit=...: stage 1 keeps the vit frozen; leave it out",
        ),
        (
            "--stage 1 --init start --batch 10 --accum 4",
            "--batch 10 is not divisible by 1 ranks x 4 micro-batches",
        ),
        ("--stage 1 --shard", "--shard spreads the state over several ranks: start with torchrun"),
        ("--stage 1 --gpus 8x80", "--gpus describes machines to --plan alone; add --plan"),
        ("--stage all --data x.toml", "--data is one stage's"),
        (
            "--stage 1 --preset infmllm-7b --init start",
            "infmllm-7b has no data of its own; name a mixture",
        ),
        ("--stage 1 --preset infmllm-7b", "starts from --vit and --llm, or from --init"),
        (
            "--stage 2 --out nowhere/stage2",
            "nowhere/stage1: stage 2 starts from stage 1's output, which is not there",
        ),
        ("--stage 1 --init start --data none.toml", "none.toml: cannot be read"),
        (
            "--stage 1 --init start --out start/config.json/x",
            "start/config.json/x: Not a directory; mend that",
        ),
        ("--stage 1 --init start --tokenizer none.model", "none.model: cannot be read"),
        ("--stage 1 --init start --grid 5", "grid 5 is not within the ViT's 4 patches"),
        ("--stage 1 --init start --image-size 18", "image size 18 is no multiple of patch 4"),
    ],
)
def test_a_contradiction_is_refused_in_one_sentence(here, capsys, argv, sentence):
    out = [] if "--out" in argv or not argv else ["--out", here]
    assert sentence in refused(capsys, *argv.split(), *out)


def test_a_gpu_that_is_not_there_is_said(here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this machine shows torch no GPU" in refused(capsys, "--stage", 1, "--device", "cuda")


def test_a_folder_with_a_run_in_it_is_not_written_over(here, capsys):
    assert run("--stage", 1, "--init", "start", "--out", here, "--steps", 2, "--eval-every", 0) == 0
    assert "holds a run (step-00000002); --resume goes on with it" in refused(
        capsys, "--stage", 1, "--init", "start", "--out", here
    )
    assert "has 8 and not 4; leave it out to resume" in refused(
        capsys, "--stage", 1, "--resume", "--out", here, "--batch", 4
    )


def test_updates_without_a_finite_gradient_are_skipped_counted_and_three_in_a_row_stop_the_run(
    here, capsys, monkeypatch
):
    good, when, before = train.gradients, set(), []

    def sometimes_bad(run, batches, supervised):
        loss = good(run, batches, supervised)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        if run.step in when:
            trained[0].grad.fill_(math.nan)
        before.append(
            (
                run.step,
                [p.detach().clone() for p in trained],
                run.optimizer.state[trained[0]]["step"].item(),
            )
        )
        return loss

    monkeypatch.setattr(train, "gradients", sometimes_bad)
    common = ["--stage", 1, "--init", "start", "--eval-every", 0]
    when |= {2, 3, 5}
    assert run(*common, "--out", here / "a", "--steps", 8) == 0
    last = [json.loads(line) for line in open(here / "a/log.jsonl")][-1]
    assert last["skipped"] == 3 and math.isfinite(last["loss"])
    for k in when:
        assert all(torch.equal(a, b) for a, b in zip(before[k][1], before[k + 1][1]))
    assert before[-1][2] == 7 - 3 and not torch.equal(before[1][1][0], before[2][1][0])
    when |= {4}
    sentence = refused(capsys, *common, *FAST, "--out", here / "b", "--steps", 8, "--save-every", 2)
    assert (
        "3 updates in a row had no finite gradient" in sentence
        and "the last good checkpoint is in" in sentence
    )
    assert weights.checkpoint.find(here / "b").name == "step-00000004"
    assert all(torch.isfinite(p).all() for p in weights.checkpoint.load(here / "b").parameters())


def test_samples_that_cannot_be_read_are_replaced_counted_and_named_until_too_many(
    here, capsys, monkeypatch
):
    world = tiny.world(here)
    monkeypatch.chdir(world)
    (world / "out/toy/images/3.png").write_bytes(b"no picture")
    common = ["--stage", "1", "--init", "start", *FAST, "--steps", "6", "--eval-every", "0"]
    assert train.main([*common, "--out", "a"]) == 0
    bad = [json.loads(line) for line in open("a/log.jsonl")][-1]["bad"]
    named = open("a/unreadable.txt").read()
    assert bad == named.count("\n") > 0 and "3.png" in named
    assert "samples were unreadable, more than --max-bad 0.0; mend or remove" in refused(
        capsys, *common, "--out", "b", "--max-bad", 0
    )


def test_a_batch_without_a_supervised_token_stops_the_run(here, capsys, monkeypatch):
    gather = Data.batches

    def silent(*args, **kwargs):
        for batches in gather(*args, **kwargs):
            for batch in batches:
                batch.supervised = 0
            yield batches

    monkeypatch.setattr(Data, "batches", silent)
    assert "no token of step 0's batch is supervised, so there is nothing to learn" in refused(
        capsys, "--stage", 1, "--init", "start", "--out", here, *FAST, "--eval-every", 0
    )


def test_weights_that_are_not_finite_and_a_tokenizer_too_large_are_refused_at_the_start(
    here, world, capsys
):
    model = tiny.model()
    model.vit.blocks[1].fc1.weight.data[0, 0] = math.nan
    weights.checkpoint.save(here / "nan", model, Tokenizer(tiny.TOKENIZER), {"preset": "toy"})
    assert "vit.blocks.1.fc1.weight: the weights to start from are not finite" in refused(
        capsys, "--stage", 1, "--init", here / "nan", "--out", here / "o"
    )
    model = tiny.model()
    model.llm = type(model.llm)(replace(model.config.llm, vocab=99))
    model.config.llm = model.llm.config
    weights.checkpoint.save(
        here / "few", train.models.init(model), Tokenizer(tiny.TOKENIZER), {"preset": "toy"}
    )
    assert "embeddings; take the one that belongs to it" in refused(
        capsys, "--stage", 1, "--init", here / "few", "--out", here / "o"
    )


def test_tensorboard_that_is_not_installed_is_said(here, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert "--tensorboard: it is not installed" in refused(
        capsys, "--stage", 1, "--init", "start", "--out", here, "--tensorboard"
    )


def test_toy_backbones_that_are_not_there_are_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(support.start, "TOY_START", tmp_path / "none")
    assert "python -m tools.backbones makes them" in refused(capsys, "--stage", 1)
    with pytest.raises(BadInput):
        train.plot(tmp_path)
