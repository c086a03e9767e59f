"""Faults made on purpose: the moves that test_faults.py makes a few times and test_chaos.py many times.

train.main runs in this process, or in one that is forked from a server that has imported torch (tiny.start): the
program as a user runs it, without two seconds of imports a time. What happens during the imports has tests of its own.
"""

import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import tiny

import sample
import support.log
import support.start
import train
import weights.checkpoint
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
    """A program that has refused: exit code 2, one line, which holds these names."""
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and len(err) < 1500, (code, err)
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
        for name, p in weights.checkpoint.load(folder).named_parameters():
            assert p.isfinite().all(), name


def poisoned(folder, name, value):
    """A checkpoint to start from, with this number among the weights of that name."""
    model = tiny.model()
    model.get_parameter(name).data.view(-1)[-1] = value
    weights.checkpoint.save(folder, model, Tokenizer(tiny.TOKENIZER), {"preset": "toy"})
    return folder


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError, ValueError, IndexError):  # not there yet, or half written
            if found := condition():
                return found
        time.sleep(0.0005)
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


def forked(do, *args):
    """A process that does this, with all that has been imported here."""
    process = multiprocessing.get_context("fork").Process(target=do, args=args)
    process.start()
    return process


@contextmanager
def beside(do):
    """do() in a process of its own, which is killed at the end of the block; -> its number"""
    process = forked(do)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def catches(pid, number):
    """Whether a process has a handler for this signal."""
    mask = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return int(mask, 16) >> (number - 1) & 1


def halves(out):
    """Checkpoints that are being written, or were when their process was killed."""
    with suppress(FileNotFoundError):
        return {(p.name, p.stat().st_ino) for p in out.glob("*.new")}
    return set()


def struck(world, here, stage, times, rng, strike, *more):
    """A run that is struck so often, in turn while it writes a checkpoint and some steps on or at once; it goes on with
    --resume and leaves what one leaves that was not struck. Yields its exit codes."""
    whole = straight(world, here / "straight", stage, *more)
    out = here / "o"
    again = *more, "--out", out, "--resume"
    for n in range(times):
        (process,) = tiny.start(here, *flags(world, stage, *again), slow=0.05)
        wait_for(lambda: catches(process.pid, signal.SIGTERM))  # noqa: B023
        if n % 2:
            goal = logged(out) + rng.randint(0, 3)
            wait_for(lambda: logged(out) >= goal)  # noqa: B023
            time.sleep(rng.uniform(0, 0.05))
        else:
            old = halves(out)
            wait_for(lambda: halves(out) - old)  # noqa: B023
        loaders = children(process.pid)
        strike(process)
        process.join(120)
        wait_for(lambda: not any(map(alive, loaders)))  # noqa: B023
        yield process.exitcode
    assert run(world, stage, *again) == 0
    assert left(out) == whole


def killed(world, here, stage, times, rng, *more):
    """-> how many of the kills hit the writing of a checkpoint"""
    writing, before = 0, set()
    for code in struck(world, here, stage, times, rng, lambda process: process.kill(), *more):
        assert code == -signal.SIGKILL, "the run was over before it had been killed so often"
        now = halves(here / "o")
        writing += bool(now - before)
        before = now
    return writing


def stopped(world, here, stage, times, rng, *more):
    """SIGTERM or SIGINT, to the loaders too or not, as schedulers and terminals do it. -> exit codes"""

    def strike(process):
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        loaders = children(process.pid) if rng.random() < 0.5 else ()
        for pid in (process.pid, *loaders):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    codes = []
    for code in struck(world, here, stage, times, rng, strike, *more):
        codes.append(code)
        said = tiny.said(here)
        assert code in (0, 130) and "Traceback" not in said, said[-3000:]
        assert said.count(": stopped") + said.count("stopped at") == len(codes), said[-3000:]
        saved = max((int(p.name[5:]) for p in (here / "o").glob("step-*")), default=0)
        assert saved >= logged(here / "o"), "steps were done and not saved"
    return codes


def lose_ranks(world, here, lost, rng, *more):
    """Two ranks, of which one is killed or stopped at some step: the other names it and ends with 2. So for each
    (signal, rank); in the end the run goes on."""
    out = here / "o"
    again = *more, "--resume", "--out", out
    for number, victim in lost:
        place = Path(tempfile.mkdtemp(dir=here))
        timeout = 600 if number == signal.SIGKILL else 6  # a killed one is noticed at once
        settings = "--steps", 60, "--save-every", 2, "--timeout", timeout
        ranks = tiny.start(place, *flags(world, 3, *settings, *again), world=2, slow=0.02)
        goal = logged(out) + rng.randint(3, 6)
        wait_for(lambda: logged(out) >= goal)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        os.kill(ranks[victim].pid, number)
        codes = tiny.finish([ranks[1 - victim]], 120)
        ranks[victim].kill()
        said = tiny.said(place)
        assert codes == [2] and "Traceback" not in said, (codes, said[-3000:])
        assert f"rank {1 - victim}: no answer from rank {victim} (" in said, said
        assert "training with --resume" in said
    assert tiny.finish(tiny.start(here, *flags(world, 3, *again), world=2)) == [0, 0]
    assert len(tiny.losses(out)) == 60


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


def damages(good, percents, flips, rng):
    """What becomes of a file that is cut, of which a bit flips, or (None) that is gone."""
    for percent in percents:
        yield good[: len(good) * percent // 100]
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        yield bad
    yield None


def try_damaged(world, here, capsys, percents, flips, rng):
    """Resume from a checkpoint with each damage. -> (how often it was refused, how often it did no harm)"""
    out, sound = here / "o", here / "sound"
    settings = "--steps", 4, "--save-every", 2, "--keep", 9
    whole = straight(world, out, 2, *settings)
    shutil.rmtree(out / "step-00000004")
    out.rename(sound)
    refused = harmless = 0
    for good in sorted((sound / "step-00000002").iterdir()):
        for bad in damages(good.read_bytes(), percents, flips, rng):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(sound, out)
            file = out / "step-00000002" / good.name
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            code = run(world, 2, *settings, "--out", out, "--resume")
            if code == 0:  # then it must be as if nothing had happened
                assert left(out) == whole, file
                harmless += 1
                continue
            known = "" if file.name == "checksums.json" else "is not "  # what was written, or there
            one_sentence(capsys, code, file.parent, known)
            spared = file.name in weights.checkpoint.RESUMING  # of no use to an answer
            with nullcontext() if spared else pytest.raises(BadInput):
                support.start.load_model(file.parent, device="cpu")
            refused += 1
    return refused, harmless


# ---- sample.py, in a terminal and without ---------------------------------------------------------------------------


def sample_py(folder, argv, closed=(), fresh=False):
    """What a forked process does to be sample.py, begun afresh or as if its imports were done."""
    os.chdir(folder)
    sys.argv = [str(tiny.ROOT / "sample.py"), "--ckpt", "ck", "--device", "cpu", *argv]
    if fresh:
        os.execv(sys.executable, [sys.executable, *sys.argv])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = None if number in closed else open(number, "rw"[number > 0])
        setattr(sys, name, file)
    sys.exit(sample.run(sample.main))


def typed(folder, *argv, stdout=os.devnull, closed=()):
    """sample.py with nothing to read; some of its three files may be closed. -> (exit code, complaints)"""
    with open(os.devnull) as stdin, open(stdout, "w") as out, tempfile.TemporaryFile("w+") as err:

        def begin():
            for number, file in enumerate((stdin, out, err)):
                os.dup2(file.fileno(), number)
            for number in closed:
                os.close(number)
            sample_py(folder, argv, closed)

        process = forked(begin)
        process.join()
        err.seek(0)
        return process.exitcode, err.read()


class Terminal:
    """sample.py in a terminal of its own."""

    def __init__(self, folder, *argv, fresh=False):
        self.seen = b""
        self.fd, other = os.openpty()

        def begin():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as its first line does
            os.login_tty(other)
            sample_py(folder, argv, fresh=fresh)

        self.process = forked(begin)
        os.close(other)

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
        while self.process.is_alive() and time.monotonic() < until:
            self.read(0.05)
            self.send(b"\x11\x15\x04")
        (code,) = tiny.finish([self.process], 0)
        os.close(self.fd)
        assert code is not None, f"it hangs; its last words: {self.seen[-2000:]!r}"
        assert code in (0, 130, -signal.SIGINT), code  # a shell calls the last one 130, too
        assert b"Traceback" not in self.seen, self.seen[-3000:]


KEYS = [
    b"\x03",
    b"\x04",
    b"\n",
    b"\x7f",
    b"\x15",
    b"\x16",
    b"\x13\x11",
    b"\x1a",
    b"\t",
    b"\x1b[A",
    b"\xff\xfe",
    "\u00e9\u4e2d\U0001f600".encode(),
    b"\0",
    b"what is it?\n",
    b"/reset\n",
    b"/box on\n",
    b"/image photos/wide.png\n",
    b"/image none.png\n",
    b"/image broken.png\n",
    b"/image .\n",
    b"/nonsense\n",
    b"<ImageHere>\n",
    b"x" * 5000 + b"\n",
    b"hello " * 400 + b"\n",
]


def mashed(made, sessions, rng):
    """Chats under random keys, in a window that changes its size."""
    for _ in range(sessions):
        terminal = Terminal(made, "--image", "photos/tall.png")
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
        terminal = Terminal(made, fresh=fresh)
        terminal.read(rng.uniform(0.3, 3) if fresh else rng.uniform(0, 0.4))
        terminal.send(rng.choice(keys))
        terminal.end()
