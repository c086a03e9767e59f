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
OPEN = re.compile(rb"[\[{]\s*([\]}]?)")
NEXT = re.compile(rb"\s*([,\]}])\s*")
COLON = re.compile(rb"\s*:\s*")
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


def elements(raw, at, closed_by=b"]"):
    """(value, start, stop) of each element of the list that begins at `at`.

    Closed by b"}" it is an object; then a start is where the key begins."""
    mark = OPEN.match(raw, at)
    if not mark or (raw[at : at + 1] == b"[") != (closed_by == b"]"):
        raise ValueError(f"no list or object that ends with {closed_by.decode()}")
    while mark[1] != closed_by:
        start = mark.end()
        value, stop = value_at(raw, start)
        if closed_by == b"}":
            colon = COLON.match(raw, stop)
            if not colon:
                raise ValueError(f"':' expected at byte {stop}")
            value, stop = value_at(raw, colon.end())
        yield value, start, stop
        mark = NEXT.match(raw, stop)
        if not mark:
            raise ValueError(f"',' or {closed_by.decode()!r} expected at byte {stop}")


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
    """The records of a JSON list, of the list under `key`, of an object whose keys are ids, or of JSON lines.

    `lengths` are in bytes, `images` counts each record's <image>. `keyed` names the field that an object's key
    becomes. Of the fields in `tags` numbers are kept, of all records: tags["image_id"] where image_id=id_number."""

    def __init__(self, path, key=None, keyed=None, **tags):
        self.path, self.key, self.keyed = path, key, keyed
        rows = indexed(
            path, f"json {key} {keyed} {list(tags)}", lambda path: scan(path, key, keyed, tags)
        )
        self.starts, stops, self.images, *columns = rows.T
        self.tags = dict(zip(tags, columns))
        self.lengths = stops - self.starts

    def find(self, ids, field):
        """For each id the record that has it in a field of `tags`, -1 where none has. No two may share one."""
        own = self.tags[field]
        order = np.argsort(own, kind="stable")
        again = np.flatnonzero(np.diff(own[order]) == 0)
        if len(again):
            number = order[again[0] + 1]
            raise BadInput(
                f"{self.path}: record {number} of '{self.key}' has the {field} of another; remove one"
            )
        if not len(own):
            return np.full(len(ids), -1)
        at = order[np.searchsorted(own, ids, sorter=order).clip(max=len(own) - 1)]
        return np.where(own[at] == ids, at, -1)

    def read(self, number, where):
        if number < 0:  # see find
            raise BadInput(f"{where}: {self.path} has no record of its id; mend or remove it")
        raw = read_record(self.path, self.starts[number], self.lengths[number], where)
        if not self.keyed:
            return parse_record(raw, where)
        [(name, fields)] = parse_record(b"{%s}" % raw, where).items()
        if not isinstance(fields, dict):
            raise BadInput(f"{where} ({name[:50]}): is no object; remove it")
        return {self.keyed: name, **fields}


def scan(path, key, keyed, tags):
    """Rows (start, stop, images, *tags) of the records."""
    raw = whole(path)
    rows = array("q")
    try:
        at = find(raw, key) if key else START.match(raw).end()
        if keyed:
            records = elements(raw, at, b"}")
        elif raw[at : at + 1] == b"{" and not tags:  # unparsed: a million lines take a second
            records = ((None, *line.span()) for line in LINE.finditer(raw, at))
        else:
            records = elements(raw, at)
        for record, start, stop in records:
            rows.extend((start, stop, raw.count(b"<image>", start, stop)))
            # where a record is no object: an AttributeError
            rows.extend(tag(record.get(field)) for field, tag in tags.items())
            # 8 bytes a record: no file of nothing but brackets may ask for many times its own size
            if len(rows) > max(2**22, stop // 2):
                raise ValueError("it has more records than its bytes can hold")
    except (ValueError, RecursionError, AttributeError) as e:
        raise BadInput(
            f"{path}: is not the JSON in UTF-8 that it should be ({e}); "
            "fetch it again or check `format`"
        ) from e
    return np.asarray(rows, np.int64).reshape(-1, 3 + len(tags))


def parse_record(raw, where):
    try:
        record = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: is not valid JSON in UTF-8 ({e}); mend or remove it") from e
    if not isinstance(record, dict):
        raise BadInput(f"{where}: is {type(record).__name__}, not an object; remove it")
    return record


def count(items):
    """How many samples a record with a list makes; an empty one makes one, which is then complained about."""
    return max(1, len(items)) if isinstance(items, list) else 1
