"""Files on disk -> records: any sample of any format by its number, nothing held in memory.

    sources = load_mixture("recipes/stage2.toml")     # opened: JSON and tars are indexed once
    record = sources[0].read(123)                     # see Record; its images are named, not decoded

A mixture is a TOML file of [[source]] tables (see Source); every file is read where it lies, nothing is converted.
To add a format, write its reader and name it in FORMATS.
"""

import dataclasses
import functools
import glob
import os
import tomllib
from dataclasses import dataclass

from formats.caption_shards import caption_shards
from formats.coco_caption import coco_caption
from formats.conversations import conversations
from formats.refcoco import refcoco
from formats.vqa import vqa
from support.errors import BadInput
from support.files import reading, whole

CROPPED = (
    "caption",
    "vqa",
)  # tasks that may see a part of the picture in training: no box is involved

FORMATS = {  # name: reader, its task, keys that must be there
    "caption-shards": (caption_shards, "caption", ("shards",)),
    "coco-caption": (coco_caption, "caption", ("annotations", "images")),
    "vqa": (vqa, "vqa", ("images",)),
    "refcoco": (refcoco, "ground", ("annotations", "images")),
    "conversations": (conversations, "chat", ("annotations",)),
}


@dataclass
class Source:
    """One [[source]] of a mixture, opened. Only its options are pickled: a spawned worker opens it again."""

    name: str = ""
    format: str = ""
    annotations: str | None = None  # the JSON or JSONL
    questions: str | None = None  # vqa: VQAv2's other file
    images: str | None = None  # folder
    shards: str | list | None = None  # tars: a pattern such as "laion/*.tar", or a list of them
    weight: float | int | None = (
        None  # share of the rows; all sources or none have one (none: by size)
    )
    task: str | None = (
        None  # refcoco: "ground" (phrase -> box, the default) or "region" (box -> phrase)
    )
    crop: bool | None = None  # random crops in training; the task's own habit if not given
    image_name: str | None = None  # vqa: how an image_id makes a file name
    links: bool = False  # let links inside `images` lead out of it
    toml: str = "the mixture"  # where all this stands, for messages and relative paths
    train: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                not isinstance(value, field.type)
                or field.name == "weight"
                and isinstance(value, bool)
            ):
                self.wrong(f"`{field.name}` is {value!r}, of the wrong type; mend it")
        if not self.name or not self.format:
            self.wrong("needs a `name` and a `format`; add them")
        if self.format not in FORMATS:
            self.wrong(f"format '{self.format}' is none of {', '.join(FORMATS)}; mend it")
        reader, task, keys = FORMATS[self.format]
        if missing := [key for key in keys if not getattr(self, key)]:
            self.wrong(f"format '{self.format}' needs `{missing[0]}`; add it")
        if self.format == "vqa" and not (self.annotations or self.questions):
            self.wrong(
                "format 'vqa' needs `annotations`, or `questions` and `annotations`; add them"
            )
        if self.task not in (None, task) and (task, self.task) != ("ground", "region"):
            self.wrong(
                f"format '{self.format}' has the task '{task}', not '{self.task}'; remove `task`"
            )
        if self.weight is not None and not (0 < self.weight < 1e9):
            self.wrong(f"weight {self.weight} is not between 0 and 1e9; mend it")
        self.task = self.task or task
        can = self.task in CROPPED
        if self.crop and not can:
            self.wrong(f"task '{self.task}' may not be cropped; remove `crop`")
        self.crop = can if self.crop is None else self.crop
        if self.images is not None:
            with reading(self.images):
                self.folder = os.path.realpath(self.path("images"))
            if not os.path.isdir(self.folder):
                self.wrong(f"{self.path('images')} is not a folder; mend `images`")
        self.bytes, self.marks, self.read = reader(self)
        if len(self.bytes) == 0:
            self.wrong("has no records; remove the source, or mend its files")

    def wrong(self, what):
        raise BadInput(f"{self.toml}: source '{self.name}': {what}")

    def __len__(self):
        return len(self.bytes)

    def options(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __reduce__(self):
        return functools.partial(Source, **self.options()), ()

    def path(self, key):
        return os.path.join(os.path.dirname(self.toml), getattr(self, key))

    def paths(self, key):
        found, patterns = [], getattr(self, key)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                self.wrong(f"`{key}` holds {pattern!r}, which is no text; mend it")
            full = os.path.join(os.path.dirname(self.toml), pattern)
            found += (files := sorted(glob.glob(full)) if glob.has_magic(full) else [full])
            if not files:
                self.wrong(f"nothing matches `{key}` {full}; mend it")
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
        if not all(place.startswith(os.path.join(self.folder, "")) for place in (path, real)):
            raise BadInput(
                f"{where}: image {name!r} leads out of {self.folder}; for links set `links = true`"
            )
        return path, 0, -1


def load_mixture(path, train=True):
    """A mixture TOML -> its sources, opened. Relative paths are relative to the TOML file."""
    raw = whole(path)
    try:
        tables = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: is not valid TOML ({e}); mend it") from e
    tables = tables.get("source") if set(tables) == {"source"} else None
    if (
        not isinstance(tables, list)
        or not tables
        or not all(isinstance(table, dict) for table in tables)
    ):
        raise BadInput(
            f"{path}: must hold [[source]] tables and nothing else; see the README for one"
        )
    known = {field.name for field in dataclasses.fields(Source)} - {"toml", "train"}
    for i, table in enumerate(tables):
        if extra := sorted(set(table) - known):
            raise BadInput(
                f"{path}: source {i}: unknown key '{extra[0]}'; it takes {', '.join(sorted(known))}"
            )
    if len({str(table.get("name")) for table in tables}) < len(tables):
        raise BadInput(f"{path}: two sources have one name; rename one")
    if len({"weight" in table for table in tables}) > 1:
        raise BadInput(
            f"{path}: some sources have a `weight` and some have none; give it to all or to none"
        )
    return [Source(**table, toml=str(path), train=train) for table in tables]
