"""A run that was killed, stopped or moved to other machines ends as if it had not been."""

import json
import os
import random
import shutil
import signal

import pytest
import tiny
from faults import flags, killed, left, logged, one_sentence, run, straight, wait_for

import sample
import support.log
import support.start
import weights.checkpoint
import weights.files


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(world, here):
    settings = "--steps", 60, "--save-every", 2
    assert killed(world, here, 2, 6, random.Random(0), *settings) >= 1  # while writing
    names, _, _ = left(here / "o")
    assert names == ["lock", "log.jsonl", "step-00000058", "step-00000060"]


def test_what_kills_have_left_of_checkpoints_goes_with_the_next_one(world, here):
    out = here / "o"
    for half in ("step-00000001.gone", "step-00000001.new"):
        (out / half).mkdir(parents=True)
        (out / half / "x").touch()
    assert run(world, 1, "--steps", 2, "--out", out) == 0
    assert "step-00000002" in left(out)[0] and not list(out.glob("step-*.*"))


def test_a_signal_to_any_rank_saves_within_a_step_and_leaves_with_0(world, here):
    out = here / "o"
    settings = "--steps", 1000, "--save-every", 0, "--workers", 1, "--out", out
    ranks = tiny.start(here, *flags(world, 1, *settings), world=2, slow=0.05)
    wait_for(lambda: logged(out) > 3)
    os.kill(ranks[1].pid, signal.SIGINT)
    assert tiny.finish(ranks) == [0, 0], tiny.said(here)[-3000:]
    last = logged(out)
    assert weights.checkpoint.find(out).name == f"step-{last:08d}" and last < 1000
    assert f"stopped at step {last}; python train.py --stage 1 --out" in tiny.said(here)


def test_a_run_goes_on_with_other_ranks_sharded_or_not_on_the_same_curve(world, here):
    out = here / "o"
    saving = "--save-every", 4, "--keep", 3, "--out", out
    assert run(world, 3, "--steps", 12, *saving) == 0
    alone = tiny.losses(out)
    for steps, ranks, how in (((8, 12), 2, "--shard"), ((12,), 1, "--accum=2")):
        for step in steps:
            shutil.rmtree(out / f"step-{step:08d}")
        argv = flags(world, 3, "--resume", *saving, how)
        codes = tiny.finish(tiny.start(here, *argv, world=ranks))
        assert codes == [0] * ranks, tiny.said(here)[-3000:]
        assert (out / "step-00000012").exists()
        assert tiny.losses(out) == pytest.approx(alone, rel=0, abs=1e-5) and len(alone) == 12


def test_a_finished_run_has_nothing_to_do_and_an_empty_one_starts(world, here, capsys):
    assert run(world, 1, "--resume", "--steps", 2, "--out", here / "o") == 0
    assert "no checkpoint yet, so the run starts from the beginning" in capsys.readouterr().out
    assert run(world, 1, "--resume", "--out", here / "o") == 0
    assert "all 2 steps are done" in capsys.readouterr().out


def test_a_finished_run_is_lengthened_and_says_what_the_learning_rate_does(world, here, capsys):
    out = here / "o"
    assert run(world, 1, "--steps", 4, "--lr", 1, "--out", out) == 0
    assert run(world, 1, "--resume", "--steps", 6, "--out", out) == 0
    said = capsys.readouterr().out
    assert "all 4 steps" not in said and "lengthened from 4 to 6 steps: from step 4 on" in said
    assert "rate is that of a run of 6 steps, at first 35% of its peak" in said
    rates = [r["lr"]["adapter"] for r in support.log.records(out)]
    assert len(rates) == 6 and rates[4] == pytest.approx(0.345, abs=0.001)
    assert run(world, 1, "--resume", "--out", out) == 0
    assert "all 6 steps are done" in capsys.readouterr().out


def test_a_checkpoint_handed_on_without_what_resuming_needs_answers_and_is_not_resumed(
    world, here, capsys
):
    out = here / "o"
    assert run(world, 1, "--steps", 2, "--out", out) == 0
    for name in ("optimizer.safetensors", "state.json"):
        (out / "step-00000002" / name).unlink()
        code = run(world, 1, "--resume", "--steps", 4, "--out", out)
        one_sentence(capsys, code, f"{name}: is not there, so the run cannot be resumed", "--init")
    model, tokenizer = support.start.load_model(out, device="cpu")
    assert sample.generate(model, tokenizer, [[]], ["hello"], max_new_tokens=2)
    assert run(world, 2, "--init", out, "--steps", 1, "--out", here / "next") == 0


def test_a_resumed_run_refuses_other_settings_and_another_models_state(world, here, capsys):
    out = here / "o"
    assert run(world, 1, "--steps", 4, "--save-every", 2, "--keep", 9, "--out", out) == 0
    shutil.rmtree(out / "step-00000004")
    refused = lambda sentence, *more: one_sentence(
        capsys, run(world, 1, "--resume", "--out", out, *more), sentence
    )
    refused("--seed: the run in", "--seed", 1)
    refused("has 4 and not 3; only more steps are possible; leave it out", "--steps", 3)
    refused("--lr: the run in", "--lr", 1)
    refused("is of stage 1; resume that", "--stage", 2)
    optimizer = out / "step-00000002/optimizer.safetensors"
    tensors = weights.files.load_tensors(optimizer)
    del tensors["adapter.fc1.weight.exp_avg"]
    weights.files.save_tensors(tensors, optimizer)
    sums = optimizer.with_name("checksums.json")
    known = json.loads(sums.read_text()) | {optimizer.name: weights.checkpoint.checksum(optimizer)}
    sums.write_text(json.dumps(known))
    refused("its optimizer state is another model's (adapter.fc1.weight.exp_avg)")


def test_the_newest_checkpoints_stay_and_minutes_count_too(world, here):
    saving = "--save-every", 0, "--save-minutes", "1e-9", "--keep", 3
    names, _, _ = straight(world, here / "o", 1, "--steps", 6, *saving)
    assert names == ["lock", "log.jsonl", "step-00000004", "step-00000005", "step-00000006"]
