"""Bytes of files by position, and the cached indexes of where records lie."""

import functools
import hashlib
import io
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.errors import BadInput
from support.files import reading


@functools.lru_cache(maxsize=128)  # open files: a thousand tars would exceed the usual limit
def opened(path):
    return open(path, "rb", buffering=0)


INDEXED = {}  # path -> size and time that the file had when it was indexed


def state(stat):
    return stat.st_size, stat.st_mtime_ns


def read_at(path, offset, size):
    """Bytes of a file by position; pread has no file pointer, so forked workers do not disturb one another."""
    with reading(path):
        file = opened(path).fileno()
        now, data = state(os.fstat(file)), os.pread(file, size, offset)
    if INDEXED.get(path, now) != now:
        raise BadInput(f"{path}: has changed since it was indexed; start again")
    if len(data) < size:
        raise BadInput(f"{path}: ends before byte {offset + size}; if it has changed, start again")
    return data


def indexed(path, kind, build):
    """build(path) -> int64 array, kept in the user's cache folder until the file's size or time changes."""
    with reading(path):
        now = state(os.stat(path))
    if INDEXED.setdefault(path, now) != now:
        opened.cache_clear()
        INDEXED[path] = now
    key = f"2 {kind} {os.path.realpath(path)} {now[0]} {now[1]}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoinfmllm"
    cached = folder / (hashlib.sha1(key.encode(errors="replace")).hexdigest() + ".npy")
    try:
        raw = cached.read_bytes()
        if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "big"):
            raise ValueError
        return np.load(io.BytesIO(raw[:-4]), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        index = build(path)
    part, raw = cached.with_suffix(f".{os.getpid()}.part"), io.BytesIO()
    try:  # beside, then renamed: another process never sees half
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.part"):  # of a process that was killed
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink(missing_ok=True)
        np.save(raw, index)
        part.write_bytes(raw.getvalue() + zlib.crc32(raw.getvalue()).to_bytes(4, "big"))
        os.replace(part, cached)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        print(f"note: {folder} cannot be written, so {path} is indexed anew at each start")
    return index


LONGEST = 2**23  # bytes of a record; a stranger's longer one could fill any memory with brackets


def within(size, where):
    if size > LONGEST:
        raise BadInput(
            f"{where}: has {size} bytes, and {LONGEST} are the most; shorten or remove it"
        )
    return size
