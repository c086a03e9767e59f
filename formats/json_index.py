"""Where the records of a JSON or JSONL file lie, so that any of them can be read by its number."""

import hashlib
import json
import re
from array import array

import numpy as np

from formats.files import LONGEST, indexed, read_record
from support.errors import BadInput
from support.files import whole

START = re.compile(rb"(\xef\xbb\xbf)?\s*")  # a byte order mark
OPEN = re.compile(rb"\[\s*(\]?)")
NEXT = re.compile(rb"\s*([,\]])\s*")
LINE = re.compile(rb"[^\n]{2,}")  # a single character may be a carriage return
DECODER = json.JSONDecoder()


def value_at(raw, at):
    """(value, stop) of the JSON value that begins at `at`.

    Python's parser wants text: a character per byte (latin-1) keeps its positions those of the file.
    It sees a piece of the file, first a small one, so that no value of a stranger's fills the memory."""
    for size in (2**12, 2**18, LONGEST):
        try:
            value, length = DECODER.raw_decode(raw[at : at + size].decode("latin-1"))
        except json.JSONDecodeError:
            continue
        return value, at + length
    raise ValueError(f"no value of at most {LONGEST} bytes at byte {at}")


def elements(raw, at):
    """(value, start, stop) of each element of the list that begins at `at`."""
    mark = OPEN.match(raw, at)
    if not mark:
        raise ValueError("it is not a list")
    while mark[1] != b"]":
        start = mark.end()
        value, stop = value_at(raw, start)
        yield value, start, stop
        mark = NEXT.match(raw, stop)
        if not mark:
            raise ValueError(f"',' or ']' expected at byte {stop}")


def find(raw, key):
    """Where the list under `key` begins: quotes within a text have a backslash, so this is no text."""
    found = re.search(rb'"%s"\s*:\s*(?=\[)' % key.encode(), raw)
    if not found:
        raise ValueError(f"it is not an object with a list '{key}'")
    return found.end()


def id_number(value):
    """An id as an integer, to join two lists; what is no integer is hashed."""
    if type(value) is int and abs(value) < 2**62:
        return value
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


class JsonIndex:
    """The records of a JSON list, of the list under `key`, or of JSON lines.

    `lengths` are in bytes, `images` counts each record's <image>, `tags` are integers made of the value under `by`."""

    def __init__(self, path, key=None, by=None, tag=id_number):
        self.path = path
        rows = indexed(path, f"json {key} {by}", lambda path: scan(path, key, by, tag))
        self.starts, stops, self.tags, self.images = rows.T
        self.lengths = stops - self.starts

    def read(self, number, where):
        if number < 0:  # see match
            raise BadInput(f"{where}: {self.path} has no record of its id; mend or remove it")
        raw = read_record(self.path, self.starts[number], self.lengths[number], where)
        return parse_record(raw, where)


def scan(path, key, by, tag):
    """Rows (start, stop, tag, images) of the records."""
    raw = whole(path)
    rows = array("q")
    try:
        at = find(raw, key) if key else START.match(raw).end()
        if raw[at : at + 1] == b"{" and not by:  # unparsed: a million lines take a second
            records = ((None, *line.span()) for line in LINE.finditer(raw, at))
        else:
            records = elements(raw, at)
        for record, start, stop in records:
            number = tag(record.get(by)) if by else 0  # where it is no object: an AttributeError
            rows.extend((start, stop, number, raw.count(b"<image>", start, stop)))
            # 8 bytes a record: no file of nothing but brackets may ask for many times its own size
            if len(rows) > max(2**22, stop // 2):
                raise ValueError("it has more records than its bytes can hold")
    except (ValueError, RecursionError, AttributeError) as e:
        raise BadInput(
            f"{path}: is not the JSON in UTF-8 that it should be ({e}); "
            "fetch it again or check `format`"
        ) from e
    return np.asarray(rows, np.int64).reshape(-1, 4)


def parse_record(raw, where):
    try:
        record = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: is not valid JSON in UTF-8 ({e}); mend or remove it") from e
    if not isinstance(record, dict):
        raise BadInput(f"{where}: is {type(record).__name__}, not an object; remove it")
    return record


def match(keys, among):
    """For each key its position in `among`, -1 where it is not there."""
    if not len(among):
        return np.full(len(keys), -1)
    order = np.argsort(among, kind="stable")
    at = order[np.searchsorted(among, keys, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[at] == keys, at, -1)
