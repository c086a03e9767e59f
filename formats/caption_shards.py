"""webdataset tars: key.jpg (jpeg, png, webp) beside key.txt, or beside key.json with a `caption`."""

import glob
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
PAX = re.compile(r"\d path=(.*)\n")


class CaptionShards:
    images = 1

    def __init__(self, source):
        self.tars = []
        for pattern in source.paths("shards"):
            self.tars += sorted(glob.glob(pattern))
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
        if min(image, text) < 0:
            raise BadInput(f"{where}: lacks its image or its caption (.txt or .json); remove it")
        raw = read_record(tar, text, text_size, where)
        if is_json:
            fields = parse_record(raw, where)
        else:
            fields = {"caption": raw.decode(errors="surrogateescape")}
        caption = need(fields, "caption", where)
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
    long_name = None  # of the next member, where its own header has no room for it
    at, end = 0, os.path.getsize(path)
    while any(block := read_at(path, at, BLOCK)):
        start = at + BLOCK
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            size = member.size
            if not 0 <= size <= end - start:
                raise ValueError(f"a member of {size} bytes")
        except (tarfile.HeaderError, ValueError) as e:
            raise BadInput(f"{path}: is no tar, or cut, at byte {at} ({e}); fetch it again") from e
        at = start + -(-size // BLOCK) * BLOCK
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            header = read_record(path, start, size, f"{path}: header at byte {start}")
            text = header.decode(errors="replace")
            pax_name = PAX.search(text)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text.rstrip("\0")
            elif pax_name:
                long_name = pax_name[1]
            continue
        key, ending = split_name(long_name or member.name)
        if member.isreg() and ending in (*PICTURES, "txt", "json"):
            row = samples.setdefault(key, [-1, -1, -1, -1, 0])
            if ending in PICTURES:
                row[:2] = start, size
            elif ending == "txt" or row[2] < 0:
                row[2:] = start, size, ending == "json"
        long_name = None
    return np.array(list(samples.values()), np.int64).reshape(-1, 5)
