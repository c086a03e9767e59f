"""A run that was killed, stopped or moved to other machines ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import tiny
import torch

import support.log
import train
import weights
import weights.checkpoint
import weights.files
from support.errors import BadInput

FAST = ["--workers", "0", "--batch", "8", "--log-every", "1", "--eval-every", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "plot", lambda folder: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of the other processes
    yield tmp_path
    torch.set_num_threads(threads)


def flags(world, stage, *more):
    return [
        "--stage",
        stage,
        "--init",
        world / "start",
        "--data",
        world / f"out/toy/stage{stage}.toml",
        *FAST,
        *more,
    ]


def run(*argv):
    return train.main([str(a) for a in argv])


def contents(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    }


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(world, here):
    settings = ["--steps", 40, "--save-every", 2]
    assert run(*flags(world, 2, *settings, "--out", here / "straight")) == 0
    rng, out, kills, while_writing = random.Random(0), here / "killed", 0, 0
    while True:
        (process,) = tiny.start(
            here, *flags(world, 2, *settings, "--out", out, "--resume"), slow=0.02
        )
        old, goal = set(out.glob("*.new")), logged(out) + rng.randint(1, 4)
        while process.is_alive() and (
            kills == 8
            or not (set(out.glob("*.new")) - old if kills % 2 == 0 else logged(out) >= goal)
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02) if kills % 2 else 0)  # every other one while it writes
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break
        kills, while_writing = kills + 1, while_writing + bool(list(out.glob("*.new")))
    assert process.exitcode == 0, tiny.said(here)[-3000:]
    assert kills >= 5 and while_writing >= 1, (kills, while_writing)
    assert contents(weights.checkpoint.find(out)) == contents(here / "straight/step-00000040")
    assert tiny.losses(out) == tiny.losses(here / "straight") and len(tiny.losses(out)) == 40
    left = sorted(p.name for p in out.iterdir())
    assert left == ["log.jsonl", "step-00000038", "step-00000040"], left


def logged(out):
    return max((r["step"] for r in support.log.records(out)), default=0)


@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_to_any_rank_saves_within_a_step_and_leaves_with_0(world, here, number, ranks):
    processes = tiny.start(
        here,
        *flags(world, 1, "--steps", 1000, "--save-every", 0, "--out", here / "o", "--workers", 1),
        world=ranks,
        slow=0.05,
    )
    wait_for(lambda: len(tiny.losses(here / "o")) > 3)
    os.kill(processes[-1].pid, number)
    assert tiny.finish(processes) == [0] * ranks, tiny.said(here)[-3000:]
    logged = max(tiny.losses(here / "o"))
    assert weights.checkpoint.find(here / "o").name == f"step-{logged:08d}" and logged < 100
    assert f"stopped at step {logged}; python train.py --stage 1 --out" in tiny.said(here)


def wait_for(condition, seconds=40):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass  # not there yet, or half written
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_a_run_goes_on_with_other_ranks_sharded_or_not_on_the_same_curve(world, here):
    settings = ["--steps", 12, "--save-every", 4]
    assert run(*flags(world, 3, *settings, "--out", here / "one")) == 0
    curve = tiny.losses(here / "one")
    for first, second in (((1, ()), (2, ("--shard",))), ((2, ("--shard",)), (1, ("--accum", 2)))):
        out = here / f"{first[0]}-{second[0]}"
        slow = tiny.start(
            here, *flags(world, 3, *settings, "--out", out, *first[1]), world=first[0], slow=0.1
        )
        wait_for(lambda: (out / "step-00000004").exists())  # noqa: B023
        for process in slow:
            process.kill()
        for process in slow:
            process.join()
        codes = tiny.finish(
            tiny.start(
                here, *flags(world, 3, "--resume", "--out", out, *second[1]), world=second[0]
            )
        )
        assert codes == [0] * second[0], tiny.said(here)[-3000:]
        assert tiny.losses(out) == pytest.approx(curve, rel=0, abs=1e-5) and len(curve) == 12
        ours, theirs = (
            weights.files.load_tensors(weights.checkpoint.find(folder) / "optimizer.safetensors")
            for folder in (out, here / "one")
        )
        assert ours.keys() == theirs.keys() and ours["steps"] == 12


def test_a_finished_run_has_nothing_to_do_and_an_empty_one_starts(world, here, capsys):
    assert run(*flags(world, 1, "--resume", "--steps", 2, "--out", here / "o")) == 0
    assert "no checkpoint yet, so the run starts from the beginning" in capsys.readouterr().out
    assert run(*flags(world, 1, "--resume", "--out", here / "o")) == 0
    assert "all 2 steps are done" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_which(
    world, here, capsys, monkeypatch
):
    write, calls = weights.files.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 3:  # the second checkpoint's optimizer
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata=metadata)

    monkeypatch.setattr(weights.files, "save_file", full)
    assert run(*flags(world, 1, "--steps", 6, "--save-every", 2, "--out", here / "o")) == 2
    sentence = capsys.readouterr().err
    assert "step-00000004: the checkpoint cannot be written ([Errno 28] No space left" in sentence
    assert f"the last whole one is {here}/o/step-00000002; make room and --resume" in sentence
    assert sorted(p.name for p in (here / "o").iterdir()) == ["log.jsonl", "step-00000002"]
    weights.checkpoint.verify(here / "o/step-00000002")
    monkeypatch.setattr(weights.files, "save_file", write)
    assert run(*flags(world, 1, "--resume", "--out", here / "o")) == 0
    assert len(tiny.losses(here / "o")) == 6


def test_a_resumed_run_refuses_other_settings_other_data_and_another_models_state(
    world, here, capsys
):
    assert (
        run(*flags(world, 1, "--steps", 4, "--save-every", 2, "--keep", 9, "--out", here / "o"))
        == 0
    )
    shutil.rmtree(here / "o/step-00000004")
    for more, sentence in (
        (("--seed", 1), "--seed: the run in"),
        (("--steps", 9), "has 4 and not 9; leave it out"),
        (("--lr", "1"), "--lr: the run in"),
        (("--stage", 2), "is of stage 1; resume that"),
    ):
        capsys.readouterr()
        assert run(*flags(world, 1, "--resume", "--out", here / "o", *more)) == 2
        assert sentence in capsys.readouterr().err
    state = here / "o/step-00000002/state.json"
    good = state.read_text()
    changed = json.loads(good)
    changed["counts"] = {"captions": 23}
    rewrite(state, json.dumps(changed))
    assert run(*flags(world, 1, "--resume", "--out", here / "o")) == 2
    assert "the data have changed since" in capsys.readouterr().err
    rewrite(state, good)
    optimizer = state.with_name("optimizer.safetensors")
    tensors = weights.files.load_tensors(optimizer)
    del tensors["adapter.fc1.weight.exp_avg"]
    weights.files.save_tensors(tensors, optimizer)
    rewrite(optimizer, optimizer.read_bytes())
    assert run(*flags(world, 1, "--resume", "--out", here / "o")) == 2
    assert (
        "its optimizer state is another model's (adapter.fc1.weight.exp_avg)"
        in capsys.readouterr().err
    )
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert run(*flags(world, 1, "--resume", "--out", here / "o")) == 2
    assert "is not what was written" in capsys.readouterr().err


def rewrite(path, content):
    """A file of a checkpoint replaced by one that its checksums vouch for."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sums = json.loads((path.parent / "checksums.json").read_text())
    sums[path.name] = weights.checkpoint.checksum(path)
    (path.parent / "checksums.json").write_text(json.dumps(sums))


def test_the_newest_checkpoints_stay_and_minutes_count_too(world, here):
    assert (
        run(
            *flags(
                world,
                1,
                "--steps",
                6,
                "--save-every",
                0,
                "--save-minutes",
                "1e-9",
                "--keep",
                3,
                "--out",
                here / "o",
            )
        )
        == 0
    )
    assert [p.name for p in sorted((here / "o").glob("step-*"))] == [
        f"step-{n:08d}" for n in (4, 5, 6)
    ]
    with pytest.raises(BadInput):
        weights.checkpoint.find(here / "nothing")
