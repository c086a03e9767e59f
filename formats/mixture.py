"""A mixture of sources, as a TOML file describes it."""

import dataclasses
import glob
import os
import tomllib
from dataclasses import dataclass

from formats.caption_shards import CaptionShards
from formats.coco_caption import CocoCaption
from formats.conversations import Conversations
from formats.refcoco import RefCoco
from formats.vqa import Vqa
from support.errors import BadInput
from support.files import reading, whole

FORMATS = {  # name: reader, its tasks (the first if none is named), keys that must be there
    "caption-shards": (CaptionShards, ["caption"], ["shards"]),
    "coco-caption": (CocoCaption, ["caption"], ["annotations", "images"]),
    "vqa": (Vqa, ["vqa"], ["images"]),
    "refcoco": (RefCoco, ["ground", "region"], ["annotations", "images"]),
    "conversations": (Conversations, ["chat"], ["annotations"]),
}
CROPPED = ("caption", "vqa")  # may see a part of the picture in training, as no box is involved


@dataclass
class Source:
    """One [[source]] of a mixture, opened."""

    name: str = ""
    format: str = ""
    annotations: str | None = None  # the JSON or JSONL
    questions: str | None = None  # vqa: VQAv2's other file
    images: str | None = None  # folder
    shards: str | list | None = None  # tars: a pattern such as "laion/*.tar", or a list of them
    weight: float | int | None = None  # share of the rows, in all sources or in none (by size)
    task: str | None = None  # refcoco: "ground" (phrase -> box) or "region" (box -> phrase)
    crop: bool | None = None  # random crops in training; the task's own habit if not given
    image_name: str | None = None  # vqa: how an image_id makes a file name
    links: bool = False  # let links inside `images` lead out of it
    toml: str = "the mixture"  # where all this stands, for messages and relative paths
    train: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type):
                self.wrong(f"`{field.name}` is {value!r}, of the wrong type; mend it")
        if not self.name or not self.format:
            self.wrong("needs a `name` and a `format`; add them")
        if self.format not in FORMATS:
            self.wrong(f"format '{self.format}' is none of {', '.join(FORMATS)}; mend it")
        reader, tasks, keys = FORMATS[self.format]
        for key in keys:
            self.option(key)
        self.task = self.task or tasks[0]
        if self.task not in tasks:
            self.wrong(
                f"format '{self.format}' has the task '{tasks[0]}', not '{self.task}'; remove `task`"
            )
        weight = self.weight
        if weight is not None and (weight is True or not 0 < weight < 1e9):
            self.wrong(f"`weight` is {weight!r}, not a number between 0 and 1e9; mend it")
        if self.crop and self.task not in CROPPED:
            self.wrong(f"task '{self.task}' may not be cropped; remove `crop`")
        if self.crop is None:
            self.crop = self.task in CROPPED
        if self.images:
            folder = self.path("images")
            if not os.path.isdir(folder):
                self.wrong(f"{folder} is not a folder; mend `images`")
            self.folder = os.path.realpath(folder)
        self.reader = reader(self)
        self.lengths = self.reader.lengths  # bytes of the text of each sample
        self.images_each = self.reader.images  # a number, or one per sample
        if not len(self):
            self.wrong("has no records; remove the source, or mend its files")

    def __len__(self):
        return len(self.lengths)

    def read(self, number):
        return self.reader.read(number)

    def wrong(self, what):
        raise BadInput(f"{self.toml}: source '{self.name}': {what}")

    def option(self, key):
        value = getattr(self, key)
        if not value:
            self.wrong(f"format '{self.format}' needs `{key}`; add it")
        return value

    def path(self, key):
        return os.path.join(os.path.dirname(self.toml), self.option(key))

    def paths(self, key):
        patterns = self.option(key)
        if isinstance(patterns, str):
            patterns = [patterns]
        found = []
        for pattern in patterns:
            if not isinstance(pattern, str):
                self.wrong(f"`{key}` holds {pattern!r}, which is no text; mend it")
            path = os.path.join(os.path.dirname(self.toml), pattern)
            files = sorted(glob.glob(path))
            if not files:
                self.wrong(f"nothing matches `{key}` {path}; mend it")
            found += files
        return found

    def image(self, name, where):
        """A name in an annotation file as (path, 0, -1). It may not lead out of the folder: a stranger wrote it."""
        if self.images is None:
            raise BadInput(f"{where}: names an image; add `images`, its folder, to {self.toml}")
        if len(name) > 4096:
            raise BadInput(
                f"{where}: image {name[:60]!r}... has too long a name for a file; mend it"
            )
        with reading(f"{where}: image {name!r}"):
            path = os.path.normpath(os.path.join(self.folder, name))
            real = path if self.links else os.path.realpath(path)
        inside = os.path.join(self.folder, "")
        if not (path.startswith(inside) and real.startswith(inside)):
            raise BadInput(
                f"{where}: image {name!r} leads out of {self.folder}; for links set `links = true`"
            )
        return path, 0, -1


def load_mixture(path, train=True):
    """A mixture TOML -> its sources, opened. Relative paths are relative to the TOML file."""
    raw = whole(path)
    try:
        content = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: is not valid TOML ({e}); mend it") from e
    tables = content.pop("source", None)
    if (
        content
        or not tables
        or not isinstance(tables, list)
        or not all(isinstance(table, dict) for table in tables)
    ):
        raise BadInput(
            f"{path}: must hold [[source]] tables and nothing else; see the README for one"
        )
    known = {field.name for field in dataclasses.fields(Source)} - {"toml", "train"}
    for table in tables:
        for key in sorted(table.keys() - known):
            raise BadInput(f"{path}: unknown key '{key}'; it takes {', '.join(sorted(known))}")
    if len({str(table.get("name")) for table in tables}) < len(tables):
        raise BadInput(f"{path}: two sources have one name; rename one")
    if len({"weight" in table for table in tables}) > 1:
        raise BadInput(
            f"{path}: some sources have a `weight` and some have none; give it to all or to none"
        )
    return [Source(**table, toml=str(path), train=train) for table in tables]
