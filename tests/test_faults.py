"""What a run survives: signals, disks, lost ranks, damaged checkpoints, numbers that overflow, terminals.

The quick part; test_chaos.py does the same at length. Kills: test_resume.py. Bad data: test_data_bad.py.
"""

import gc
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest
import tiny
import torch
from faults import (
    alive,
    children,
    clean,
    contents,
    disk,
    finite,
    flags,
    forked,
    here,
    interrupted,
    killed,
    logged,
    lose_a_rank,
    mashed,
    one_sentence,
    run,
    stopped,
    straight,
    try_damaged,
    wait_for,
    world,
)
from test_sample import made

import support.files
import support.log
import train
import weights.checkpoint
import weights.files
from data import Data
from formats.mixture import load_mixture
from text.tokenizer import Tokenizer

__all__ = ["here", "world", "made"]  # fixtures


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_and_ctrl_c_at_any_moment_save_what_was_done_and_lose_nothing(world, here):
    settings = ["--steps", 120, "--save-every", 3]
    whole, curve = straight(world, here / "straight", 1, *settings)
    out, codes = stopped(world, here, 1, 6, random.Random(5), *settings)
    assert (
        contents(weights.checkpoint.find(out)) == whole and tiny.losses(out) == curve and 0 in codes
    )
    clean(out)


def test_a_signal_while_the_data_are_opened_ends_it_at_once_without_a_traceback(
    world, here, monkeypatch
):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(99)

    monkeypatch.setattr(train, "open_data", interrupted)
    with open(here / "said", "w") as said:
        if (pid := os.fork()) == 0:
            os.dup2(said.fileno(), 2)
            run(*flags(world, 1, "--out", here / "o"))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert (
        here / "said"
    ).read_text() == "train.py: stopped while no step was under way; --resume goes on\n"


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_any_point_leaves_whole_checkpoints_and_the_run_goes_on(
    world, here, capsys
):
    whole, curve = straight(world, here / "straight", 1, "--steps", 5, "--save-every", 1)
    for size in ("4k", "300k", "600k"):
        with disk(here / "small", size) as change:
            out = here / "small/o"
            one_sentence(
                capsys, run(*flags(world, 1, "--steps", 5, "--save-every", 1, "--out", out)), out
            )
            finite(out)
            change("size=9m")
            assert (
                run(*flags(world, 1, "--steps", 5, "--save-every", 1, "--out", out, "--resume"))
                == 0
            )
            assert contents(weights.checkpoint.find(out)) == whole and tiny.losses(out) == curve, (
                size
            )
            clean(out)


def test_a_limit_on_the_size_of_files_is_such_a_disk_where_none_can_be_mounted(world, here, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (100, 20_000, 250_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            out = here / str(size)
            one_sentence(
                capsys, run(*flags(world, 1, "--steps", 5, "--save-every", 1, "--out", out)), out
            )
            finite(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(*flags(world, 1, "--steps", 5, "--save-every", 1, "--out", out, "--resume")) == 0


def test_a_folder_that_becomes_read_only_and_a_file_in_a_folders_place_are_said(
    world, here, capsys
):
    (here / "file").write_text("mine")
    one_sentence(capsys, run(*flags(world, 1, "--out", here / "file")), here / "file")
    (here / "late").mkdir()
    (here / "late/log.jsonl").mkdir()
    one_sentence(capsys, run(*flags(world, 1, "--out", here / "late")), here / "late/log.jsonl")
    with disk(here / "small", "9m") as change:
        settings = flags(world, 1, "--steps", 6, "--save-every", 2, "--out", here / "small/o")
        change("ro")
        one_sentence(capsys, run(*settings), here / "small/o")
        change("rw")
        assert run(*settings) == 0
        shutil.rmtree(here / "small/o/step-00000006")
        change("ro")
        one_sentence(capsys, run(*settings, "--resume"), here / "small/o")
        change("rw")
        assert run(*settings, "--resume") == 0


def test_a_folder_that_is_removed_under_a_run_ends_it_with_a_sentence(world, here):
    (process,) = tiny.start(
        here, *flags(world, 1, "--steps", 2000, "--save-every", 50, "--out", here / "o"), slow=0.01
    )
    wait_for(lambda: logged(here / "o") > 3)
    shutil.rmtree(here / "o")
    process.join(60)
    said = tiny.said(here)
    assert process.exitcode == 2 and "Traceback" not in said and f"train.py: {here}/o/" in said, (
        said[-2000:]
    )


def test_an_output_that_takes_no_more_is_a_sentence(made, world, here):
    argv = flags(world, 1, "--steps", 2, "--out", here / "o", "--device", "cpu")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, tiny.ROOT / "train.py", *argv], stdout=full, stderr=subprocess.PIPE
        )
    last = done.stderr.decode().splitlines()[-1]
    assert (
        done.returncode == 2
        and "No space left on device" in last
        and b"Traceback" not in done.stderr
    ), done.stderr
    code, said = forked(
        ["--ckpt", "ck", "--device", "cpu", "--prompt", "hello"], made, {1: open("/dev/full", "w")}
    )
    assert code == 2 and said.count("\n") == 1 and "No space left on device" in said, said


def test_a_checkpoint_that_is_cut_or_flipped_anywhere_is_refused_or_harmless(world, here, capsys):
    out = here / "o"
    whole, _ = straight(world, out, 2, "--steps", 4, "--save-every", 2, "--keep", 9)
    shutil.rmtree(out / "step-00000004")
    counts = try_damaged(
        world, out, capsys, out / "step-00000002", (0, 35, 70, 99), 40, random.Random(0), whole
    )
    assert counts[0] > 60 and sum(counts) == 4 * 6 + 40, counts
    for name in (
        "model.safetensors",
        "tokenizer.model",
        "optimizer.safetensors",
        "state.json",
        "checksums.json",
    ):
        file = out / "step-00000002" / name
        file.rename(here / "away")
        one_sentence(capsys, run(*flags(world, 2, "--out", out, "--resume")), out / "step-00000002")
        (here / "away").rename(file)


def test_what_a_checkpoint_says_of_itself_is_not_believed_before_its_checksum_is_right(
    world, here, capsys
):
    assert run(*flags(world, 1, "--steps", 4, "--save-every", 2, "--out", here / "o")) == 0
    shutil.rmtree(here / "o/step-00000004")
    state = here / "o/step-00000002/state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 6'))
    one_sentence(
        capsys,
        run(*flags(world, 1, "--out", here / "o", "--resume")),
        "state.json: is not what was written",
    )


def test_files_of_a_checkpoint_have_the_rights_that_other_new_files_have(world, here):
    before = os.umask(0o027)
    try:
        assert run(*flags(world, 1, "--steps", 1, "--out", here / "o")) == 0
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in weights.checkpoint.find(here / "o").iterdir()} == {
        0o640
    }


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_killed_or_stopped_ends_the_job_with_its_name_and_the_job_goes_on(
    world, here
):
    rng = random.Random(0)
    lose_a_rank(world, here, signal.SIGKILL, 1, rng)
    out, took = lose_a_rank(world, here, signal.SIGSTOP, 0, rng)
    assert tiny.finish(
        tiny.start(here, *flags(world, 3, "--resume", "--out", out), world=2), 120
    ) == [0, 0]
    assert len(tiny.losses(out)) == 60


# ---- numbers ---------------------------------------------------------------------------------------------------------


def scaled(folder, factor):
    model = tiny.model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    weights.checkpoint.save(folder, model, Tokenizer(tiny.TOKENIZER), {"preset": "toy"})
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_or_a_gradient_that_overflows_is_never_trained_on(world, here, capsys, stage):
    start = scaled(here / "large", 1e18)  # products leave fp32's range
    before = [p.clone() for p in weights.checkpoint.load(start).parameters()]
    argv = flags(world, stage, "--steps", 6, "--save-every", 1, "--out", here / "o")
    argv[argv.index("--init") + 1] = str(start)
    one_sentence(
        capsys, run(*argv), "3 updates in a row had no finite gradient and were skipped; lower --lr"
    )
    assert not tiny.losses(here / "o") or all(x == 0 for x in tiny.losses(here / "o").values())
    for folder in (here / "o").glob("step-*"):
        assert all(
            torch.equal(a, b) for a, b in zip(before, weights.checkpoint.load(folder).parameters())
        )


@pytest.mark.parametrize(
    "rate, sentence", [("1e30", "no finite gradient"), ("1e39", "is no longer finite and is not")]
)
def test_a_learning_rate_that_wrecks_the_weights_ends_in_a_sentence_and_no_wreck_is_saved(
    world, here, capsys, rate, sentence
):
    argv = flags(world, 2, "--steps", 9, "--save-every", 1, "--lr", rate, "--out", here / "o")
    one_sentence(capsys, run(*argv), sentence)
    finite(here / "o")


def poisoned(folder, name, value):
    shutil.copytree("start", folder)
    tensors = weights.files.load_tensors(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    weights.files.save_tensors(tensors, folder / "model.safetensors")
    sums = json.loads((folder / "checksums.json").read_text())
    file = folder / "model.safetensors"
    sums[file.name] = weights.checkpoint.checksum(file)
    (folder / "checksums.json").write_text(json.dumps(sums))
    return folder


@pytest.mark.parametrize(
    "name, value",
    [
        ("llm.embed.weight", math.nan),
        ("llm.layers.1.up.weight", math.inf),
        ("vit.positions", -math.inf),
        ("adapter.fc2.bias", math.nan),
    ],
)
def test_a_weight_file_with_a_nan_or_an_infinity_is_refused_by_name(
    world, here, capsys, name, value
):
    argv = flags(world, 1, "--steps", 2, "--out", here / "o")
    argv[argv.index("--init") + 1] = str(poisoned(here / "bad", name, value))
    one_sentence(capsys, run(*argv), f"{name}: the weights to start from are not finite")
    assert not list((here / "o").glob("step-*"))


# ---- a terminal ------------------------------------------------------------------------------------------------------


def test_a_chat_survives_any_keys_and_any_size_of_its_window(made):
    mashed(made, 6, random.Random(1))


def test_ctrl_c_and_ctrl_d_end_it_at_any_moment(made):
    interrupted(made, 6, random.Random(2))
    interrupted(made, 1, random.Random(3), fresh=True)  # while torch is being loaded


def test_a_closed_pipe_and_closed_files_end_in_peace_or_in_a_sentence(made):
    common = ["--ckpt", "ck", "--device", "cpu"]
    read, write = os.pipe()
    os.close(read)  # as `| head` does in its time
    assert forked(
        [*common, "--image", "photos", "--task", "caption"], made, {1: open(write, "w")}
    ) == (0, "")
    assert forked(common, made) == (0, "")
    assert forked([*common, "--prompt", "hello"], made, closed=(1,)) == (0, "")
    assert forked([*common, "--prompt", "hello"], made, closed=(0, 1, 2))[0] == 0
    code, said = forked(common, made, closed=(0,))
    assert (
        code == 2
        and said == "a chat reads its questions from the input, and that is closed; add --prompt\n"
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def vqa_world(folder, scenes=200):
    """A world of its own, as its files will be damaged."""
    tiny.world(folder, scenes=scenes)
    return folder


def bad_count(out):
    """Unreadable samples as the log, the list and the checkpoint count them."""
    counts = {
        [r for r in support.log.records(out) if "bad" in r][-1]["bad"],
        len((out / "unreadable.txt").read_text().splitlines()),
        support.files.read_json(weights.checkpoint.find(out) / "state.json")["bad"],
    }
    assert len(counts) == 1, counts
    return counts.pop()


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_cannot_be_read_are_counted_the_same_in_a_run_that_was_killed(
    here, monkeypatch, workers
):
    world = vqa_world(here / "w")
    for n in (7, 77):
        (world / f"out/toy/images/{n}.png").write_bytes(b"404")  # 1% of 200
    settings = ["--steps", 60, "--save-every", 4, "--max-bad", 0.05]
    straight(world, here / "straight", 1, *settings)
    data = Data(str(world / "out/toy/stage1.toml"), Tokenizer(tiny.TOKENIZER), 16, 4, 256, batch=8)
    met = sum(number in (7, 77) for step in range(60) for _, number in data.rows(step).tolist())
    assert bad_count(here / "straight") == met > 0
    out, _ = killed(world, here, 1, 4, random.Random(workers), *settings, "--workers", workers)
    assert bad_count(out) == met and contents(weights.checkpoint.find(out)) == contents(
        weights.checkpoint.find(here / "straight")
    )


def test_annotations_replaced_under_a_run_are_not_trained_on_and_the_old_ones_go_on(here, capsys):
    world = vqa_world(here / "w", 24)
    file, settings = world / "out/toy/captions.json", ["--steps", 200, "--save-every", 1]
    whole, _ = straight(world, here / "straight", 1, *settings)
    old, other = (
        file.read_bytes(),
        file.read_bytes().replace(b"ground", b"ceding"),
    )  # as long, still JSON
    (process,) = tiny.start(
        here, *flags(world, 1, *settings, "--out", here / "o", "--workers", 1), slow=0.02
    )
    wait_for(lambda: logged(here / "o") >= 3)
    file.write_bytes(other)  # in place: the open file shows other bytes
    process.join(60)
    said = tiny.said(here)
    assert (
        process.exitcode == 2 and f"{file}: has changed since it was indexed; start again" in said
    ), said[-2000:]
    assert "Traceback" not in said and 3 <= logged(here / "o") < 200
    one_sentence(
        capsys,
        run(*flags(world, 1, "--out", here / "o", "--resume")),
        "the data have changed since",
    )
    file.write_bytes(old)
    (process,) = tiny.start(here, *flags(world, 1, "--out", here / "o", "--resume"), slow=0.02)
    at = logged(here / "o")
    wait_for(lambda: logged(here / "o") >= at + 3)
    file.with_suffix(".new").write_bytes(other)
    file.with_suffix(".new").replace(file)  # renamed into place: the old one stays open
    process.join(60)
    assert process.exitcode == 0 and contents(weights.checkpoint.find(here / "o")) == whole


def test_ranks_that_see_other_texts_under_the_same_names_are_refused(world, here):
    other = vqa_world(here / "w", 24)
    for name in ("vqa", "chat", "captions"):
        file = other / f"out/toy/{name}.json"
        file.write_bytes(file.read_bytes().replace(b"red", b"tan"))
    argv = flags(world, 3, "--steps", 3, "--out", here / "o")
    argv[argv.index("--data") + 1] = "out/toy/stage3.toml"
    processes = tiny.start(here, *argv, world=2, places={0: world, 1: other})
    assert tiny.finish(processes, 120) == [2, 2]
    for place in (world, other):
        assert "the ranks differ in flags or data; start all with the same" in tiny.said(place)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_loader_that_the_kernel_kills_ends_the_run_with_a_sentence_and_one_that_is_asked_to_leave_stays(
    world, here, number
):
    settings = flags(
        world, 2, "--steps", 60, "--save-every", 1, "--out", here / "o", "--workers", 2
    )
    (process,) = tiny.start(here, *settings, slow=0.02)
    wait_for(lambda: logged(here / "o") >= 5)
    os.kill(children(process.pid)[0], number)
    process.join(60)
    said = tiny.said(here)
    assert "Traceback" not in said and process.exitcode == (2 if number == signal.SIGKILL else 0), (
        said[-2000:]
    )
    if number != signal.SIGKILL:
        return
    assert (
        "train.py: a loader process has gone (DataLoader worker (pid" in said
        and "--resume goes on" in said
    )
    assert (
        run(*flags(world, 2, "--out", here / "o", "--resume")) == 0
        and len(tiny.losses(here / "o")) == 60
    )


def test_a_loader_stays_where_the_signal_comes_before_it_has_begun(world, here, monkeypatch):
    begin = torch.utils.data._utils.worker.signal_handling._set_worker_signal_handlers

    def asked_to_leave():
        begin()  # torch's: SIGTERM ends a loader
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(
        torch.utils.data._utils.worker.signal_handling,
        "_set_worker_signal_handlers",
        asked_to_leave,
    )
    assert run(*flags(world, 1, "--steps", 2, "--workers", 1, "--out", here / "o")) == 0


def test_loaders_never_outlive_their_trainer_be_it_killed_or_ended_by_a_bug(
    world, here, monkeypatch
):
    settings = "--steps", 500, "--workers", 2
    (process,) = tiny.start(
        here, *flags(world, 1, *settings, "--batch", 256, "--out", here / "o"), slow=0.02
    )
    wait_for(lambda: logged(here / "o") >= 3)  # batches that fill a pipe
    loaders = children(process.pid)
    process.kill()
    wait_for(lambda: not any(map(alive, loaders)), 30)
    loaders += children(os.getpid())  # of other tests

    def bug(*args):
        loaders.extend(set(children(os.getpid())) - set(loaders))
        raise ZeroDivisionError

    monkeypatch.setattr(train, "update", bug)
    before, handler = len(loaders), signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ZeroDivisionError) as kept:  # holds the loop's frame, as sys.last_exc does
        run(*flags(world, 1, *settings, "--out", here / "p"))
    assert len(loaders) >= before + 2
    wait_for(lambda: not any(map(alive, loaders[before:])), 30)
    del kept
    gc.collect()  # torch forgets them,
    signal.signal(signal.SIGCHLD, handler)  # and may look after others again


def tar_source(folder):
    """A world whose stage 1 reads a tar of 40 samples."""
    vqa_world(folder, 40)
    toy = folder / "out/toy"
    with tarfile.open(toy / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for n in range(40):
            picture = (toy / f"images/{n}.png").read_bytes()
            for name, content in ((f"{n}.png", picture), (f"{n}.txt", b"a plain ground")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (toy / "stage1.toml").write_text(
        '[[source]]\nname = "t"\nformat = "caption-shards"\nshards = "0.tar"\n'
    )
    return toy / "0.tar"


def test_a_tar_that_is_cut_before_or_under_a_run_is_said_and_so_is_a_source_that_nothing_can_be_read_of(
    here, capsys
):
    world = here / "w"
    tar = tar_source(world)
    good, settings = (
        tar.read_bytes(),
        flags(world, 1, "--steps", 400, "--save-every", 0, "--out", here / "o"),
    )
    for length in (*range(100, 512 * 4, 333), 512 * 2, 512 * 8):
        tar.write_bytes(good[:length])
        one_sentence(capsys, run(*settings), "0.tar: ")
    tar.write_bytes(good)
    (process,) = tiny.start(here, *settings, slow=0.02)
    wait_for(lambda: logged(here / "o") >= 3)
    with open(tar, "r+b") as f:
        f.truncate(len(good) // 2)
    process.join(60)
    said = tiny.said(here)
    assert (
        process.exitcode == 2
        and "0.tar: has changed since it was indexed" in said
        and "Traceback" not in said
    ), said
    tar.write_bytes(good)
    shutil.rmtree(here / "o")
    for picture in (world / "out/toy/images").iterdir():
        picture.write_bytes(b"")
    argv = flags(world, 2, "--out", here / "o")
    one_sentence(capsys, run(*argv), "cannot be read as an image")


def test_a_damaged_index_is_made_anew(here, tmp_path):
    world = vqa_world(here / "w", 24)
    opened = lambda: load_mixture(world / "out/toy/stage1.toml")[0]
    first, folder = opened().lengths, here / "cache/nanoinfmllm"
    for file in folder.glob("*.npz"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    assert opened().lengths.tolist() == first.tolist()
