"""Faults made on purpose: the moves that test_faults.py makes a few times and test_chaos.py many times.

train.main runs in this process, or in one that is forked from a server that has imported torch (tiny.start): the
program as a user runs it, without two seconds of imports a time. What happens during the imports has tests of its own.
"""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tiny
import torch

import sample
import support.log
import support.start
import train
import weights.checkpoint
import weights.files
from support.errors import BadInput
from text.tokenizer import Tokenizer

FAST = "--workers 0 --batch 8 --log-every 1 --eval-every 0".split()


def flags(world, stage, *more):
    data = world / f"out/toy/stage{stage}.toml"
    argv = "--stage", stage, "--init", world / "start", "--data", data, *FAST, *more
    return [str(a) for a in argv]


def run(world, stage, *more):
    return train.main(flags(world, stage, *more))


def one_sentence(capsys, code, *names):
    """A program that has refused: exit code 2, one line that holds these names, no traceback."""
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and len(err) < 1500, (code, err)
    assert "Traceback" not in err
    for name in names:
        assert str(name) in err, err


def left(out):
    """What a run leaves: names of its files, bytes of the last checkpoint, losses."""
    names = sorted(p.name for p in out.iterdir())
    last = weights.checkpoint.find(out)
    tensors = [(last / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer")]
    return names, tensors, tiny.losses(out)


def straight(world, out, stage, *more):
    """What a run leaves that nobody disturbs."""
    assert run(world, stage, *more, "--out", out) == 0
    return left(out)


def logged(out):
    return max((r["step"] for r in support.log.records(out)), default=0)


def finite(out):
    """All checkpoints of a run are whole and hold finite weights alone."""
    for folder in out.glob("step-*"):
        weights.checkpoint.verify(folder)
        for name, t in weights.files.load_tensors(folder / "model.safetensors").items():
            assert t.isfinite().all(), name


def changed(folder, change):
    """A checkpoint to start from, whose weights change(name, weight) has changed."""
    model = tiny.model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            change(name, p)
    weights.checkpoint.save(folder, model, Tokenizer(tiny.TOKENIZER), {"preset": "toy"})
    return folder


def poisoned(folder, name, value):
    """One that holds a NaN or an infinity."""
    return changed(folder, lambda n, p: p.view(-1)[-1].fill_(value) if n == name else None)


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError, ValueError, IndexError):  # not there yet, or half written
            if found := condition():
                return found
        time.sleep(0.002)
    raise AssertionError("waited in vain")


# ---- processes -------------------------------------------------------------------------------------------------------


def children(pid):
    with suppress(OSError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def beside(do):
    """do() in a forked process, which is killed at the end of the block; -> its number"""
    pid = os.fork()
    if pid == 0:
        do()
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def catches(pid, number):
    """Whether a process has a handler for this signal."""
    mask = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return int(mask, 16) >> (number - 1) & 1


def halves(out):
    """Checkpoints that are being written, or were when their process was killed."""
    with suppress(FileNotFoundError):
        return {(p.name, p.stat().st_ino) for p in out.glob("*.new")}
    return set()


def aim(process, out, rng, moment):
    """Return when it is time to strike: while a checkpoint is written, after some steps, or at any time."""
    old = halves(out)
    goal = logged(out) + rng.randint(1, 3)
    until = time.monotonic() + rng.uniform(0, 0.5)
    strike = {
        "write": lambda: halves(out) - old,
        "step": lambda: logged(out) >= goal,
        "time": lambda: time.monotonic() > until,
    }
    while process.is_alive() and not strike[moment]():
        time.sleep(0.0005)
    if moment == "step":
        time.sleep(rng.uniform(0, 0.03))


def struck(world, out, stage, times, rng, strike, *more):
    """A run that is struck so often and goes on with --resume to its end; yields its exit codes."""
    for n in range(times):
        argv = flags(world, stage, *more, "--out", out, "--resume")
        (process,) = tiny.start(out.parent, *argv, slow=0.05)
        wait_for(lambda: catches(process.pid, signal.SIGTERM))  # noqa: B023
        aim(process, out, rng, ("write", "step", "write", "time")[n % 4])
        loaders = children(process.pid)
        strike(process)
        process.join(120)
        wait_for(lambda: not any(map(alive, loaders)))  # noqa: B023
        yield process.exitcode
    assert run(world, stage, *more, "--out", out, "--resume") == 0


def killed(world, out, stage, times, rng, *more):
    """-> how many of the kills hit the writing of a checkpoint"""
    writing, before = 0, set()
    for code in struck(world, out, stage, times, rng, lambda process: process.kill(), *more):
        assert code == -signal.SIGKILL, "the run was over before it had been killed so often"
        now = halves(out)
        writing += bool(now - before)
        before = now
    return writing


def stopped(world, out, stage, times, rng, *more):
    """SIGTERM or SIGINT, to the loaders too or not, as schedulers and terminals do it. -> exit codes"""

    def strike(process):
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        loaders = children(process.pid) if rng.random() < 0.5 else ()
        for pid in (process.pid, *loaders):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    codes = []
    for code in struck(world, out, stage, times, rng, strike, *more):
        codes.append(code)
        said = tiny.said(out.parent)
        assert code in (0, 130) and "Traceback" not in said, said[-3000:]
        assert said.count(": stopped") + said.count("stopped at") == len(codes), said[-3000:]
        saved = max((int(p.name[5:]) for p in out.glob("step-*")), default=0)
        assert saved >= logged(out), "steps were done and not saved"
    return codes


def lose_a_rank(world, out, number, victim, rng, *more):
    """Two ranks, of which one is killed or stopped at some step: the other names it and ends with 2."""
    place = Path(tempfile.mkdtemp(dir=out.parent))
    timeout = 600 if number == signal.SIGKILL else 6  # a killed one is noticed at once
    settings = "--steps", 60, "--save-every", 2, "--timeout", timeout, "--resume", "--out", out
    ranks = tiny.start(place, *flags(world, 3, *settings, *more), world=2, slow=0.02)
    goal = logged(out) + rng.randint(3, 6)
    wait_for(lambda: logged(out) >= goal)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(ranks[victim].pid, number)
    other = ranks[1 - victim]
    other.join(120)
    for p in ranks:
        p.kill()
        p.join()
    said = tiny.said(place)
    assert other.exitcode == 2 and "Traceback" not in said, (other.exitcode, said[-3000:])
    assert f"rank {1 - victim}: no answer from rank {victim} (" in said, said
    assert "training with --resume" in said


# ---- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def disk(folder, size):
    """A file system of so many bytes at `folder`. Skips the test where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", folder], check=True
        )
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def filled(world, folder, capsys, size, whole, *more):
    """A run on a disk of that size, which goes on where there is room. -> whether the disk was full"""
    with disk(folder, size) as change:
        out = folder / "o"
        code = run(world, 1, *more, "--out", out)
        if code:
            one_sentence(capsys, code, out)
            finite(out)
            change("size=9m")
            assert run(world, 1, *more, "--out", out, "--resume") == 0
        assert left(out) == whole, size
    return bool(code)


def damaged(folder, percents, flips, rng):
    """One file after another is cut, has a bit flipped, is gone; yields the file while it is so, and mends it."""
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for percent in percents:
            file.write_bytes(good[: len(good) * percent // 100])
            yield file
        for _ in range(flips):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            yield file
        file.unlink()
        yield file
        file.write_bytes(good)


def try_damaged(world, out, capsys, percents, flips, rng):
    """Resume from a checkpoint with each damage. -> (how often it was refused, how often it did no harm)"""
    settings = "--steps", 4, "--save-every", 2, "--keep", 9, "--out", out
    assert run(world, 2, *settings) == 0
    whole = left(out)
    shutil.rmtree(out / "step-00000004")
    folder = out / "step-00000002"
    refused = harmless = 0
    backup = out.with_name("backup")
    shutil.copytree(out, backup)
    for file in damaged(folder, percents, flips, rng):
        capsys.readouterr()
        code = run(world, 2, *settings, "--resume")
        if code == 0:  # then it must be as if nothing had happened
            assert left(out) == whole, file
            harmless += 1
            shutil.rmtree(out)
            shutil.copytree(backup, out)
            continue
        known = "" if file.name == "checksums.json" else "is not what was written"
        one_sentence(capsys, code, folder, known)
        with pytest.raises(BadInput):
            support.start.load_model(folder, device="cpu")
        refused += 1
    return refused, harmless


# ---- sample.py, in a terminal and without ---------------------------------------------------------------------------


def sample_py(argv, cwd, closed=(), fresh=False):
    """In a forked process: to be sample.py, begun afresh or as if its imports were done. Never returns."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as its first line does
        os.chdir(cwd)
        sys.argv = [str(tiny.ROOT / "sample.py"), *argv]
        if fresh:
            os.execv(sys.executable, [sys.executable, *sys.argv])
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            file = None if number in closed else open(number, "rw"[number > 0])
            setattr(sys, name, file)
        code = sample.run(sample.main)
        if sys.stdout:
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        if sys.stderr:
            sys.stderr.flush()
        os._exit(code)


def forked(argv, cwd, stdout=os.devnull, closed=()):
    """sample.py with nothing to read; some of its three files may be closed. -> (exit code, complaints)"""
    with open(os.devnull) as stdin, open(stdout, "w") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate((stdin, out, err)):
                os.dup2(file.fileno(), number)
            for number in closed:
                os.close(number)
            sample_py(argv, cwd, closed)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        return code, err.read()


class Terminal:
    """sample.py in a terminal of its own."""

    def __init__(self, *argv, cwd, fresh=False):
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            sample_py(argv, cwd, fresh=fresh)

    def read(self, seconds):
        """-> whether the other side is still there"""
        until = time.monotonic() + seconds
        while (wait := until - time.monotonic()) > 0 and select.select([self.fd], [], [], wait)[0]:
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError:
                return False
        return True

    def send(self, keys):
        with suppress(OSError):
            while keys and select.select([], [self.fd], [], 0.2)[1]:  # a full one takes no more
                keys = keys[os.write(self.fd, keys[:256]) :]

    def end(self, seconds=120):
        """After end-of-file, as often as it takes, it has ended without a traceback."""
        until = time.monotonic() + seconds
        done = 0
        while not done and time.monotonic() < until:
            self.read(0.05)
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if not done:
                self.send(b"\x11\x15\x04")
        if not done:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
        assert done, f"it hangs; its last words: {self.seen[-2000:]!r}"
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 130, -signal.SIGINT), code  # a shell calls the last one 130, too
        assert b"Traceback" not in self.seen, self.seen[-3000:]


KEYS = [
    b"\x03",
    b"\x04",
    b"\r",
    b"\n",
    b"\x7f",
    b"\x15",
    b"\x17",
    b"\x16",
    b"\x13\x11",
    b"\x1a",
    b"\t",
    b"\x1b[A",
    b"\x1b",
    b"\xff\xfe",
    "\u00e9\u4e2d\U0001f600".encode(),
    b"\0",
    b"what is it?\n",
    b"where\r",
    b"/reset\n",
    b"/box on\n",
    b"/box off\n",
    b"/image photos/wide.png\n",
    b"/image none.png\n",
    b"/image broken.png\n",
    b"/image \n",
    b"/image .\n",
    b"/nonsense\n",
    b"<ImageHere>\n",
    b"<image>\n",
    b"x" * 5000 + b"\n",
    b"hello " * 400 + b"\n",
]
CHAT = "--ckpt", "ck", "--device", "cpu"


def mashed(made, sessions, rng):
    """Chats under random keys, in a window that changes its size."""
    for _ in range(sessions):
        terminal = Terminal(*CHAT, "--image", "photos/tall.png", cwd=made)
        while b"> " not in terminal.seen and terminal.read(0.05):
            pass
        for _ in range(40):
            keys = bytes(rng.choices(range(1, 256), k=rng.randint(1, 12)))
            if rng.random() < 0.7:
                keys = rng.choice(KEYS)
            terminal.send(keys.replace(b"\x1c", b""))  # no SIGQUIT
            if rng.random() < 0.2:
                termios.tcsetwinsize(terminal.fd, (rng.randint(0, 90), rng.randint(0, 300)))
            if not terminal.read(rng.uniform(0, 0.02)):
                break
        terminal.end()


def interrupted(made, sessions, rng, fresh=False):
    """Ctrl-C or Ctrl-D, alone or after a question, at any moment of a chat, from its first import on if fresh."""
    keys = b"\x03", b"\x04", b"what?\n\x03", b"what?\n\x04", b"what?\n\x03\x03"
    for _ in range(sessions):
        terminal = Terminal(*CHAT, cwd=made, fresh=fresh)
        terminal.read(rng.uniform(0.3, 3) if fresh else rng.uniform(0, 0.4))
        terminal.send(rng.choice(keys))
        terminal.end()
