"""Faults made on purpose: the moves that test_faults.py makes a few times and test_chaos.py many times.

train.main runs in a process forked from one that has imported torch already (tiny.start): the program as a user runs
it, without two seconds of imports a time. Only what happens during the imports is left out, and has tests of its own.
"""

import errno
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
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

FAST = ["--workers", "0", "--batch", "8", "--log-every", "1", "--eval-every", "0"]
RUN = ["--steps", "160", "--save-every", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    """A folder for runs; the world is the current one."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "plot", lambda folder: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def flags(world, stage, *more):
    return [
        str(a)
        for a in (
            "--stage",
            stage,
            "--init",
            world / "start",
            "--data",
            world / f"out/toy/stage{stage}.toml",
            *FAST,
            *more,
        )
    ]


def run(*argv):
    return train.main([str(a) for a in argv])


def contents(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    }


def straight(world, folder, stage, *more):
    """What a run that nobody disturbs leaves: (its last checkpoint's bytes, its losses)."""
    assert run(*flags(world, stage, *more, "--out", folder)) == 0
    return contents(weights.checkpoint.find(folder)), tiny.losses(folder)


def logged(out):
    return max((r["step"] for r in support.log.records(out)), default=0)


def one_sentence(capsys, code, *names):
    """A program that has refused: exit code 2, one line that holds these names, no traceback."""
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err and len(err) < 1500, (
        code,
        err,
    )
    for name in names:
        assert str(name) in err, err
    return err


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if found := condition():
                return found
        except (OSError, ValueError):
            pass  # not there yet, or half written
        time.sleep(0.002)
    raise AssertionError("waited in vain")


def children(pid):
    with suppress(OSError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- killed and stopped ----------------------------------------------------------------------------------------------


def aim(process, out, rng, way):
    """Return at the moment to strike: a checkpoint is being written, or steps have been done, or just any time."""
    old, goal, until = (
        halves(out),
        logged(out) + rng.randint(1, 3),
        time.monotonic() + rng.uniform(0, 0.5),
    )
    strike = {
        "write": lambda: halves(out) - old,
        "step": lambda: logged(out) >= goal,
        "time": lambda: time.monotonic() > until,
    }[way]
    while process.is_alive() and not strike():
        time.sleep(0.0005)
    if way == "step":
        time.sleep(rng.uniform(0, 0.03))


def halves(out):
    """Checkpoints that are being written, or were when their process was killed."""
    with suppress(FileNotFoundError):
        return {(p.name, p.stat().st_ino) for p in out.glob("*.new")}
    return set()


def begun(process, folder):
    return not process.is_alive() or (folder / "begun").read_text() == str(process.pid)


def killed(world, folder, stage, kills, rng, *more, ways=("write", "step", "write", "time")):
    """A run that is killed so often and goes on with --resume. -> (its folder, kills that hit a write)"""
    out, done, writing = folder / "killed", 0, 0
    while True:
        before = halves(out)
        (process,) = tiny.start(
            folder, *flags(world, stage, *more, "--out", out, "--resume"), slow=0.05
        )
        wait_for(lambda: begun(process, folder))  # noqa: B023
        if done < kills:
            aim(process, out, rng, ways[done % len(ways)])
        else:
            process.join()
        helpers = children(process.pid)
        process.kill()
        process.join()
        wait_for(lambda: not any(map(alive, helpers)))  # noqa: B023  loader processes leave, too
        if process.exitcode != -signal.SIGKILL:
            break
        done, writing = done + 1, writing + bool(halves(out) - before)
    assert process.exitcode == 0 and done == kills, (
        process.exitcode,
        done,
        tiny.said(folder)[-3000:],
    )
    return out, writing


def stopped(world, folder, stage, times, rng, *more):
    """The same with SIGTERM and SIGINT, to the process or to its loader too, as a terminal and a scheduler do it."""
    out, codes = folder / "stopped", []
    while len(codes) < times:
        (process,) = tiny.start(
            folder, *flags(world, stage, *more, "--out", out, "--resume"), slow=0.05
        )
        wait_for(lambda: begun(process, folder))  # noqa: B023
        aim(process, out, rng, rng.choice(("write", "step", "time", "time")))
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        for pid in (process.pid, *(children(process.pid) if rng.random() < 0.5 else ())):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        process.join(120)
        said = (folder / "said.txt").read_text()
        assert process.exitcode in (0, 130) and "Traceback" not in said, (
            process.exitcode,
            said[-3000:],
        )
        codes.append(process.exitcode)
        steps = [int(p.name[5:]) for p in out.glob("step-*")]
        assert max(steps, default=0) >= logged(out), "steps were done and not saved"
        assert max(steps, default=0) < int(more[1]), (
            "the run was over before it had been stopped so often"
        )
    assert run(*flags(world, stage, *more, "--out", out, "--resume")) == 0
    return out, codes


def clean(out, keep=2):
    """Nothing is left beside the log and the newest checkpoints."""
    left = sorted(p.name for p in out.iterdir())
    assert (
        left[0] == "log.jsonl"
        and len(left) == 1 + keep
        and all(n.startswith("step-") and n[5:].isdigit() for n in left[1:])
    ), left


# ---- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def disk(folder, size):
    """A file system of so many bytes at `folder`. Skips the test where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {made.stderr.decode()}")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", folder], check=True
        )
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def damages(folder, percents, flips, rng):
    """Damage a checkpoint in one way after another: yields (file, what) with the damage in place, and mends it."""
    files = sorted(p for p in folder.iterdir())
    ways = [(f, "cut", percent) for f in files for percent in percents]
    sizes = [f.stat().st_size for f in files]
    ways += [
        (f, "flip", rng.randrange(8 * f.stat().st_size))
        for f in rng.choices(files, sizes, k=flips * 3 // 4)
    ]
    ways += [
        (f, "flip", rng.randrange(8 * f.stat().st_size))
        for f in rng.choices(files, k=flips - flips * 3 // 4)
    ]
    for file, way, where in ways:
        good = file.read_bytes()
        bad = bytearray(good[: len(good) * where // 100] if way == "cut" else good)
        if way == "flip":
            bad[where // 8] ^= 1 << where % 8
        file.write_bytes(bad)
        yield file, f"{way} {where}"
        file.write_bytes(good)


def finite(out):
    """All checkpoints of a run hold finite weights alone."""
    for folder in out.glob("step-*"):
        weights.checkpoint.verify(folder)
        for name, t in weights.files.load_tensors(folder / "model.safetensors").items():
            assert t.isfinite().all(), name


def try_damaged(world, out, capsys, folder, percents, flips, rng, whole):
    """Resume from each damaged copy. -> (how often it was refused, how often it did no harm)"""
    refused = harmless = 0
    shutil.copytree(out, out.with_name("backup"))
    for file, what in damages(folder, percents, flips, rng):
        capsys.readouterr()
        code = run(*flags(world, 2, "--out", out, "--resume"))
        if code:
            assert folder.name in one_sentence(capsys, code), (file, what)
            with pytest.raises(BadInput):
                support.start.load_model(folder, device="cpu")
            refused += 1
        else:  # then it must be as if nothing had happened
            assert contents(weights.checkpoint.find(out)) == whole, (file, what)
            harmless += 1
            shutil.rmtree(out)
            shutil.copytree(out.with_name("backup"), out)
    return refused, harmless


# ---- ranks -----------------------------------------------------------------------------------------------------------


def lose_a_rank(world, folder, number, victim, rng, *more, seconds=20):
    """Two ranks, of which one is killed or stopped at some step. -> what the other says, having ended with 2"""
    out = folder / "o"
    heard = {path: len(path.read_text()) for path in folder.glob("said*.txt")}
    processes = tiny.start(
        folder,
        *flags(
            world,
            3,
            "--steps",
            60,
            "--save-every",
            2,
            "--timeout",
            seconds,
            "--resume",
            "--out",
            out,
            *more,
        ),
        world=2,
        slow=0.02,
    )
    goal = logged(out) + rng.randint(3, 6)
    wait_for(lambda: logged(out) >= goal or not all(p.is_alive() for p in processes))
    time.sleep(rng.uniform(0, 0.1))
    os.kill(processes[victim].pid, number)
    other, began = processes[1 - victim], time.monotonic()
    other.join(10 * seconds)
    took = time.monotonic() - began
    for p in processes:
        p.kill()
        p.join()
    said = "".join(path.read_text()[heard.get(path, 0) :] for path in folder.glob("said*.txt"))
    assert other.exitcode == 2 and "Traceback" not in said, (other.exitcode, said[-3000:])
    assert (
        f"rank {1 - victim}: no answer from rank {victim} (" in said
        and "training with --resume" in said
    ), said
    return out, took


# ---- a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """sample.py in a terminal of its own, forked from here, or begun afresh as `python sample.py`."""

    def __init__(self, *argv, cwd=None, fresh=False):
        argv = [str(a) for a in argv]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            act(argv, cwd, fresh)
        self.seen = b""

    def read(self, seconds):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and select.select([self.fd], [], [], left)[0]:
            try:
                got = os.read(self.fd, 65536)
            except OSError as e:  # the other side has closed
                if e.errno == errno.EIO:
                    return False
                raise
            self.seen += got
        return True

    def send(self, keys):
        while (
            keys and select.select([], [self.fd], [], 0.2)[1]
        ):  # a terminal that is full takes no more
            try:
                keys = keys[os.write(self.fd, keys[:256]) :]
            except OSError:
                return

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end(self, seconds=60, keys=b"\x11\x15\x04"):
        """Exit code, after end-of-file as often as it takes; a hang is killed and said."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.read(0.05)
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            self.send(keys)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)
        raise AssertionError(f"it hangs; its last words: {self.seen[-2000:]!r}")


def forked(argv, cwd, files=(), closed=()):
    """sample.py with {0, 1, 2: open file} in place of its own and some of them closed. -> (exit code, complaints)"""
    with open(cwd / "complaints", "w+b") as err:
        if (pid := os.fork()) == 0:
            for number, file in {
                0: open(os.devnull),
                1: open(os.devnull, "w"),
                2: err,
                **dict(files),
            }.items():
                os.dup2(file.fileno(), number)
            for number in closed:
                os.close(number)
            act([str(a) for a in argv], cwd, False, closed)
        for _, file in dict(files).items():
            file.close()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, (err.seek(0), err.read().decode())[1]


def act(argv, cwd, fresh, closed=()):
    """The child's side: never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as its first line does
    try:
        if cwd:
            os.chdir(cwd)
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        if fresh:
            os.execv(sys.executable, [sys.executable, str(tiny.ROOT / "sample.py"), *argv])
        sys.stdin, sys.stdout, sys.stderr = (
            None if n in closed else open(n, "rw"[n > 0], buffering=[-1, -1, 1][n])
            for n in range(3)
        )
        sys.argv = ["sample.py", *argv]
        code = sample.run(sample.main)
        if sys.stdout:
            sys.stdout.flush()
        os._exit(code)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


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


ENDS = (0, 130, -signal.SIGINT)  # a shell calls the last one 130, too


def mashed(made, sessions, rng):
    """Chats under random keys, in a window that changes its size. -> keys that were pressed"""
    for _ in range(sessions):
        terminal = Terminal(
            "--ckpt", "ck", "--device", "cpu", "--image", "photos/tall.png", cwd=made
        )
        while b"> " not in terminal.seen and terminal.read(0.05):
            pass
        mash(terminal, rng, 40)
        code = terminal.end()
        assert code in ENDS and b"Traceback" not in terminal.seen, (code, terminal.seen[-3000:])


def interrupted(made, sessions, rng, fresh=False):
    """Ctrl-C or Ctrl-D, alone or after a question, at any moment of a chat from its first import on."""
    for _ in range(sessions):
        terminal = Terminal("--ckpt", "ck", "--device", "cpu", cwd=made, fresh=fresh)
        terminal.read(rng.uniform(0.3, 3) if fresh else rng.uniform(0, 0.4))
        terminal.send(
            rng.choice((b"\x03", b"\x04", b"what?\n\x03", b"what?\n\x04", b"what?\n\x03\x03"))
        )
        code = terminal.end()
        assert code in ENDS and b"Traceback" not in terminal.seen, (code, terminal.seen[-3000:])


def mash(terminal, rng, presses, slow=0.02):
    for _ in range(presses):
        key = (
            rng.choice(KEYS)
            if rng.random() < 0.7
            else bytes(
                rng.choice([*range(1, 28), *range(29, 256)]) for _ in range(rng.randint(1, 12))
            )
        )
        terminal.send(key)
        if rng.random() < 0.2:
            terminal.resize(rng.randint(0, 90), rng.randint(0, 300))
        if not terminal.read(rng.uniform(0, slow)):
            return
