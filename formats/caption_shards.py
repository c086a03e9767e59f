"""webdataset tars: key.jpg (jpeg, png, webp) beside key.txt, or beside key.json with a `caption`."""

import os
import re
import tarfile

import numpy as np

from formats.files import indexed, read_at, read_record
from formats.json_index import parse_record
from formats.records import Record, need
from support.errors import BadInput

PICTURES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
PAX = re.compile(r"\d{1,9} (path|size)=([^\n]*)\n")


class CaptionShards:
    images = 1

    def __init__(self, source):
        self.tars = source.paths("shards")
        indexes = [indexed(tar, "tar", scan_tar) for tar in self.tars]
        self.index = np.concatenate(indexes)
        self.tar_of = np.repeat(np.arange(len(self.tars)), [len(index) for index in indexes])
        self.lengths = self.index[:, 3].clip(0)

    def read(self, number):
        tar = self.tars[self.tar_of[number]]
        image, image_size, text, text_size, is_json = self.index[number].tolist()
        header = read_at(tar, max(text, image) - BLOCK, 100)
        key, _ = split_name(header.split(b"\0")[0].decode(errors="replace"))
        where = f"{tar}: {key}"
        if image < 0:
            raise BadInput(f"{where}: has a caption but no image; remove it")
        if text < 0:
            raise BadInput(f"{where}: has neither .txt nor .json beside it; remove it")
        raw = read_record(tar, text, text_size, where)
        if is_json:
            fields = parse_record(raw, where)
        else:
            try:
                fields = {"caption": raw.decode()}
            except UnicodeDecodeError as e:
                raise BadInput(f"{where}: its caption is not UTF-8; mend it") from e
        caption = need(fields, "caption", str, where)
        image_at = (tar, image, image_size)
        return Record(where, [image_at], answers=[caption], fields={"key": key, **fields})


def split_name(name):
    """a/b.c.PNG -> a/b, c.png: files of one sample have the same key, all before the first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def scan_tar(path):
    """Rows (image offset, image size, caption offset, caption size, is JSON) of a tar's samples; -1: not there.

    Headers alone are read, by tarfile's own TarInfo. Its TarFile keeps an object per member, takes a damaged
    header for the end of the archive, and needs minutes for some that are made to take long."""
    samples = {}
    extended = {}  # name and size of the next member, where its own header has no room for them
    at, end = 0, os.path.getsize(path)
    while True:
        if at + BLOCK > end:
            raise BadInput(f"{path}: is cut, its end mark is missing; fetch it again")
        block = read_at(path, at, BLOCK)
        if not any(block):
            break
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            size = int(extended.get("size", member.size))
        except (tarfile.HeaderError, ValueError) as e:
            raise BadInput(f"{path}: is not a tar at byte {at}; fetch it again") from e
        start = at + BLOCK
        if not 0 <= size <= end - start:
            raise BadInput(f"{path}: ends inside a member (byte {at}); fetch it again")
        at = start + -(-size // BLOCK) * BLOCK
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            text = read_record(path, start, size, f"{path}: header at byte {start}")
            text = text.decode(errors="replace")
            if member.type == tarfile.XHDTYPE:
                extended.update(PAX.findall(text))
            else:
                extended["path"] = text.rstrip("\0")
            continue
        key, ending = split_name(extended.get("path", member.name))
        if member.isreg() and ending in (*PICTURES, "txt", "json"):
            row = samples.setdefault(key, [-1, -1, -1, -1, 0])
            if ending in PICTURES:
                row[:2] = start, size
            elif ending == "txt" or row[2] < 0:
                row[2:] = start, size, ending == "json"
        extended = {}
    return np.array(list(samples.values()), np.int64).reshape(-1, 5)
