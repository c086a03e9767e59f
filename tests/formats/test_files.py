"""formats/files.py: bytes by position, and indexes that are kept."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from small import write

from formats.files import LONGEST, indexed, read_at, read_record
from support.errors import BadInput


def test_an_index_is_kept_between_starts_and_made_anew_when_its_file_changes(tmp_path):
    path = write(tmp_path / "a.json", "[1]")
    built = itertools.count(1)

    def number(kind="k"):
        return indexed(str(path), kind, lambda path: np.array(next(built)))

    assert number() == number() == 1
    assert number("another kind") == 2
    write(path, "[2]")
    os.utime(path, (1, 1))  # as long as before, at another time
    assert number() == number() == 3
    write(path, "[2, 3]")
    os.utime(path, (1, 1))  # longer, at the same time
    assert number() == number() == 4
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-40])
    assert number() == number() == 5


def test_a_user_without_a_home_indexes_anew(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.json", "[1]")

    def refuse(*args, **how):
        raise PermissionError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "home", refuse)
    assert indexed(str(path), "k", lambda path: np.array(7)) == 7
    assert "/.cache/nanoinfmllm cannot be written" in capsys.readouterr().out


def test_bytes_are_those_of_the_file_that_was_indexed_or_refused(tmp_path):
    path = str(write(tmp_path / "a.json", "0123456789"))
    indexed(path, "k", lambda path: np.zeros((1, 1)))
    assert read_at(path, 3, 4) == b"3456"
    with pytest.raises(BadInput, match=r"a\.json: is cut, it ends before byte 11"):
        read_at(path, 8, 3)
    with pytest.raises(BadInput, match="record 7: has 8388609 bytes"):
        read_record(path, 0, LONGEST + 1, "record 7")
    os.utime(path, (1, 1))
    with pytest.raises(BadInput, match=r"a\.json: has changed since it was indexed"):
        read_at(path, 0, 3)
