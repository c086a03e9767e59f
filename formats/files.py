"""Bytes of files by position, and the cached indexes of where records lie."""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from support.errors import BadInput
from support.files import reading, regular

LONGEST = 2**23  # bytes of a record; a stranger's longer one could fill any memory with brackets
INDEXED = {}  # path -> size and time that the file had when it was indexed


@functools.lru_cache(maxsize=128)  # open files: a thousand tars would exceed the usual limit
def opened(path):
    return open(path, "rb", buffering=0)


def state(stat):
    return stat.st_size, stat.st_mtime_ns


def check_unchanged(path, stat=None):
    now = state(stat or os.stat(path))
    if INDEXED.get(path, now) != now:
        raise BadInput(f"{path}: has changed since it was indexed; start again")


def read_at(path, offset, size):
    """Bytes of a file by position; pread has no file pointer, so forked workers do not disturb one another."""
    with reading(path):
        file = opened(path).fileno()
        check_unchanged(path, os.fstat(file))
        data = os.pread(file, size, offset)
    if len(data) < size:
        raise BadInput(f"{path}: is cut, it ends before byte {offset + size}; fetch it again")
    return data


def read_record(path, offset, size, where):
    """The same of one record, which may be of any size that a stranger has written."""
    if size > LONGEST:
        raise BadInput(
            f"{where}: has {size} bytes, and {LONGEST} are the most; shorten or remove it"
        )
    return read_at(path, offset, size)


def indexed(path, kind, build):
    """build(path) -> an array, kept in the user's cache folder until the file's size or time changes."""
    with reading(path):
        INDEXED[path] = state(os.stat(regular(path)))
    opened.cache_clear()
    key = f"4 {kind} {os.path.realpath(path)} {INDEXED[path]}"
    home = os.environ.get("HOME", "")  # a container's user may have none
    folder = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "nanoinfmllm"
    cached = folder / (hashlib.sha1(key.encode(errors="replace")).hexdigest() + ".npz")
    try:
        with np.load(cached, allow_pickle=False) as stored:
            return stored["index"]  # a zip checks its CRC: an index that is half written is noticed
    except Exception:
        index = build(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(cached, index=index)
    except OSError:
        print(f"note: {folder} cannot be written, so {path} is indexed anew at each start")
    return index
