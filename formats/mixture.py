"""A mixture of sources, as a TOML file describes it."""

import dataclasses
import glob
import os
import tomllib
from dataclasses import dataclass

from formats.aokvqa import AokVqa
from formats.caption_shards import CaptionShards
from formats.coco_caption import CocoCaption
from formats.conversations import Conversations
from formats.gqa import Gqa
from formats.ocrvqa import OcrVqa
from formats.parquet import Parquet
from formats.refcoco import RefCoco
from formats.refer import Refer
from formats.textcaps import TextCaps
from formats.textvqa import TextVqa
from formats.visual_genome import VisualGenome
from formats.vqa import Vqa
from support.errors import BadInput
from support.files import reading, whole

BOXED = ["ground", "region"]  # phrase -> box, box -> phrase
FORMATS = {  # name: reader, its tasks (the first if none is named)
    "caption-shards": (CaptionShards, ["caption"]),
    "coco-caption": (CocoCaption, ["caption"]),
    "textcaps": (TextCaps, ["caption"]),
    "vqa": (Vqa, ["vqa"]),
    "gqa": (Gqa, ["vqa"]),
    "textvqa": (TextVqa, ["vqa"]),
    "ocrvqa": (OcrVqa, ["vqa"]),
    "aokvqa": (AokVqa, ["vqa"]),
    "refcoco": (RefCoco, BOXED),
    "refer": (Refer, BOXED),
    "visual-genome": (VisualGenome, BOXED),
    "conversations": (Conversations, ["chat"]),
    "parquet": (Parquet, ["chat"]),
}
CROPPED = ("caption", "vqa")  # may see a part of the picture in training, as no box is involved


@dataclass
class Source:
    """One [[source]] of a mixture, opened."""

    name: str = ""
    format: str = ""
    annotations: str | None = None  # the JSON or JSONL
    questions: str | None = None  # vqa: VQAv2's other file
    instances: str | None = None  # refer: instances.json
    split: str | None = None  # refer, ocrvqa: which part of the file; in training "train"
    images: str | None = None  # folder
    shards: str | list | None = None  # tars: a pattern such as "laion/*.tar", or a list of them
    files: str | list | None = None  # parquet: the same
    weight: float | int | None = None  # share of the rows, in all sources or in none (by size)
    task: str | None = None  # with boxes: "ground" (phrase -> box) or "region" (box -> phrase)
    crop: bool | None = None  # random crops in training; the task's own habit if not given
    image_name: str | None = None  # vqa: how an image_id makes a file name
    home: str | None = None  # where the set comes from and how large it is, for who lacks it
    protocol: str | None = None  # of evaluate.py, for this source
    published: float | int | None = None  # what others report, in percent, to stand beside ours
    links: bool = False  # let links inside `images` lead out of it
    toml: str = "the mixture"  # where all this stands, for messages and relative paths
    train: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type):
                self.wrong(f"`{field.name}` is {value!r}, of the wrong type; mend it")
        if not self.name or self.format not in FORMATS:
            self.wrong(
                f"format '{self.format}': give it a `name` and a `format` of {', '.join(FORMATS)}"
            )
        reader, tasks = FORMATS[self.format]
        self.task = self.task or tasks[0]
        if self.task not in tasks:
            self.wrong(
                f"format '{self.format}' has the task '{tasks[0]}', not '{self.task}'; remove `task`"
            )
        if self.weight is not None and not 0 < self.weight < 1e9:
            self.wrong(f"`weight` is {self.weight}, not a number between 0 and 1e9; mend it")
        if self.crop and self.task not in CROPPED:
            self.wrong(f"task '{self.task}' may not be cropped; remove `crop`")
        if self.crop is None:
            self.crop = self.task in CROPPED
        self.check_files()
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

    def paths(self, key):
        """The file or files that a key names, relative to the TOML file."""
        names = getattr(self, key)
        if not names:
            self.wrong(f"format '{self.format}' needs `{key}`; add it")
        if isinstance(names, str):
            names = [names]
        folder = os.path.dirname(self.toml)
        if key in ("shards", "files"):
            folder = glob.escape(folder)  # its name is no pattern
        return [os.path.join(folder, str(name)) for name in names]

    def path(self, key):
        return self.paths(key)[0]

    def check_files(self):
        """What is not there is named with its home, before anything is opened."""
        for key in ("annotations", "questions", "instances", "images", "shards", "files"):
            for path in self.paths(key) if getattr(self, key) else []:
                if not os.path.exists(path) and not glob.glob(path):
                    home = f"; it comes from {self.home}" if self.home else ""
                    self.wrong(f"{path} is not there{home}")

    def split_of(self, splits):
        """Which of a reader's splits is asked for."""
        split = self.split or ("train" if self.train else None)
        if split not in splits:
            self.wrong(f"`split` is {split!r}; name one of {', '.join(splits)}")
        return split

    def image(self, name, where):
        """A name in an annotation file as (path, 0, -1). It may not lead out of the folder: a stranger wrote it."""
        folder = os.path.realpath(self.path("images"))
        follow = os.path.normpath if self.links else os.path.realpath
        with reading(f"{where}: image {name!r}"):
            # no system has longer names, and following links takes long in them
            path = follow(os.path.join(folder, name[:4096]))
        if not path.startswith(os.path.join(folder, "")):
            raise BadInput(
                f"{where}: image {name!r} leads out of {folder}; for links set `links = true`"
            )
        return path, 0, -1


def load_mixture(path, train=True, missing=None):
    """A mixture TOML -> its sources, opened. Relative paths are relative to the TOML file.

    Given a list, `missing` takes what is wrong with sources that cannot be opened, and they are left out."""
    raw = whole(path)
    try:
        content = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: is not valid TOML ({e}); mend it") from e
    tables = content.pop("source", None)
    is_list = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if content or not tables or not is_list:
        raise BadInput(
            f"{path}: must hold [[source]] tables and nothing else; see the README for one"
        )
    known = {field.name for field in dataclasses.fields(Source)} - {"toml", "train"}
    for table in tables:
        for key in sorted(table.keys() - known):
            raise BadInput(
                f"{path}: source '{table.get('name')}': unknown key '{key}'; "
                f"it takes {', '.join(sorted(known))}"
            )
    if len({str(table.get("name")) for table in tables}) < len(tables):
        raise BadInput(f"{path}: two sources have one name; rename one")
    if len({"weight" in table for table in tables}) > 1:
        raise BadInput(
            f"{path}: some sources have a `weight` and some have none; give it to all or to none"
        )
    sources = []
    for table in tables:
        try:
            sources.append(Source(**table, toml=str(path), train=train))
        except BadInput as e:
            if missing is None:
                raise
            missing.append(str(e))
    return sources
