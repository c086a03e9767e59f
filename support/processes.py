"""Signals, and loader processes that never outlive their trainer."""

import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress


@contextmanager
def on_signals(do, numbers=(signal.SIGTERM, signal.SIGINT)):
    """These signals call `do`, in this process alone: a loader process, forked, leaves when we do."""
    pid = os.getpid()

    def act(number, frame):
        return do(number) if os.getpid() == pid else None

    before = {number: signal.signal(number, act) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


METHOD = (
    "fork" if sys.platform == "linux" else None
)  # of loader processes, whatever Python would do: a child of
#                                        the helper that newer Pythons fork from outlives a training that was killed


@contextmanager
def deaf():
    """SIGTERM and SIGINT are held back; from what is forked in here, for good."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stay(worker):
    """A loader process outlives the signals that a terminal or a scheduler sends to all. It leaves when its parent
    does, which may have a step to finish; by itself it would wait for ever to write into a pipe that nobody reads."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: this signal when the parent has gone
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)  # it went before that line


def end_loaders():
    """At once: they pass by the SIGTERM that Python sends at its end, after which it would wait for them for ever. What
    torch says of a loader that was killed is not wanted here."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def at_once(number):
    """A signal while no step is under way: nothing is to be saved. No exception, as C libraries lose some of them."""
    end_loaders()
    os.write(2, b"train.py: stopped while no step was under way; --resume goes on\n")
    with suppress(RuntimeError):
        sys.stdout.flush()  # the signal may have come in the midst of a print
    os._exit(130)
