"""Reader of one format."""

import os
import re

import numpy as np

from formats.files import indexed, read_at, within
from formats.json_index import json_at
from formats.records import Record, need
from support.errors import BadInput


def extended(raw):
    """The pairs of an extended tar header, "<length> <key>=<value>\\n" each."""
    pairs, at = {}, 0
    while (found := re.compile(rb"(\d{1,9}) ([^=]{1,99})=").match(raw, at)) and at + int(
        found[1]
    ) > found.end():
        value, at = raw[found.end() : at + int(found[1]) - 1], at + int(found[1])
        if found[2] == b"path" or found[2] == b"size" and value.isdigit() and len(value) < 20:
            pairs[found[2]] = value
    return pairs


def scan_tar(path):
    """Rows (image offset, image size, caption offset, caption size, is JSON) of a webdataset tar; -1: not there.
    Headers alone are read: name, size, next. tarfile would make an object per member."""
    samples, at, name, size, end = {}, 0, None, None, os.path.getsize(path)
    while at + 512 <= end and any(head := read_at(path, at, 512)):  # zeros are the end mark
        try:
            if sum(head) - sum(head[148:156]) + 256 != int(head[148:156].strip(b"\0 "), 8):
                raise ValueError
            plain = (
                int.from_bytes(head[125:136], "big")
                if head[124] & 128
                else int(head[124:136].strip(b"\0 "), 8)
            )
        except ValueError as e:
            raise BadInput(f"{path}: is not a tar at byte {at}; fetch it again") from e
        kind, body, size = head[156:157], at + 512, plain if size is None else size
        if size < 0 or body + size > end:
            raise BadInput(f"{path}: ends inside a member (byte {at}); fetch it again")
        at = body + (size + 511) // 512 * 512
        if kind == b"L":
            name, size = read_at(path, body, size).rstrip(b"\0"), None
            continue
        if kind in b"xg":
            pairs = extended(read_at(path, body, size)) if kind == b"x" else {}
            name, size = pairs.get(b"path", name), int(pairs.get(b"size") or b"-1")
            size = None if size < 0 else size
            continue
        if name is None:
            name = head[:100].split(b"\0")[0]
            if head[257:262] == b"ustar" and head[345]:
                name = head[345:500].split(b"\0")[0] + b"/" + name
        folder, _, base = name.decode(errors="replace").rpartition("/")
        key, dot, ending = base.partition(".")
        ending, row = ending.lower(), [-1, -1, -1, -1, 0]
        if kind in b"\007" and ending in ("jpg", "jpeg", "png", "webp", "txt", "json"):
            row = samples.setdefault((folder, key), row)
            if ending not in ("txt", "json"):
                row[:2] = body, size
            elif ending == "txt" or row[2] < 0:
                row[2:] = body, size, int(ending == "json")
        name = size = None
    if 0 < end < at + 512:
        raise BadInput(f"{path}: is cut, its end mark is missing; fetch it again")
    return np.array(list(samples.values()), np.int64).reshape(-1, 5)


def caption_shards(source):
    """webdataset tars: key.jpg|png|webp beside key.txt, or key.json with `caption`."""
    tars = source.paths("shards")
    indexes = [indexed(tar, "tar", scan_tar) for tar in tars]
    starts = np.cumsum([0] + [len(index) for index in indexes])
    index = np.concatenate(indexes)

    def read(number):
        tar = tars[starts.searchsorted(number, "right") - 1]
        image, size, text, length, is_json = index[number].tolist()
        name = (
            read_at(tar, (text if image < 0 else image) - 512, 100)
            .split(b"\0")[0]
            .decode(errors="replace")
        )
        key = re.sub(r"\.[^/]*$", "", name)
        where = f"{tar}: {key}"
        if image < 0:
            raise BadInput(f"{where}: has a caption but no image; remove it")
        if text < 0:
            raise BadInput(f"{where}: has neither .txt nor .json beside it; remove it")
        raw = read_at(tar, text, within(length, where))
        try:
            fields = (
                json_at(tar, text, text + length, where) if is_json else {"caption": raw.decode()}
            )
        except UnicodeDecodeError as e:
            raise BadInput(f"{where}: its caption is not UTF-8; mend it") from e
        caption = need(fields, "caption", str, where)
        return Record(where, [(tar, image, size)], answers=[caption], fields={"key": key, **fields})

    return index[:, 3].clip(0), None, read
