"""The long fault campaign, `python -m pytest -m chaos`: what test_resume.py, test_faults.py and test_fuzz.py do a few
times, done as often as LOG.md says; FILES=100 reads fewer mutated ones. Most print what they tried and what came of
it; -s shows it.
"""

import os
import random
import signal
import subprocess
import sys

import pytest
import tiny
from faults import (
    filled,
    interrupted,
    killed,
    lose_ranks,
    mashed,
    one_sentence,
    poisoned,
    run,
    stopped,
    straight,
    try_damaged,
)
from fuzz import READERS, fuzz

pytestmark = pytest.mark.chaos
FILES = int(os.environ.get("FILES", 20_000))


@pytest.mark.parametrize("stage, kills", [(1, 34), (2, 33), (3, 33)])
def test_a_hundred_kills_over_three_stages_change_no_byte(world, here, stage, kills):
    settings = "--steps", 160, "--save-every", 1, "--workers", int(stage == 3)
    writing = killed(world, here, stage, kills, random.Random(stage), *settings)
    print(f"stage {stage}: {kills} kills, {writing} while a checkpoint was written; bytes equal")
    assert writing >= kills // 4


@pytest.mark.parametrize("stage, times", [(1, 17), (2, 17), (3, 16)])
def test_fifty_signals_save_and_resume(world, here, stage, times):
    settings = "--steps", 300, "--save-every", 7, "--workers", stage % 2
    codes = stopped(world, here, stage, times, random.Random(stage), *settings)
    print(f"stage {stage}: {times} signals: {codes.count(0)} saved and left with 0, the rest 130")


def test_a_disk_of_every_size(world, here, capsys):
    settings = "--steps", 4, "--save-every", 1
    whole = straight(world, here / "straight", 1, *settings)
    full = 0
    for size in range(4, 900, 28):
        full += filled(world, here / "small", capsys, f"{size}k", whole, *settings)
    print(f"{full} full disks: a sentence each, whole checkpoints, and on to the same bytes")
    assert full >= 15


def test_a_checkpoint_cut_at_every_percent_and_flipped_in_two_hundred_places(world, here, capsys):
    damage = range(100), 34, random.Random(0)
    refused, harmless = try_damaged(world, here, capsys, *damage)
    print(f"{refused} damaged checkpoints refused, {harmless} harmless")
    assert refused + harmless == 6 * (100 + 34 + 1)


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_ranks_that_are_killed_or_stopped_at_any_step(world, here, more):
    signals = signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP
    lost = [(number, victim) for number in signals for victim in (0, 1)]
    lose_ranks(world, here, lost, random.Random(len(more)), *more)
    print("6 ranks lost; the other named it each time, and the run went on")


def test_a_nan_in_any_tensor_is_refused_by_name(world, here, capsys):
    for name, _ in tiny.model().named_parameters():
        start = poisoned(here / "bad", name, float("nan"))
        code = run(world, 1, "--init", start, "--steps", 2, "--out", here / "o")
        one_sentence(capsys, code, f"{name}: the weights to start from are not finite")


def test_chats_under_two_hundred_bouts_of_keys(made):
    mashed(made, 100, random.Random(10))
    interrupted(made, 90, random.Random(11))
    interrupted(made, 10, random.Random(12), fresh=True)
    print("100 chats under random keys and 100 under Ctrl-C or Ctrl-D: no traceback, no hang")


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("{} --image photos --task caption --min-new-tokens 1 | head -1 > /dev/null", 0, ""),
        ("{} <&-", 2, "that is closed; add --prompt\n"),
        ("{} --prompt hello >&-", 0, ""),
        ("echo hello | {} | true", 0, ""),
        ("setsid {} < /dev/null", 0, ""),
        ("{} --prompt hello > /dev/full", 2, "where a run had begun\n"),
    ],
)
def test_pipes_and_closed_files_of_a_real_shell(made, line, code, says):
    command = f"{sys.executable} {tiny.ROOT / 'sample.py'} --ckpt ck --device cpu"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.format(command)],
        cwd=made,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == code and done.stderr.endswith(says), done
    assert done.stderr.count("\n") == bool(says), done


@pytest.mark.parametrize("kind", READERS)
def test_twenty_thousand_mutated_files_of_each_kind(tmp_path, kind):
    outcomes = fuzz(kind, tmp_path, FILES, seed=2)
    faults = [f"{n}: {said}" for n, said in enumerate(outcomes) if said.startswith("fault")]
    print(f"{kind}: {outcomes.count('read')} of {FILES} read, {len(faults)} faults")
    assert not faults, "\n".join(faults[:50])
