"""Hub datasets as they lie on the hub: parquet files of conversations with their pictures inside.

Columns are found by name: `images` (a list of {bytes, path}) or `image`, and `texts` (a list of {user, assistant})
or `conversations` (a list of {from, value}). A row group is read when a row of it is asked for."""

import functools
import glob
from contextlib import contextmanager

import numpy as np

from formats.conversations import conversation
from formats.files import check_unchanged, indexed
from formats.records import named, need_list
from support.errors import BadInput

PICTURES = ("images", "image")
TEXTS = ("texts", "conversations")
LARGEST = 2**30  # bytes of a row group: each loader holds one


class Parquet:
    def __init__(self, source):
        self.source = source
        for cached in (opened, read_group):  # a file may have changed
            cached.cache_clear()
        self.files = []
        for pattern in source.paths("files"):
            self.files += sorted(glob.glob(pattern))
        indexes = [indexed(path, "parquet", scan) for path in self.files]
        self.index = np.concatenate(indexes)
        self.file_of = np.repeat(np.arange(len(self.files)), [len(index) for index in indexes])
        self.lengths = self.index[:, 2]
        self.images = self.index[:, 3]

    def read(self, number):
        path = self.files[self.file_of[number]]
        group, row, _, _ = self.index[number].tolist()
        where = f"{path}: row group {group}, row {row}"
        [fields] = read_group(path, group).slice(row, 1).to_pylist()
        where = named(where, fields, "id")
        pictures = []
        for name in PICTURES:
            pictures += as_list(fields.pop(name, None))
        images = [self.picture(picture, where) for picture in pictures]
        turns = need_list(fields, "conversations", where)
        for turn in need_list(fields, "texts", where):
            turn = turn or {}
            turns += [
                {"from": "human", "value": turn.get("user")},
                {"from": "gpt", "value": turn.get("assistant")},
            ]
        fields["conversations"] = turns
        return conversation(where, turns, images, fields, add_marks=True)

    def picture(self, picture, where):
        """{bytes, path} -> (bytes, 0, -1), or where the file of that name lies."""
        if isinstance(picture, bytes):
            picture = {"bytes": picture}
        if not isinstance(picture, dict):
            picture = {}
        if content := picture.get("bytes"):
            return content, 0, -1
        if picture.get("path") and self.source.images:
            return self.source.image(picture["path"], where)
        raise BadInput(f"{where}: has an empty picture; fetch the file again")


def as_list(value):
    """One may stand alone, and may be null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@contextmanager
def arrow(path):
    """pyarrow raises its own kinds of errors, some of them plain ones; here they become the reader's sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        raise BadInput(f"{path}: cannot be read as parquet ({e!r:.200}); fetch it again") from e


@functools.lru_cache(maxsize=128)
def opened(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadInput(f"{path}: to read parquet, pip install pyarrow") from None
    return ParquetFile(path)


@functools.lru_cache(maxsize=1)
def read_group(path, group):
    with arrow(path):
        check_unchanged(path)
        file = opened(path)
        columns = [name for name in file.schema_arrow.names if name in ("id", *PICTURES, *TEXTS)]
        return file.read_row_group(group, columns, use_threads=False)  # loaders are forks


def scan(path):
    """Rows (row group, row in it, bytes of text, pictures), without reading the pictures."""
    rows = []
    with arrow(path):
        file = opened(path)
        leaves = [file.schema.column(n).path for n in range(len(file.schema))]
        roots = {leaf.split(".")[0] for leaf in leaves}
        if not roots.intersection(TEXTS):
            raise BadInput(f"{path}: has the columns {', '.join(sorted(roots))}, none of {TEXTS}")
        columns = [
            leaf
            for leaf in leaves
            if leaf.split(".")[0] in (*PICTURES, *TEXTS) and not leaf.endswith("bytes")
        ]
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            if size > LARGEST:
                raise BadInput(
                    f"{path}: row group {group} has {size} bytes, and {LARGEST} are the most; "
                    "write it anew with smaller ones"
                )
            table = file.read_row_group(group, columns, use_threads=False)
            for row, fields in enumerate(table.to_pylist()):
                turns = [turn for name in TEXTS for turn in fields.get(name) or []]
                text = sum(len(value or "") for turn in turns for value in (turn or {}).values())
                pictures = sum(len(as_list(fields.get(name))) for name in PICTURES)
                rows.append((group, row, text, pictures))
    return np.array(rows, np.int64).reshape(-1, 4)
