"""What a run survives: signals, disks, lost ranks, damaged checkpoints, numbers that overflow, terminals.

The quick part; test_chaos.py does the same at length. Kills: test_resume.py.
"""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
from faults import (
    alive,
    beside,
    children,
    disk,
    filled,
    finite,
    flags,
    interrupted,
    killed,
    left,
    logged,
    lose_ranks,
    mashed,
    one_sentence,
    poisoned,
    run,
    stopped,
    straight,
    try_damaged,
    typed,
    wait_for,
)
from fuzz import TAR
from small import picture, tar_of

import support.files
import support.log
import train
import weights.checkpoint

EACH_STEP = "--steps", 5, "--save-every", 1


def after_steps(monkeypatch, number, do):
    """do() once, when this many steps have been trained in this process."""
    update = train.update
    done = []

    def update_and_do(*args):
        update(*args)
        done.append(None)
        if len(done) == number:
            do()

    monkeypatch.setattr(train, "update", update_and_do)


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_and_ctrl_c_at_any_moment_save_what_was_done_and_lose_nothing(world, here):
    settings = "--steps", 80, "--save-every", 3, "--workers", 1
    assert 0 in stopped(world, here, 1, 5, random.Random(5), *settings)


def test_a_signal_while_the_data_are_opened_ends_it_at_once_without_a_traceback(
    world, here, monkeypatch
):
    def open_slowly(*args):
        (here / "opening").touch()
        time.sleep(600)

    def child():
        tiny.settle(here)
        run(world, 1, "--out", here / "o")

    monkeypatch.setattr(train, "open_data", open_slowly)
    with beside(child) as pid:
        wait_for((here / "opening").exists)
        os.kill(pid, signal.SIGTERM)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended.si_status == 130
    said = "train.py: stopped while no step was under way; --resume goes on\n"
    assert tiny.said(here).endswith(said) and "Traceback" not in tiny.said(here)


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_any_point_leaves_whole_checkpoints_and_the_run_goes_on(
    world, here, capsys
):
    whole = straight(world, here / "straight", 1, *EACH_STEP)
    for size in ("4k", "300k", "600k"):
        assert filled(world, here / "small", capsys, size, whole, *EACH_STEP)


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint_and_says_which(
    world, here, capsys, monkeypatch
):
    """A limit on the size of files is a full disk where none can be mounted."""
    whole = straight(world, here / "straight", 1, *EACH_STEP)
    out = here / "o"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        after_steps(monkeypatch, 3, lambda: limit(20_000))
        code = run(world, 1, *EACH_STEP, "--out", out)
    finally:
        limit(soft)
    last = f"the last whole one is {out}/step-00000002; make room and --resume"
    one_sentence(capsys, code, f"{out}/step-00000003: the checkpoint cannot be written", last)
    names = [path.name for path in sorted(out.iterdir())]
    assert names == ["lock", "log.jsonl", "step-00000001", "step-00000002"]
    finite(out)
    assert run(world, 1, *EACH_STEP, "--out", out, "--resume") == 0
    assert left(out) == whole


def test_a_folder_that_becomes_read_only_and_a_file_in_a_folders_place_are_said(
    world, here, capsys
):
    (here / "file").write_text("mine")
    one_sentence(capsys, run(world, 1, "--out", here / "file"), here / "file")
    (here / "late/log.jsonl").mkdir(parents=True)
    one_sentence(capsys, run(world, 1, "--out", here / "late"), here / "late/log.jsonl")
    with disk(here / "small", "9m") as change:
        out = here / "small/o"
        settings = world, 1, *EACH_STEP, "--out", out
        change("ro")
        one_sentence(capsys, run(*settings), out)
        change("rw")
        assert run(*settings) == 0
        shutil.rmtree(out / "step-00000005")
        change("ro")
        one_sentence(capsys, run(*settings, "--resume"), out)
        change("rw")
        assert run(*settings, "--resume") == 0


def test_a_folder_that_is_removed_under_a_run_ends_it_with_a_sentence(
    world, here, capsys, monkeypatch
):
    out = here / "o"
    after_steps(monkeypatch, 3, lambda: shutil.rmtree(out))
    one_sentence(capsys, run(world, 1, *EACH_STEP, "--out", out), f"train.py: {out}/")


def test_an_output_that_takes_no_more_is_a_sentence(made, world, here):
    command = [sys.executable, tiny.ROOT / "train.py"]
    command += flags(world, 1, "--steps", 2, "--out", here / "o")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    hello = typed(made, "--prompt", "hello", stdout="/dev/full")
    for code, said in ((done.returncode, done.stderr), hello):
        assert code == 2 and "Traceback" not in said, said
        assert "No space left on device" in said.splitlines()[-1]


def test_a_checkpoint_that_is_cut_or_flipped_anywhere_is_refused_or_harmless(world, here, capsys):
    damage = (0, 35, 70, 99), 6, random.Random(0)
    refused, harmless = try_damaged(world, here, capsys, *damage)
    assert refused > 60 and refused + harmless == 6 * (4 + 6 + 1)


def test_files_of_a_checkpoint_have_the_rights_that_other_new_files_have(world, here):
    out = here / "o"
    assert run(world, 1, "--steps", 1, "--out", out) == 0
    files = out / "log.jsonl", *weights.checkpoint.find(out).iterdir()
    assert len({file.stat().st_mode for file in files}) == 1


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_killed_or_stopped_ends_the_job_with_its_name_and_the_job_goes_on(
    world, here
):
    lost = (signal.SIGKILL, 1), (signal.SIGSTOP, 0)
    lose_ranks(world, here, lost, random.Random(0))


def test_ranks_that_see_other_texts_under_the_same_names_are_refused(world, here):
    other = tiny.world(here / "w")
    for file in (other / "out/toy").glob("*.json"):
        file.write_bytes(file.read_bytes().replace(b"red", b"tan"))
    argv = flags(world, 3, "--steps", 3, "--data", "out/toy/stage3.toml", "--out", here / "o")
    ranks = tiny.start(here, *argv, world=2, places={0: world, 1: other})
    assert tiny.finish(ranks, 120) == [2, 2]
    for place in (world, other):
        assert "the ranks differ in flags or data; start all with the same" in tiny.said(place)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_or_a_gradient_that_overflows_is_never_trained_on(world, here, capsys, stage):
    start = poisoned(here / "large", "llm.norm.weight", 3e38)  # products leave fp32's range
    out = here / "o"
    code = run(world, stage, "--init", start, "--steps", 6, "--save-every", 1, "--out", out)
    one_sentence(capsys, code, "3 updates in a row had no finite gradient", "lower --lr")
    assert not any(tiny.losses(out).values())
    before = weights.checkpoint.load(start)
    for folder in out.glob("step-*"):
        assert tiny.same(weights.checkpoint.load(folder), before)


@pytest.mark.parametrize(
    "rate, sentence", [("1e30", "no finite gradient"), ("1e39", "is no longer finite and is not")]
)
def test_a_learning_rate_that_wrecks_the_weights_ends_in_a_sentence_and_no_wreck_is_saved(
    world, here, capsys, rate, sentence
):
    settings = "--steps", 9, "--save-every", 1, "--lr", rate, "--out", here / "o"
    one_sentence(capsys, run(world, 2, *settings), sentence)
    finite(here / "o")


@pytest.mark.parametrize(
    "name, value", [("llm.embed.weight", math.nan), ("vit.positions", -math.inf)]
)
def test_a_weight_file_with_a_nan_or_an_infinity_is_refused_by_name(
    world, here, capsys, name, value
):
    start = poisoned(here / "bad", name, value)
    code = run(world, 1, "--init", start, "--steps", 2, "--out", here / "o")
    one_sentence(capsys, code, f"{name}: the weights to start from are not finite")
    assert not list((here / "o").glob("step-*"))


# ---- sample.py -------------------------------------------------------------------------------------------------------


def test_a_chat_survives_any_keys_and_any_size_of_its_window(made):
    mashed(made, 6, random.Random(1))


def test_ctrl_c_and_ctrl_d_end_it_at_any_moment(made):
    interrupted(made, 6, random.Random(2))
    interrupted(made, 1, random.Random(3), fresh=True)  # while torch is being loaded


def test_a_closed_pipe_and_closed_files_end_in_peace_or_in_a_sentence(made):
    read, write = os.pipe()
    os.close(read)  # as `| head` does in its time
    captions = "--image", "photos", "--task", "caption"
    assert typed(made, *captions, stdout=write) == (0, "")
    assert typed(made) == (0, "")
    code, said = typed(made, "--prompt", "hello", closed=(1,))
    assert code == 2 and said.count("\n") == 1 and "output is closed" in said
    assert typed(made, "--prompt", "hello", closed=(0, 1, 2))[0] == 2
    code, said = typed(made, closed=(0,))
    assert code == 2 and said.count("\n") == 1 and "closed; add --prompt" in said


# ---- loaders ---------------------------------------------------------------------------------------------------------


def test_a_loader_that_the_kernel_kills_ends_the_run_with_a_sentence_and_one_that_is_asked_to_leave_stays(
    world, here
):
    out = here / "o"
    settings = "--steps", 60, "--save-every", 1, "--workers", 2, "--out", out
    (process,) = tiny.start(here, *flags(world, 2, *settings), slow=0.05)
    wait_for(lambda: logged(out) >= 3)
    loader = children(process.pid)[0]
    os.kill(loader, signal.SIGTERM)
    goal = logged(out) + 5  # more than has been loaded by now
    wait_for(lambda: logged(out) >= goal)
    os.kill(loader, signal.SIGKILL)
    assert tiny.finish([process]) == [2]
    said = tiny.said(here)
    assert "train.py: a loader process has gone (" in said and "--resume goes on" in said
    assert "Traceback" not in said
    assert run(world, 2, "--resume", "--out", out) == 0


def test_a_loader_stays_where_the_signal_comes_before_it_has_begun(world, here):
    trainer, known = os.getpid(), set(children(os.getpid()))

    def strike():  # each child of the trainer, the moment that it is born
        while True:
            for child in set(children(trainer)) - known - {os.getpid()}:
                os.kill(child, signal.SIGTERM)
                os.kill(child, signal.SIGINT)
                known.add(child)

    with beside(strike):
        assert run(world, 1, "--steps", 2, "--workers", 2, "--out", here / "o") == 0


def test_loaders_never_outlive_their_trainer_be_it_killed_or_ended_by_a_bug(
    world, here, monkeypatch
):
    settings = "--steps", 500, "--workers", 2
    (process,) = tiny.start(here, *flags(world, 1, *settings, "--out", here / "o"), slow=0.02)
    wait_for(lambda: logged(here / "o") >= 3)
    loaders = children(process.pid)
    assert len(loaders) == 2
    gone = lambda: not any(map(alive, loaders))
    for loader in loaders:
        os.kill(loader, signal.SIGSTOP)  # as one that waits for a disk
    process.kill()
    wait_for(gone)

    def bug(*args):
        (here / "loaders").write_text(" ".join(map(str, children(os.getpid()))))
        raise ZeroDivisionError

    def crash():
        try:
            run(world, 1, *settings, "--out", here / "p")
        except ZeroDivisionError:
            time.sleep(600)  # the traceback holds the loop and its loaders, as sys.last_exc does

    monkeypatch.setattr(train, "update", bug)
    with beside(crash) as pid:
        loaders = wait_for(lambda: (here / "loaders").read_text()).split()
        wait_for(gone)
        assert alive(pid)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_read_are_counted_the_same_in_a_run_that_was_killed(here):
    world = tiny.world(here / "w")
    for n in range(0, 24, 4):
        (world / f"out/toy/images/{n}.png").write_bytes(b"404")
    settings = "--steps", 40, "--save-every", 2, "--max-bad", 0.5, "--workers", 1
    killed(world, here, 1, 4, random.Random(0), *settings)
    counts = set()
    for out in (here / "o", here / "straight"):
        counts.add(support.log.records(out)[-1]["bad"])
        counts.add((out / "unreadable.txt").read_text().count("\n"))
        state = weights.checkpoint.find(out) / "state.json"
        counts.add(support.files.read_json(state)["bad"])
    assert len(counts) == 1 and counts != {0}


def test_annotations_replaced_under_a_run_are_not_trained_on_and_the_old_ones_go_on(
    here, capsys, monkeypatch
):
    world, out = tiny.world(here / "w"), here / "o"
    settings = "--steps", 20, "--save-every", 2, "--workers", 1
    whole = straight(world, here / "straight", 1, *settings)
    file = world / "out/toy/captions.json"
    old = file.read_bytes()
    other = old.replace(b"ground", b"ceding")  # as long, still JSON

    with monkeypatch.context() as patch:
        after_steps(patch, 3, lambda: file.write_bytes(other))  # the open file shows other bytes
        code = run(world, 1, *settings, "--out", out)
    one_sentence(capsys, code, f"{file}: has changed since it was indexed; start again")
    assert 3 <= logged(out) < 20
    one_sentence(
        capsys, run(world, 1, *settings, "--out", out, "--resume"), "the data have changed since"
    )

    file.write_bytes(old)

    def rename_into_place():  # the old one stays open
        file.with_suffix(".new").write_bytes(other)
        file.with_suffix(".new").replace(file)

    after_steps(monkeypatch, 3, rename_into_place)
    assert run(world, 1, *settings, "--out", out, "--resume") == 0
    assert left(out) == whole


def test_a_tar_that_is_cut_before_or_under_a_run_is_said(world, here, capsys, monkeypatch):
    (here / "m.toml").write_text(TAR)
    tar = here / "t.tar"
    members = []
    for n in range(8):
        members += [(f"{n}.png", picture()), (f"{n}.txt", b"a plain ground")]
    tar_of(tar, members)
    good = tar.read_bytes()
    settings = world, 1, "--data", here / "m.toml", "--steps", 400, "--out", here / "o"
    for length in (100, 700, 512 * 2):  # in a header, in a picture, between members
        tar.write_bytes(good[:length])
        one_sentence(capsys, run(*settings), "t.tar: ")
    tar.write_bytes(good)
    after_steps(monkeypatch, 3, lambda: os.truncate(tar, len(good) // 2))
    one_sentence(capsys, run(*settings), "t.tar: has changed since it was indexed")
