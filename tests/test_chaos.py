"""The long fault campaign, `python -m pytest -m chaos`: what test_resume.py, test_faults.py and test_fuzz.py do a few
times, done as often as the README says. Each test prints what it tried and what came of it; -s shows it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from faults import (
    RUN,
    clean,
    contents,
    disk,
    finite,
    flags,
    here,
    interrupted,
    killed,
    lose_a_rank,
    mashed,
    one_sentence,
    run,
    stopped,
    straight,
    try_damaged,
    world,
)
from fuzz import READERS, fuzz
from test_faults import poisoned
from test_sample import made

import weights.checkpoint
import weights.files

pytestmark = pytest.mark.chaos
__all__ = ["here", "world", "made"]  # fixtures


@pytest.mark.parametrize("stage, kills", [(1, 34), (2, 33), (3, 33)])
def test_a_hundred_kills_over_three_stages_change_no_byte(world, here, stage, kills):
    whole, curve = straight(world, here / "straight", stage, *RUN)
    more = (*RUN, "--workers", int(stage == 3))
    out, writing = killed(world, here, stage, kills, random.Random(stage), *more)
    assert contents(weights.checkpoint.find(out)) == whole and tiny.losses(out) == curve
    clean(out)
    print(
        f"stage {stage}: {kills} kills, {writing} of them while a checkpoint was written; bytes equal, nothing left"
    )
    assert writing >= kills // 4


@pytest.mark.parametrize("stage, times", [(1, 17), (2, 17), (3, 16)])
def test_fifty_signals_save_and_resume(world, here, stage, times):
    more = ("--steps", 300, "--save-every", 7, "--workers", stage % 2)
    whole, curve = straight(world, here / "straight", stage, *more)
    out, codes = stopped(world, here, stage, times, random.Random(stage), *more)
    assert contents(weights.checkpoint.find(out)) == whole and tiny.losses(out) == curve
    clean(out)
    print(
        f"stage {stage}: {times} signals: {codes.count(0)} saved and left with 0, {codes.count(130)} before a step"
    )


def test_a_disk_of_every_size(world, here, capsys):
    whole, curve = straight(world, here / "straight", 1, "--steps", 4, "--save-every", 1)
    tried = 0
    for size in range(4, 900, 28):
        with disk(here / "small", f"{size}k") as change:
            out = here / "small/o"
            settings = flags(world, 1, "--steps", 4, "--save-every", 1, "--out", out)
            capsys.readouterr()
            if run(*settings):
                one_sentence(capsys, 2, out)
                finite(out)
                change("size=9m")
                assert run(*settings, "--resume") == 0
                tried += 1
            assert contents(weights.checkpoint.find(out)) == whole and tiny.losses(out) == curve, (
                size
            )
            clean(out)
    print(
        f"{tried} full disks: a sentence each, the checkpoints whole, and the run went on to the same bytes"
    )
    assert tried >= 15


def test_a_checkpoint_cut_at_every_percent_and_flipped_in_two_hundred_places(world, here, capsys):
    out = here / "o"
    whole, _ = straight(world, out, 2, "--steps", 3, "--save-every", 2, "--keep", 9)
    shutil.rmtree(out / "step-00000003")
    refused, harmless = try_damaged(
        world, out, capsys, out / "step-00000002", range(100), 200, random.Random(0), whole
    )
    print(f"{refused} damaged checkpoints refused, {harmless} harmless")
    assert refused + harmless == 800


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_ranks_that_are_killed_or_stopped_at_any_step(world, here, more):
    rng, times = random.Random(len(more)), []
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP):
        for victim in (0, 1):
            out, took = lose_a_rank(world, here, number, victim, rng, *more)
            times.append(took)
    assert tiny.finish(
        tiny.start(here, *flags(world, 3, "--resume", "--out", out, *more), world=2), 300
    ) == [0, 0]
    assert len(tiny.losses(out)) == 60
    print(
        f"{len(times)} ranks lost; the other left after {max(times):.0f} s at most (--timeout 20); the run went on"
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_nan_in_any_tensor_is_refused_by_name(world, here, capsys, stage):
    names = sorted(weights.files.load_tensors(world / "start/model.safetensors"))
    for name in names:
        argv = flags(world, stage, "--steps", 2, "--out", here / "o")
        argv[argv.index("--init") + 1] = str(poisoned(here / "bad", name, float("nan")))
        one_sentence(capsys, run(*argv), f"{name}: the weights to start from are not finite")
        shutil.rmtree(here / "bad")
    print(f"stage {stage}: a NaN in each of {len(names)} tensors refused")


def test_chats_under_two_hundred_bouts_of_keys(made):
    mashed(made, 100, random.Random(10))
    interrupted(made, 90, random.Random(11))
    interrupted(made, 10, random.Random(12), fresh=True)
    print(
        "100 chats under 40 random keys each and 100 under Ctrl-C or Ctrl-D: no traceback, no hang"
    )


def test_pipes_and_closed_files_of_a_real_shell(made):
    for line, code, says in (
        ("{} --image photos --task caption --min-new-tokens 1 | head -1 > first", 0, ""),
        ("{} < /dev/null > /dev/null", 0, ""),
        ("{} <&-", 2, "that is closed; add --prompt\n"),
        ("{} --prompt hello >&-", 0, ""),
        ("echo hello | {} | true", 0, ""),
        ("setsid {} < /dev/null", 0, ""),
        ("{} --prompt hello > /dev/full", 2, "where a run had begun\n"),
    ):
        command = f"{sys.executable} {tiny.ROOT / 'sample.py'} --ckpt ck --device cpu"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line.format(command)],
            cwd=made,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == code and done.stderr.endswith(says), (line, done)
        assert done.stderr.count("\n") == bool(says), (line, done)


@pytest.mark.parametrize("kind", READERS)
def test_twenty_thousand_mutated_files_of_each_kind(tmp_path, kind):
    totals, faults = fuzz(kind, tmp_path, 20_000, seed=2)
    print(f"{kind}: {totals}, {len(faults)} faults")
    assert not faults, "\n".join(faults[:50])
