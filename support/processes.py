"""Signals, and loader processes that never outlive their trainer."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress

STOPS = (signal.SIGTERM, signal.SIGINT)
# how loaders start, whatever Python would do: with fork the trainer is their parent, whose end they notice
LOADERS = "fork" if sys.platform == "linux" else None


@contextmanager
def on_signals(do, numbers=STOPS):
    """These signals call `do` in this process alone; in a loader that was forked from it they do nothing."""
    pid = os.getpid()

    def act(number, frame):
        if os.getpid() == pid:
            do(number)

    before = {number: signal.signal(number, act) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back():
    """SIGTERM and SIGINT wait until the end of the block; in what is forked inside it, for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_the_trainer(worker):
    """Start of a loader process: it ignores the signals that a terminal or a scheduler sends to all, as the
    trainer may have a step to finish, and it ends when the trainer does, however that ends."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)  # the trainer had gone before that line


@atexit.register
def end_loaders():
    """Kill them: they ignore the SIGTERM that Python sends at its end, and it would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch has nothing to say about their end
    for child in multiprocessing.active_children():
        child.kill()


def stop_at_once(number):
    """A signal while no step is under way: nothing is to be saved.

    No exception is raised, as libraries in C lose some of them."""
    end_loaders()
    os.write(2, b"train.py: stopped while no step was under way; --resume goes on\n")
    with suppress(RuntimeError):  # the signal may have come in the midst of a print
        sys.stdout.flush()
    os._exit(130)
