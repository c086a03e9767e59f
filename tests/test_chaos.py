"""The long fault campaign, `python -m pytest -m chaos`: what test_resume.py, test_faults.py and test_fuzz.py do a few
times, done often; FILES=20000 reads more mutated ones, RESTARTS=10 has torchrun start more runs again. Most print what
they tried and what came of it; -s shows it.
"""

import os
import random
import signal
import subprocess
import sys

import pytest
import tiny
from faults import (
    beside,
    children,
    filled,
    flags,
    interrupted,
    killed,
    logged,
    lose_ranks,
    mashed,
    one_sentence,
    poisoned,
    run,
    stopped,
    straight,
    try_damaged,
    wait_for,
)
from fuzz import READERS, fuzz

import support.start

pytestmark = pytest.mark.chaos
FILES = int(os.environ.get("FILES", 3_000))
RESTARTS = int(os.environ.get("RESTARTS", 4))
ROWS = {  # what once fell to attacks, and the quick tests that were written then
    "two runs in one folder": ["support/test_lock.py"],
    "pictures of any shape": [
        "formats/test_pictures.py::test_a_long_screenshot_is_padded_to_its_square_within_300_megabytes",
        "formats/test_pictures.py::test_what_is_no_picture_is_refused_by_record_and_file",
    ],
    "compressed weights, strange tensors, long headers": [
        "weights/test_configs.py",
        "weights/test_files.py",
        "weights/test_rename.py",
    ],
    "commands to a terminal": [
        "test_sample.py::test_commands_to_a_terminal_are_shown_as_unknown_characters",
        "test_evaluate.py::test_commands_to_a_terminal_in_an_answer_do_not_reach_the_files",
    ],
    "two that draw one world": [
        "test_toy.py::test_of_two_that_draw_one_world_at_once_the_first_is_kept_and_both_end_well"
    ],
    "a checkpoint that is pruned": ["support/test_start.py"],
    "pipes and devices": [
        "formats/test_json_index.py",
        "formats/test_mixture.py",
        "formats/test_pictures.py::test_a_folder_and_a_pipe_are_refused_and_not_waited_for",
    ],
    "a closed output": [
        "test_faults.py::test_a_closed_pipe_and_closed_files_end_in_peace_or_in_a_sentence",
        "test_faults.py::test_an_output_that_takes_no_more_is_a_sentence",
    ],
    "changed questions, pictures written over, flags without bounds": [
        "support/test_commands.py",
        "test_evaluate.py",
        "test_look.py",
    ],
}


def spin():
    while True:
        pass


@pytest.mark.parametrize("row", ROWS)
def test_what_once_fell_holds_on_busy_cores(row):
    tests = [str(tiny.ROOT / "tests" / name) for name in ROWS[row]]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    with beside(spin), beside(spin):
        done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_model_is_loaded_two_hundred_times_while_its_run_saves_and_prunes(world, here):
    out = here / "o"
    settings = "--steps", 100_000, "--save-every", 1, "--keep", 1, "--out", out
    (process,) = tiny.start(here, *flags(world, 1, *settings))
    wait_for(lambda: list(out.glob("step-*[0-9]")))
    before = logged(out)
    for _ in range(200):
        support.start.load_model(out, device="cpu")
    saved = logged(out) - before
    process.kill()
    process.join()
    print(f"200 times loaded while {saved} checkpoints were written and as many pruned")
    assert saved > 20


def test_torchrun_starts_lost_ranks_again_and_the_run_goes_on_by_itself(world, here):
    rng = random.Random(20)
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2".split()
    settings = "--steps", 200, "--save-every", 1, "--timeout", 20, "--resume"
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with beside(spin), beside(spin), open(here / "said.txt", "w") as said:
        for n in range(RESTARTS):
            out = here / f"o{n}"
            argv = tiny.ROOT / "train.py", *flags(world, 3, *settings, "--out", out)
            process = subprocess.Popen(
                [sys.executable, *command, *argv], env=environment, stdout=said, stderr=said
            )
            for goal in (10, 60):
                wait_for(lambda: logged(out) >= goal, 300)  # noqa: B023
                os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
            assert process.wait(300) == 0, tiny.said(here)[-3000:]
            assert len(tiny.losses(out)) == 200
    print(
        f"{RESTARTS} runs of two ranks, of which one was killed, twice: all went on by themselves"
    )


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
        ("{} --prompt hello >&-", 2, "so there is nowhere to answer; open it\n"),
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
def test_thousands_of_mutated_files_of_each_kind(tmp_path, kind):
    outcomes = fuzz(kind, tmp_path, FILES, seed=2)
    faults = [f"{n}: {said}" for n, said in enumerate(outcomes) if said.startswith("fault")]
    print(f"{kind}: {outcomes.count('read')} of {FILES} read, {len(faults)} faults")
    assert not faults, "\n".join(faults[:50])
