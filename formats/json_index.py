"""Where the records of a JSON or JSONL file lie."""

import hashlib
import json
import re
from array import array

import numpy as np

from formats.files import LONGEST, indexed, read_at, within
from support.errors import BadInput
from support.files import whole

JSON, SPACES = json.JSONDecoder().raw_decode, re.compile(rb"[ \t\r\n]*")


class Values:
    """The JSON values of a file by position. Python's parser wants text, so it sees the file through a window that
    moves on; a character per byte (latin-1), so that positions in it are the file's."""

    def __init__(self, raw):
        self.raw, self.start, self.text = raw, 0, ""

    def skip(self, at):
        return SPACES.match(self.raw, at).end()

    def is_at(self, at, mark):
        return self.raw[at : at + 1] == mark

    def at(self, at):
        """(value, end) of the value that begins here."""
        for size in (0, 2**18, LONGEST):  # 0: the window as it is
            if size:
                self.start, self.text = at, str(self.raw[at : at + size], "latin-1")
            elif not self.start <= at < self.start + len(self.text):
                continue
            last = self.start + len(self.text) == len(self.raw)
            try:
                value, end = JSON(self.text, at - self.start)
            except json.JSONDecodeError as e:
                if last:
                    raise ValueError(f"{e.msg} at byte {self.start + e.pos}") from e
                continue
            if end < len(self.text) or last:
                return value, self.start + end  # else it may be half a number
        raise ValueError(f"nothing of less than {LONGEST} bytes at byte {at}")

    def elements(self, at):
        """(value, start, end) of each element of the list that begins here."""
        at, count = self.skip(at + 1), 0
        while not self.is_at(at, b"]"):
            value, end = self.at(at)
            yield value, at, end
            plausible(count := count + 1, end)
            at = self.skip(end)
            if self.is_at(at, b","):
                at = self.skip(at + 1)
            elif not self.is_at(at, b"]"):
                raise ValueError(f"',' or ']' expected at byte {at}")

    def find_array(self, key):
        """Position of the top-level array, or of the array under `key` of the top-level object."""
        at = self.skip(3 if self.raw.startswith(b"\xef\xbb\xbf") else 0)
        while key is not None:  # walk the object's keys, stop behind the one we want
            if self.raw[at : at + 1] not in (b"{", b","):
                raise ValueError(f"it is not an object with a list '{key}'")
            name, at = self.at(self.skip(at + 1))
            at = self.skip(at)
            if not self.is_at(at, b":"):
                raise ValueError(f"':' expected at byte {at}")
            at = self.skip(at + 1)
            if name == key:
                break
            if self.is_at(at, b"["):  # element by element: it may be long
                end = max((end for _, _, end in self.elements(at)), default=at + 1)
                at = self.skip(self.skip(end) + 1)
            else:
                at = self.skip(self.at(at)[1])
        if not self.is_at(at, b"["):
            raise ValueError(f"'{key}' is not a list" if key else "it is not a list")
        return at


def plausible(records, size):
    """An index takes 32 bytes a record: no file of nothing but brackets may ask for many times its own size."""
    if records > 2**20 and 8 * records > size:
        raise ValueError("it has more records than its bytes can hold")


def scan_json(raw, key, tags):
    """Rows (start, stop, tag, images) of the records of a JSON list; tags(record) gives an integer per row."""
    values, rows = Values(raw), array("q")
    for record, at, end in values.elements(values.find_array(key)):
        for tag in tags(record):
            rows.extend((at, end, tag, raw.count(b"<image>", at, end)))
        plausible(len(rows) // 4, end)
    return rows


def lines(raw):
    """(start, stop) of the lines that hold more than a carriage return."""
    at = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    while at < len(raw):
        stop = raw.find(b"\n", at + 2**22) if len(raw) > at + 2**22 else len(raw)
        if stop < 0:
            stop = len(raw)
        ends = np.append(
            np.flatnonzero(np.frombuffer(raw, np.uint8, stop - at, at) == 10) + at, stop
        )
        starts = np.concatenate(([at], ends[:-1] + 1))
        full = ends - starts > 1
        yield from zip(starts[full].tolist(), ends[full].tolist())
        at = stop + 1


def scan_lines(raw, tags):
    """The same of a JSON-lines file; lines are not parsed where tags is None, so a million take two seconds."""
    rows = array("q")
    for start, end in lines(raw):
        try:
            numbers = tags(json.loads(raw[start:end])) if tags and end - start <= LONGEST else (0,)
        except (ValueError, RecursionError):
            numbers = (0,)  # said when it is read
        for tag in numbers:
            rows.extend((start, end, tag, raw.count(b"<image>", start, end)))
        plausible(len(rows) // 4, end)
    return rows


def json_index(path, key=None, by=""):
    """The rows of a JSON or JSONL file (see scan_json), tagged by an id; by="sentences": a row for each of them."""
    tags = sentences_of if by == "sentences" else tag_by(by) if by else None

    def build(path):
        raw = whole(path)
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise BadInput(f"{path}: is UTF-16; save it as UTF-8")
        of_lines = key is None and raw[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
        try:
            rows = (
                scan_lines(raw, tags)
                if of_lines
                else scan_json(raw, key, tags or (lambda record: (0,)))
            )
        except (ValueError, RecursionError) as e:
            raise BadInput(
                f"{path}: is not the JSON it should be ({e}); fetch it again or check `format`"
            ) from e
        return np.asarray(rows, np.int64).reshape(-1, 4)

    return indexed(path, f"json {key} {by}", build)


def json_at(path, start, stop, where):
    raw = read_at(path, start, within(stop - start, where))
    try:
        record = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: is not valid JSON in UTF-8 ({e}); mend or remove it") from e
    if not isinstance(record, dict):
        raise BadInput(f"{where}: is {type(record).__name__}, not an object; remove it")
    return record


def tag_by(key):
    """Records' ids as integers, to join two lists; ids that are text are hashed."""

    def tags(record):
        value = record.get(key) if isinstance(record, dict) else None
        if type(value) is int and abs(value) < 2**62:
            return (value,)
        return (
            int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big"),
        )

    return tags


def sentences_of(record):
    sentences = record.get("sentences") if isinstance(record, dict) else None
    return range(max(1, len(sentences))) if isinstance(sentences, list) else (0,)


def match(keys, among):
    """For each key its position in `among`, -1 where it is not there."""
    if not len(among):
        return np.full(len(keys), -1)
    order = np.argsort(among, kind="stable")
    at = order[np.searchsorted(among, keys, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[at] == keys, at, -1)
