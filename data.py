"""Records on disk -> samples -> token ids and targets -> batches.

    data = Data("recipes/stage2.toml", Tokenizer("vicuna-7b-v1.5"), image_size=448, visual=256, context=2048, batch=256)
    for micro_batches in data.batches(start=step, rank=rank, world=world, accum=4, workers=8): ...
    for item in data.samples("refcoco"): ...                 # in order, for evaluation

A mixture is a TOML file of [[source]] tables (see Source); every file is read where it lies, nothing is converted.
Names of dimensions: B rows, T tokens, N images, S pixels per side, V = P*P visual tokens per image.
"""
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import tomllib
import warnings
from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageOps

from model import IGNORE, IMAGE

HERE = "<ImageHere>"                   # where the visual tokens go; reserved, so it may not stand in anybody's text
MARK = "<image><ImageHere>"            # what a conversation's <image> becomes; LLaVA's own models want HERE alone
MEAN_COLOUR = (122, 116, 104)          # CLIP's mean in bytes: what pads a picture to a square
CROP_SCALE = (0.5, 1.0)                # share of the area that a random crop keeps
BUCKET = 16                            # T and the supervised count are rounded up to this: few shapes, 1% waste
WINDOW = 128                           # steps whose rows are sorted by length together; 1 keeps every batch mixed
ROUND = 4096                           # rows after which the mixture's shares are exact
TRIES = 100                            # unreadable samples in a row before we give up
PIXELS = 89_000_000                    # an image that claims more is a bomb or a mistake
warnings.simplefilter("ignore", Image.DecompressionBombWarning)        # Pillow warns where we refuse

class BadInput(ValueError):
    """What a user brought is wrong. One sentence: the file, the record, the remedy. Scripts print it and exit 2."""

# ---- bytes on disk ---------------------------------------------------------------------------------------------------
# In memory are integers only: records are read from their file by position, and the page cache serves every worker.

@contextmanager
def reading(path):
    try: yield
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check path and rights") from e

@functools.lru_cache(maxsize=128)      # open files: a thousand tars would exceed the usual limit
def opened(path): return open(path, "rb", buffering=0)
def read_at(path, offset, size):
    """Bytes of a file by position; pread has no file pointer, so forked workers do not disturb one another."""
    with reading(path): data = os.pread(opened(path).fileno(), size, offset)
    if len(data) < size: raise BadInput(f"{path}: ends before byte {offset + size}; if it has changed, start again")
    return data
def whole(path):
    with reading(path): return Path(path).read_bytes()
def indexed(path, kind, build):
    """build(path) -> int64 array, kept in the user's cache folder until the file's size or time changes."""
    with reading(path): stat = os.stat(path)
    key = f"1 {kind} {os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoinfmllm"
    cached = folder / (hashlib.sha1(key.encode(errors="replace")).hexdigest() + ".npy")
    try: return np.load(cached, allow_pickle=False)
    except (OSError, ValueError, EOFError): index = build(path)
    try:                                                       # beside, then renamed: another process never sees half
        folder.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}.npy")
        np.save(part, index)
        os.replace(part, cached)
    except OSError: print(f"note: {folder} cannot be written, so {path} is indexed anew at each start")
    return index

JSON, SPACES = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
def skip(text, at): return SPACES.match(text, at).end()
def find_array(text, key):
    """Position of the first element of the top-level array, or of the array under `key` of the top-level object."""
    at = skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
    while key is not None:                                     # walk the object's keys, stop behind the one we want
        if text[at:at + 1] not in ("{", ","): raise ValueError(f"it is not an object with a list '{key}'")
        name, at = JSON(text, skip(text, at + 1))
        at = skip(text, at)
        if text[at:at + 1] != ":": raise ValueError(f"':' expected at byte {at}")
        at = skip(text, at + 1)
        if name == key: break
        at = skip(text, JSON(text, at)[1])
    if text[at:at + 1] != "[": raise ValueError(f"'{key}' is not a list" if key else "it is not a list")
    return skip(text, at + 1)

def scan_json(raw, key, tags):
    """Rows (start, stop, tag, images) of the records of a JSON list; tags(record) gives an integer per row."""
    text, rows = str(raw, "latin-1"), array("q")               # a character per byte: positions in it are the file's
    at = find_array(text, key)
    while text[at:at + 1] != "]":
        record, end = JSON(text, at)
        for tag in tags(record): rows.extend((at, end, tag, text.count("<image>", at, end)))
        at = skip(text, end)
        if text[at:at + 1] == ",": at = skip(text, at + 1)
        elif text[at:at + 1] != "]": raise ValueError(f"',' or ']' expected at byte {at}")
    return rows

def scan_lines(raw, tags):
    """The same of a JSON-lines file; lines are not parsed where tags is None, so a million take two seconds."""
    ends = np.flatnonzero(np.frombuffer(raw + b"\n", np.uint8) == 10)
    starts = np.concatenate(([3 if raw[:3] == b"\xef\xbb\xbf" else 0], ends[:-1] + 1))
    full, rows = ends - starts > 1, array("q")                                          # not empty, not \r alone
    for start, end in zip(starts[full].tolist(), ends[full].tolist()):
        try: numbers = tags(json.loads(raw[start:end])) if tags else (0,)
        except (ValueError, RecursionError): numbers = (0,)                             # said when it is read
        for tag in numbers: rows.extend((start, end, tag, raw.count(b"<image>", start, end)))
    return rows

def json_index(path, key=None, by=""):
    """The rows of a JSON or JSONL file (see scan_json), tagged by an id; by="sentences": a row for each of them."""
    tags = sentences_of if by == "sentences" else tag_by(by) if by else None
    def build(path):
        raw = whole(path)
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"): raise BadInput(f"{path}: is UTF-16; save it as UTF-8")
        lines = key is None and raw[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
        try: rows = scan_lines(raw, tags) if lines else scan_json(raw, key, tags or (lambda record: (0,)))
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{path}: is not the JSON it should be ({e}); fetch it again or check `format`") from e
        return np.array(rows, np.int64).reshape(-1, 4)
    return indexed(path, f"json {key} {by}", build)

def json_at(path, start, stop, where):
    raw = read_at(path, start, stop - start)
    try: record = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: is not valid JSON in UTF-8 ({e}); mend or remove it") from e
    if not isinstance(record, dict): raise BadInput(f"{where}: is {type(record).__name__}, not an object; remove it")
    return record

def tag_by(key):
    """Records' ids as integers, to join two lists; ids that are text are hashed."""
    def tags(record):
        value = record.get(key) if isinstance(record, dict) else None
        if type(value) is int and abs(value) < 2 ** 62: return (value,)
        return (int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big"),)
    return tags
def sentences_of(record):
    sentences = record.get("sentences") if isinstance(record, dict) else None
    return range(max(1, len(sentences))) if isinstance(sentences, list) else (0,)
def match(keys, among):
    """For each key its position in `among`, -1 where it is not there."""
    if not len(among): return np.full(len(keys), -1)
    order = np.argsort(among, kind="stable")
    at = order[np.searchsorted(among, keys, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[at] == keys, at, -1)

def scan_tar(path):
    """Rows (image offset, image size, caption offset, caption size, is JSON) of a webdataset tar; -1: not there.
    Headers alone are read: name, size, next. tarfile would make an object per member."""
    samples, at, name, size, end = {}, 0, None, None, os.path.getsize(path)
    while at + 512 <= end and any(head := read_at(path, at, 512)):                      # zeros are the end mark
        try:
            if sum(head) - sum(head[148:156]) + 256 != int(head[148:156].strip(b"\0 "), 8): raise ValueError
            plain = int.from_bytes(head[125:136], "big") if head[124] & 128 else int(head[124:136].strip(b"\0 "), 8)
        except ValueError as e: raise BadInput(f"{path}: is not a tar at byte {at}; fetch it again") from e
        kind, body, size = head[156:157], at + 512, plain if size is None else size
        if size < 0 or body + size > end: raise BadInput(f"{path}: ends inside a member (byte {at}); fetch it again")
        at = body + (size + 511) // 512 * 512
        if kind == b"L": name, size = read_at(path, body, size).rstrip(b"\0"), None; continue
        if kind in b"xg":                                                               # "<length> <key>=<value>\n"
            pairs = dict(re.findall(rb"\d+ ([^=\n]+)=([^\n]*)\n", read_at(path, body, size))) if kind == b"x" else {}
            name, size = pairs.get(b"path", name), int(pairs[b"size"]) if pairs.get(b"size", b"").isdigit() else None
            continue
        if name is None:
            name = head[:100].split(b"\0")[0]
            if head[257:262] == b"ustar" and head[345]: name = head[345:500].split(b"\0")[0] + b"/" + name
        folder, _, base = name.decode(errors="replace").rpartition("/")
        key, dot, ending = base.partition(".")
        ending, row = ending.lower(), [-1, -1, -1, -1, 0]
        if kind in b"\0" b"07" and ending in ("jpg", "jpeg", "png", "webp", "txt", "json"):
            row = samples.setdefault((folder, key), row)
            if ending not in ("txt", "json"): row[:2] = body, size
            elif ending == "txt" or row[2] < 0: row[2:] = body, size, int(ending == "json")
        name = size = None
    return np.array(list(samples.values()), np.int64).reshape(-1, 5)

# ---- formats: a reader each ------------------------------------------------------------------------------------------
# A reader takes a Source and returns (bytes of text per sample, images per sample or None, read(number) -> Record).
# To add a format, write one and name it in FORMATS.

@dataclass
class Record:
    where: str                         # file and record, for messages
    refs: list                         # its images: (path, offset, size) each; size -1: the whole file
    text: str = ""                     # the question, or the phrase
    answers: list = ()                 # what people answered: references; of a conversation, one per turn
    box: tuple | None = None           # x1, y1, x2, y2 in pixels of the image
    turns: list = ()                   # conversations: (question, answer) each, <image> where an image stands
    fields: dict = ()                  # the record as it lies on disk: question_id, image_id, type, whatever else
    # what Data.samples adds; there, turns are (prompt, answer) of any task
    source: str = ""
    task: str = ""
    number: int = -1
    images: list = ()                  # PIL, RGB, upright, whole
    size: tuple | None = None          # width, height of the first image
    prompt: str = ""                   # the full template, of the first turn

def need(fields, key, kind, where):
    """fields[key], which must be a `kind`."""
    if isinstance(value := fields.get(key), kind) and not isinstance(value, bool):
        if kind is str and not value.strip(): raise BadInput(f"{where}: '{key}' is empty; fill it or remove the record")
        return clean(value, where) if kind is str else value
    found, due = type(value).__name__ if key in fields else "missing", {str: "text", list: "a list", int: "a number"}
    raise BadInput(f"{where}: '{key}' is {found} but must be {due[kind]}; mend or remove it")
def clean(text, where):
    """Text that can be encoded, and cannot be taken for a placeholder."""
    if not isinstance(text, str): raise BadInput(f"{where}: holds {type(text).__name__} where text is due; mend it")
    try: text.encode()
    except UnicodeEncodeError as e: raise BadInput(f"{where}: holds half a character (a surrogate); mend it") from e
    if HERE in text: raise BadInput(f"{where}: holds the reserved mark {HERE}; remove it")
    return text

def caption_shards(source):
    """webdataset tars: key.jpg|png|webp beside key.txt, or key.json with `caption`."""
    tars = source.paths("shards")
    indexes = [indexed(tar, "tar", scan_tar) for tar in tars]
    starts = np.cumsum([0] + [len(index) for index in indexes])
    index = np.concatenate(indexes)
    def read(number):
        tar = tars[starts.searchsorted(number, "right") - 1]
        image, size, text, length, is_json = index[number].tolist()
        name = read_at(tar, (text if image < 0 else image) - 512, 100).split(b"\0")[0].decode(errors="replace")
        key = re.sub(r"\.[^/]*$", "", name)
        where = f"{tar}: {key}"
        if image < 0: raise BadInput(f"{where}: has a caption but no image; remove it")
        if text < 0: raise BadInput(f"{where}: has neither .txt nor .json beside it; remove it")
        raw = read_at(tar, text, length)
        try: fields = json_at(tar, text, text + length, where) if is_json else {"caption": raw.decode()}
        except UnicodeDecodeError as e: raise BadInput(f"{where}: its caption is not UTF-8; mend it") from e
        caption = need(fields, "caption", str, where)
        return Record(where, [(tar, image, size)], answers=[caption], fields={"key": key, **fields})
    return index[:, 3].clip(0), None, read

def coco_caption(source):
    """The official captions JSON: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}.
    Training takes every caption once; evaluation every image once, with all its captions as references."""
    path = source.path("annotations")
    images, captions = (json_index(path, *by) for by in (("images", "id"), ("annotations", "image_id")))
    captions = captions[np.argsort(captions[:, 2], kind="stable")]                      # an image's captions together
    first = np.arange(len(captions)) if source.train else np.unique(captions[:, 2], return_index=True)[1]
    last = np.append(first[1:], len(captions))
    owner = match(captions[first, 2], images[:, 2])
    def read(number):
        where = f"{path}: caption {number}"
        if owner[number] < 0: raise BadInput(f"{where}: no entry of 'images' has its image_id; mend or remove it")
        each = [json_at(path, *span, where) for span in captions[first[number]:last[number], :2].tolist()]
        image = json_at(path, *images[owner[number], :2].tolist(), f"{where}, its image")
        answers = [need(fields, "caption", str, where) for fields in each]
        refs = [source.image(need(image, "file_name", str, where), where)]
        return Record(where, refs, answers=answers, fields={**image, **each[0]})
    return captions[first, 1] - captions[first, 0], None, read

def official_name(source, path, index):
    """VQAv2 names a picture by its number alone: COCO_<data_subtype>_<12 digits>.jpg, unless `image_name` says else."""
    if source.image_name or not len(index): return source.image_name
    start, stop = int(index[0, 0]), int(index[-1, 1])
    around = read_at(path, 0, start) + read_at(path, stop, os.path.getsize(path) - stop)
    found = re.search(rb'"data_subtype"\s*:\s*"([\w-]+)"', around)
    if not found: raise BadInput(f"{path}: has no 'data_subtype'; add image_name = \"{{:012d}}.jpg\" to {source.toml}")
    return f"COCO_{found[1].decode()}_{{:012d}}.jpg"

def vqa(source):
    """VQAv2's pair of files (`questions`, `annotations`), or one list of {image, question, answers}."""
    paired = source.questions is not None
    path = source.path("questions" if paired else "annotations")
    index = json_index(path, "questions", "question_id") if paired else json_index(path)
    other = source.path("annotations") if paired and source.annotations else None      # a test split has no answers
    if paired: template = official_name(source, path, index)
    if other:
        notes = json_index(other, "annotations", "question_id")
        joined = match(index[:, 2], notes[:, 2])
    def read(number):
        where = f"{path}: record {number}"
        fields = json_at(path, *index[number, :2].tolist(), where)
        question = need(fields, "question", str, where)
        if paired:
            image = need(fields, "image_id", int, where)
            try: name = template.format(image)
            except (ValueError, LookupError) as e:
                raise BadInput(f"{where}: image_name {template!r} does not take its image_id ({e}); mend it") from e
        else: name = need(fields, "image", str, where)
        if other:
            if joined[number] < 0: raise BadInput(f"{where}: {other} has no answer to its question_id; remove it")
            fields |= json_at(other, *notes[joined[number], :2].tolist(), f"{where}, its answers")
        answers = fields.get("answers", fields.get("answer", []))
        answers = [answers] if isinstance(answers, str) else need({"answers": answers}, "answers", list, where)
        answers = [clean(a.get("answer") if isinstance(a, dict) else a, where).strip() for a in answers]
        if source.train and not answers: raise BadInput(f"{where}: has no answers; remove it")
        return Record(where, [source.image(name, where)], question, answers, fields=fields)
    return index[:, 1] - index[:, 0], None, read

def refcoco(source):
    """A list of {img_name, bbox: [x1,y1,x2,y2], sentences: [{sent, sent_id}], segment_id}: a sample per sentence."""
    path = source.path("annotations")
    index = json_index(path, by="sentences")
    def read(number):
        start, stop, which, _ = index[number].tolist()
        where = f"{path}: sample {number}"
        fields = json_at(path, start, stop, where)
        sentences = need(fields, "sentences", list, where)
        if which >= len(sentences) or not isinstance(sentences[which], dict):
            raise BadInput(f"{where}: its 'sentences' are no list of objects with 'sent'; mend or remove it")
        fields |= sentences[which]
        phrase = need(fields, "sent", str, where)
        refs = [source.image(need(fields, "img_name", str, where), where)]
        return Record(where, refs, phrase, [phrase], tuple(need(fields, "bbox", list, where)), fields=fields)
    return np.full(len(index), 64), None, read             # a record's bytes grow with its sentences, a sample's do not

def conversations(source):
    """LLaVA's JSON or JSONL: {id, image (none, one or a list), conversations: [{from: human|gpt, value}]}."""
    path = source.path("annotations")
    index = json_index(path)
    def read(number):
        where = f"{path}: record {number}"
        fields = json_at(path, *index[number, :2].tolist(), where)
        names = fields.get("image") or []
        names = [names] if isinstance(names, str) else need(fields, "image", list, where) if names else []
        said = need(fields, "conversations", list, where)
        if not all(isinstance(turn, dict) for turn in said):
            raise BadInput(f"{where}: a turn is no object with 'from' and 'value'; mend or remove it")
        said = [(need(turn, "from", str, where), clean(turn.get("value"), where)) for turn in said]
        if said and said[0][0] != "human": said = said[1:]                # as LLaVA does: some begin with a half turn
        said = said[:len(said) // 2 * 2]                                  # a last question that nobody answered
        if not said or [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
            raise BadInput(f"{where}: turns must alternate between 'human' and 'gpt'; mend or remove it")
        turns = [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]
        marks = sum(question.count("<image>") for question, _ in turns)
        if marks != len(names): raise BadInput(f"{where}: {marks} <image> for {len(names)} images; mend or remove it")
        refs = [source.image(clean(name, where), where) for name in names]
        return Record(where, refs, answers=[answer for _, answer in turns], turns=turns, fields=fields)
    return index[:, 1] - index[:, 0], index[:, 3], read

FORMATS = {   # name: reader, its task, keys that must be there
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
    annotations: str | None = None     # the JSON or JSONL
    questions: str | None = None       # vqa: VQAv2's other file
    images: str | None = None          # folder
    shards: str | list | None = None   # tars: a pattern such as "laion/*.tar", or a list of them
    weight: float | int | None = None  # share of the rows; all sources or none have one (none: by size)
    task: str | None = None            # refcoco: "ground" (phrase -> box, the default) or "region" (box -> phrase)
    crop: bool | None = None           # random crops in training; the task's own habit if not given
    image_name: str | None = None      # vqa: how an image_id makes a file name
    links: bool = False                # let links inside `images` lead out of it
    toml: str = "the mixture"          # where all this stands, for messages and relative paths
    train: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type) or field.name == "weight" and isinstance(value, bool):
                self.wrong(f"`{field.name}` is {value!r}, of the wrong type; mend it")
        if not self.name or not self.format: self.wrong("needs a `name` and a `format`; add them")
        if self.format not in FORMATS: self.wrong(f"format '{self.format}' is none of {', '.join(FORMATS)}; mend it")
        reader, task, keys = FORMATS[self.format]
        if missing := [key for key in keys if not getattr(self, key)]:
            self.wrong(f"format '{self.format}' needs `{missing[0]}`; add it")
        if self.format == "vqa" and not (self.annotations or self.questions):
            self.wrong("format 'vqa' needs `annotations`, or `questions` and `annotations`; add them")
        if self.task not in (None, task) and (task, self.task) != ("ground", "region"):
            self.wrong(f"format '{self.format}' has the task '{task}', not '{self.task}'; remove `task`")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            self.wrong(f"weight {self.weight} is not positive; mend it")
        self.task = self.task or task
        can = TASKS[self.task].crop
        if self.crop and not can: self.wrong(f"task '{self.task}' may not be cropped; remove `crop`")
        self.crop = can if self.crop is None else self.crop
        if self.images is not None:
            with reading(self.images): self.folder = os.path.realpath(self.path("images"))
            if not os.path.isdir(self.folder): self.wrong(f"{self.path('images')} is not a folder; mend `images`")
        self.bytes, self.marks, self.read = reader(self)
        if len(self.bytes) == 0: self.wrong("has no records; remove the source, or mend its files")

    def wrong(self, what): raise BadInput(f"{self.toml}: source '{self.name}': {what}")
    def __len__(self): return len(self.bytes)
    def options(self): return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    def __reduce__(self): return functools.partial(Source, **self.options()), ()
    def path(self, key): return os.path.join(os.path.dirname(self.toml), getattr(self, key))

    def paths(self, key):
        found, patterns = [], getattr(self, key)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str): self.wrong(f"`{key}` holds {pattern!r}, which is no text; mend it")
            full = os.path.join(os.path.dirname(self.toml), pattern)
            found += (files := sorted(glob.glob(full)) if glob.has_magic(full) else [full])
            if not files: self.wrong(f"nothing matches `{key}` {full}; mend it")
        return found

    def image(self, name, where):
        """A name in an annotation file as (path, 0, -1). It may not lead out of the folder: a stranger wrote it."""
        if self.images is None: raise BadInput(f"{where}: names an image; add `images`, its folder, to {self.toml}")
        with reading(f"{where}: image {name!r}"):
            path = os.path.normpath(os.path.join(self.folder, name))
            real = path if self.links else os.path.realpath(path)
        if not all(place.startswith(os.path.join(self.folder, "")) for place in (path, real)):
            raise BadInput(f"{where}: image {name!r} leads out of {self.folder}; for links set `links = true`")
        return path, 0, -1

def load_mixture(path, train=True):
    """A mixture TOML -> its sources, opened. Relative paths are relative to the TOML file."""
    try: tables = tomllib.loads(whole(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadInput(f"{path}: is not valid TOML ({e}); mend it") from e
    tables = tables.get("source") if set(tables) == {"source"} else None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadInput(f"{path}: must hold [[source]] tables and nothing else; see the README for one")
    known = {field.name for field in dataclasses.fields(Source)} - {"toml", "train"}
    for i, table in enumerate(tables):
        if extra := sorted(set(table) - known):
            raise BadInput(f"{path}: source {i}: unknown key '{extra[0]}'; it takes {', '.join(sorted(known))}")
    if len({str(table.get("name")) for table in tables}) < len(tables):
        raise BadInput(f"{path}: two sources have one name; rename one")
    if len({"weight" in table for table in tables}) > 1:
        raise BadInput(f"{path}: some sources have a `weight` and some have none; give it to all or to none")
    return [Source(**table, toml=str(path), train=train) for table in tables]

# ---- boxes -----------------------------------------------------------------------------------------------------------
def format_box(box):
    """Fractions (x1, y1, x2, y2) -> text. Two decimals: with three, the released parser misreads every x2 < 0.1."""
    if not (all(math.isfinite(v) and 0 <= v <= 1 for v in box) and box[0] < box[2] and box[1] < box[3]):
        raise BadInput(f"box {tuple(box)} is degenerate or outside its image; fractions must be 0 <= x1 < x2 <= 1")
    return "<box>({:.2f},{:.2f}),({:.2f},{:.2f})</box>".format(*box)
NUMBER = r"\s*(0(?:\.\d+)?|1(?:\.0+)?)\s*"
BOX = re.compile(rf"<box>\s*\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)\s*</box>", re.ASCII)
def parse_box(text):
    """The first box of a text as fractions, or None if there is none or its corners are the wrong way round."""
    found = BOX.search(text)
    box = tuple(float(v) for v in found.groups()) if found else None
    return box if box and box[0] <= box[2] and box[1] <= box[3] else None

def parse_box_released(text):
    """What the released code reads, its unescaped dots and misreadings included: for figures beside the paper's."""
    found = re.search(r"(0.\d+),(0.\d+).*(0.\d+),(0.\d+)", text)
    try: return tuple(float(v) for v in found.groups()) if found else None
    except ValueError: return None

def fractions(box, size, where):
    """A pixel box of an annotation, checked, as fractions of its image. A pixel beyond the edge is rounding."""
    if len(box) != 4 or not all(type(v) in (int, float) and abs(v) < 1e9 for v in box):              # NaN is not < 1e9
        raise BadInput(f"{where}: bbox {box} is not four finite numbers; mend or remove it")
    (x1, y1, x2, y2), (w, h) = box, size
    if not (x1 < x2 and y1 < y2): raise BadInput(f"{where}: bbox {box} is degenerate; it must be [x1, y1, x2, y2]")
    if min(x1, y1) < -1 or x2 > w + 1 or y2 > h + 1 or min(x2, y2) <= 0 or x1 >= w or y1 >= h:
        raise BadInput(f"{where}: bbox {box} is outside its {w} x {h} image; mend it ([x1, y1, x2, y2] in pixels)")
    return max(x1, 0) / w, max(y1, 0) / h, min(x2, w) / w, min(y2, h) / h

def move_box(box, region):
    """Fractions of an image -> fractions of the square that shows `region` of it (see to_square)."""
    x, y, w, h = region[0], region[1], region[2] - region[0], region[3] - region[1]
    moved = (box[0] - x) / w, (box[1] - y) / h, (box[2] - x) / w, (box[3] - y) / h
    x1, y1, x2, y2 = (min(1., max(0., v)) for v in moved)
    if x1 >= x2 or y1 >= y2: raise BadInput(f"box {tuple(box)} is cropped away; boxes need whole images")
    return x1, y1, x2, y2

# ---- images ----------------------------------------------------------------------------------------------------------
@contextmanager
def pillow(where):
    """Pillow, fed a stranger's bytes, raises almost anything; here and only here it becomes the reader's sentence."""
    try: yield
    except BadInput: raise
    except Exception as e:
        why = " ".join((getattr(e, "strerror", None) or str(e) or type(e).__name__).split())
        raise BadInput(f"{where}: cannot be read as an image ({why}); fetch it again or remove the record") from e

def peek(ref, where=""):
    """(path, offset, size) -> (image, its upright size). Reads the header alone."""
    path, offset, size = ref
    where = f"{where}: image {path}" if size < 0 else where
    with pillow(where):
        if size < 0 and not os.path.isfile(path): raise BadInput(f"{where}: is no file; mend or remove the record")
        image = Image.open(path if size < 0 else io.BytesIO(read_at(path, offset, size)))
        if image.width * image.height > PIXELS: raise BadInput(f"{where}: has over {PIXELS} pixels; shrink it")
        exif = image.format != "PNG" or "exif" in image.info   # a PNG without would be decoded for the asking
        try: turn = image.getexif().get(0x0112, 1) if exif else 1
        except Exception: turn = 1                             # a broken EXIF block is common, and the picture is fine
        image.where, image.turn = where, turn if turn in range(1, 9) else 1
        return image, image.size[::-1] if image.turn >= 5 else image.size

def upright(image, need=None):
    """A peeked image -> RGB: first frame, as the photographer held it, alpha over white, 16 bits scaled to 8.
    `need`: pixels per side that will be used; a JPEG twice as large is decoded at 1/2, 1/4 or 1/8, nearly for free."""
    with pillow(getattr(image, "where", "the image")):
        if need and image.format == "JPEG": image.draft(None, (2 * need, 2 * need))
        if getattr(image, "turn", 1) > 1: image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                         # Pillow's own conversion would clip to white
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
WHOLE = (0.0, 0.0, 1.0, 1.0)

def random_region(size, rng):
    """What RandomResizedCrop keeps (torchvision's rule, aspect 3/4 to 4/3), as fractions of the image."""
    w, h = size
    for _ in range(10):
        area, ratio = w * h * rng.uniform(*CROP_SCALE), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        cw, ch = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if cw <= w and ch <= h:
            x, y = rng.uniform(0, w - cw), rng.uniform(0, h - ch)
            return x / w, y / h, min(1., (x + cw) / w), min(1., (y + ch) / h)
    return WHOLE

def padded_region(size):
    """The square around the whole image; what of it lies outside is filled with the mean colour."""
    (w, h), side = size, max(size)
    x, y = -((side - w) // 2), -((side - h) // 2)
    return x / w, y / h, (x + side) / w, (y + side) / h

def to_square(image, side, region=WHOLE):
    """`region` (fractions) of an RGB image, stretched bicubically over side x side -> uint8 (S,S,3)."""
    w, h = image.size
    box = [region[0] * w, region[1] * h, region[2] * w, region[3] * h]
    if min(region) < 0 or max(region) > 1:
        x, y, right, bottom = map(round, box)
        canvas = Image.new("RGB", (right - x, bottom - y), MEAN_COLOUR)
        canvas.paste(image, (-x, -y))
        image, box = canvas, None
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))

# ---- tasks, prompts, tokens ------------------------------------------------------------------------------------------
def plain(text, gap=""): return " ".join(re.sub(r"[.!\"()*#:;~]", gap, text.lower()).split()[:50])
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions. ")

@dataclass
class Task:
    template: str                      # the prompt, {} for the text
    clean: object = str                # what is done to that text
    crop: bool = False                 # random crops in training
    pad: bool = False                  # pad to a square with the mean colour, instead of squashing
TASKS = {   # the prompts of captioning and of region captions are not published: those two are ours
    "caption": Task(MARK + "Short caption:", crop=True),
    "vqa": Task(MARK + "Question:{} Short answer:", plain, crop=True),
    "ground": Task(MARK + "<ref>{}</ref>"),
    "region": Task(MARK + "{} Short phrase:"),
    "chat": Task("USER: {} ASSISTANT:", pad=True),
}

def prompt(task, text="", image_mark=MARK):
    """The full template of one question; of a chat its first turn, after the image (image_mark="": no image)."""
    text = TASKS[task].clean(text)
    if task != "chat": return TASKS[task].template.format(text)
    return SYSTEM + chat_turn(f"{image_mark}\n{text}" if image_mark else text)
def chat_turn(question): return TASKS["chat"].template.format(question)

def pose(record, task, answer, mark, size=None, region=WHOLE):
    """A record as the (prompt, answer) turns that a model reads; its box as it lies in `region` of the image."""
    if task == "chat":
        turns = [(chat_turn(question.replace("<image>", mark)), said) for question, said in record.turns]
        return [(SYSTEM + turns[0][0], turns[0][1])] + turns[1:]
    if task == "caption": return [(prompt(task), plain(answer, " "))]
    if task == "vqa": return [(prompt(task, record.text), answer)]
    box = format_box(move_box(fractions(record.box, size, record.where), region))
    return [(prompt(task, record.text), box)] if task == "ground" else [(prompt(task, box), record.text)]

class Tokenizer:
    """A sentencepiece model; `path` is the file, or a folder with tokenizer.model."""
    def __init__(self, path):
        self.path = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else str(path)
        self.bytes = whole(self.path)
        try: self.model = m = sentencepiece.SentencePieceProcessor(model_proto=self.bytes)
        except (RuntimeError, ValueError, TypeError) as e:
            raise BadInput(f"{self.path}: is not a sentencepiece model; name LLaMA's tokenizer.model") from e
        self.special = self.bos, self.eos, self.pad = m.bos_id(), m.eos_id(), m.unk_id()
        self.size = len(m)
        if min(self.bos, self.eos) < 0: raise BadInput(f"{self.path}: has no BOS or EOS; name LLaMA's tokenizer.model")

    def __reduce__(self): return Tokenizer, (self.path,)
    def encode(self, text): return self.model.encode(text)
    def decode(self, ids):
        return self.model.decode([int(i) for i in ids if self.size > i >= 0 and i not in self.special])

def encode_prompt(tokenizer, text, visual, bos=True):
    """BOS, then the sides of every <ImageHere> tokenised apart, `visual` placeholders in its place."""
    ids = [tokenizer.bos] if bos else []
    for i, side in enumerate(text.split(HERE)): ids += ([IMAGE] * visual if i else []) + tokenizer.encode(side)
    return ids

def encode_turns(tokenizer, turns, visual):
    """(prompt, answer) turns -> tokens, targets, equally long and shifted: targets[t] is to be predicted at t.
    An answer of None ends the sequence after its prompt, ready for generation."""
    ids, wanted = [], []
    for i, (text, answer) in enumerate(turns):
        asked = encode_prompt(tokenizer, text, visual, bos=i == 0)
        said = [] if answer is None else tokenizer.encode(answer) + [tokenizer.eos]
        ids, wanted = ids + asked + said, wanted + [IGNORE] * len(asked) + said
    if turns[-1][1] is None: return ids, wanted[1:] + [IGNORE]
    return ids[:-1], wanted[1:]                                        # nothing follows the last EOS: it is no input

def truncate(tokens, context):
    """How many tokens fit, an image whole or not at all."""
    cut = min(context, len(tokens))
    while 0 < cut < len(tokens) and tokens[cut] == tokens[cut - 1] == IMAGE: cut -= 1
    return cut

# ---- batches ---------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    images: torch.Tensor               # (N,3,S,S) uint8; one grey picture if the rows have none
    tokens: torch.Tensor               # (B,T) int64, padded on the right
    targets: torch.Tensor              # (B,T) int64, IGNORE where nothing is asked
    image_at: torch.Tensor             # (N*V,) int64, b*T + t of every placeholder; -1 for the grey picture
    target_at: torch.Tensor            # (M,) int64, b*T + t of every target, padded with -1
    supervised: int                    # how many targets count
    bad: list                          # a sentence for every sample that was replaced

    def each(self, do):
        return dataclasses.replace(self, **{k: do(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})
    def to(self, device, non_blocking=False): return self.each(lambda t: t.to(device, non_blocking=non_blocking))
    def pin_memory(self): return self.each(torch.Tensor.pin_memory)

def collate(samples, pad, visual, side, bucket=BUCKET, bad=()):
    """samples: (tokens, targets, [uint8 (S,S,3), ...]) per row -> Batch."""
    up = lambda n: -(-max(1, n) // bucket) * bucket
    B, T = len(samples), up(max(len(tokens) for tokens, _, _ in samples))
    tokens, targets = np.full((B, T), pad), np.full((B, T), IGNORE)
    for b, (ids, wanted, _) in enumerate(samples): tokens[b, :len(ids)], targets[b, :len(ids)] = ids, wanted
    pictures = [picture for _, _, row in samples for picture in row]
    images = torch.empty((max(1, len(pictures)), side, side, 3), dtype=torch.uint8)
    for n, picture in enumerate(pictures or [np.full((side, side, 3), 127)]): images.numpy()[n] = picture
    images = images.permute(0, 3, 1, 2)                                # a view, channels last: nothing is turned
    image_at = np.flatnonzero(tokens == IMAGE) if pictures else np.full(visual, -1)
    assert len(image_at) == len(images) * visual, f"{len(image_at)} placeholders for {len(images)} images x {visual}"
    wanted = np.flatnonzero(targets != IGNORE)
    target_at = np.full(up(len(wanted)), -1)
    target_at[:len(wanted)] = wanted
    tensors = [torch.from_numpy(a.astype(np.int64, copy=False)) for a in (tokens, targets, image_at, target_at)]
    return Batch(images, *tensors, supervised=len(wanted), bad=list(bad))

def mix(x):
    """splitmix64's finaliser: 64 well-stirred bits from any 64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

def shuffled(i, n, key):
    """Where each i of 0..n-1 stands in the permutation named by its key: a Feistel network of six rounds on the next
    power of four, walked until it lands below n. Nothing is stored: any place of any epoch costs the same."""
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    low, i, todo = (np.uint64(1) << half) - np.uint64(1), i.astype(np.uint64), np.ones(len(i), bool)
    while todo.any():
        left, right = i[todo] >> half, i[todo] & low
        for turn in range(6): left, right = right, left ^ (mix(right + mix(key[todo] + np.uint64(turn))) & low)
        i[todo] = (left << half) | right
        todo &= i >= n
    return i.astype(np.int64)

class Data:
    """A mixture, ready to be trained on or evaluated. Every batch is a pure function of (seed, step): see rows."""
    def __init__(self, mixture, tokenizer, image_size, visual, context, batch=1, seed=0, train=True, image_mark=MARK,
                 bucket=BUCKET, window=WINDOW):
        self.sources = mixture if isinstance(mixture, list) else load_mixture(mixture, train)
        self.tokenizer, self.image_size, self.visual, self.context = tokenizer, image_size, visual, context
        self.batch, self.seed, self.train, self.image_mark = batch, seed, train, image_mark
        self.bucket, self.window = bucket, window
        self.seen, self.bad, self.bad_names = 0, 0, []                 # samples yielded, samples replaced, which
        weights = np.array([s.weight or len(s) for s in self.sources], float)
        self.shares = np.maximum(1, np.floor(weights / weights.sum() * ROUND)).astype(int)     # rows of a ROUND
        self.shares[self.shares.argmax()] += ROUND - self.shares.sum()
        self.lengths = [self.estimate(s) for s in range(len(self.sources))]
        self.drawn = None, None                                        # the window last drawn

    @property
    def counts(self): return {source.name: len(source) for source in self.sources}

    def estimate(self, s):
        """Tokens per sample, from bytes on disk by a line through 64 of them: enough to put like with like.
        Also the first look at a source: if none of the 64 can be read, it is said now."""
        source, seen, first = self.sources[s], [], None
        for number in np.unique(np.linspace(0, len(source) - 1, 64).astype(int)).tolist():
            try: seen.append((source.bytes[number], sum(t != IMAGE for t in self.text(source, number, 0)[0])))
            except BadInput as e: first = first or e
        if not seen: raise first
        slope, base = np.polyfit(*np.array(seen, float).T, 1) if len(dict(seen)) > 2 else (0, seen[0][1])
        images = 1 if source.marks is None else source.marks
        return (base + slope * source.bytes + images * self.visual).clip(1, self.context).astype(np.int32)

    def rows(self, step):
        """(batch, 2) of (source, number): the global batch of a step, short rows first, from (seed, step) alone.

        Rows are drawn by the mixture, `window` steps at a time. Those are sorted by length, as far as the padding feels
        it, and cut into batches, whose order is then shuffled. Each epoch of a source is a permutation of it."""
        which, slot = divmod(step, self.window)
        if self.drawn[0] != which: self.drawn = which, self.draw(which * self.window * self.batch)
        return self.drawn[1][slot]

    def draw(self, first):
        count, turn = self.window * self.batch, first // ROUND
        pool = np.repeat(np.arange(len(self.shares)), self.shares)
        rounds = range(turn, (first + count - 1) // ROUND + 1)
        source = np.concatenate([np.random.default_rng((self.seed, 1, r)).permutation(pool) for r in rounds])
        nth = np.empty_like(source)                                    # how many of its source came before, ever
        for s, share in enumerate(self.shares):
            at = np.flatnonzero(source == s)
            nth[at] = turn * share + np.arange(len(at))
        source, nth = (a[first - turn * ROUND:][:count] for a in (source, nth))
        number, length = np.empty(count, np.int64), np.empty(count, np.int64)
        for s, lengths in enumerate(self.lengths):
            mine = np.flatnonzero(source == s)
            epoch, place = np.divmod(nth[mine], len(lengths))
            key = mix(mix(np.array([self.seed + 1], np.uint64)) + np.uint64(s << 40) + epoch.astype(np.uint64))
            number[mine] = shuffled(place, len(lengths), key)
            length[mine] = lengths[number[mine]]
        rows = np.stack((source, number), 1)[np.argsort(length // (self.bucket // 2 or 1), kind="stable")]
        order = np.random.default_rng((self.seed, 2, first)).permutation(self.window)
        return rows.reshape(self.window, self.batch, 2)[order]

    def text(self, source, number, step):
        """tokens, targets and (peeked picture, region) of a sample; no picture is decoded yet."""
        record = source.read(number)
        rng = np.random.default_rng((self.seed, 3, step, self.sources.index(source), number))
        answer = record.answers[rng.integers(len(record.answers))] if self.train else common(record.answers)
        views, size, region = [], None, WHOLE
        for image, size in (peek(ref, record.where) for ref in record.refs):
            region = random_region(size, rng) if self.train and source.crop else WHOLE
            if TASKS[source.task].pad: region = padded_region(size)
            views.append((image, region))
        turns = pose(record, source.task, answer, self.image_mark, size, region)
        tokens, targets = encode_turns(self.tokenizer, turns, self.visual)
        cut = truncate(tokens, self.context)
        if cut < len(tokens) and not self.train or all(t == IGNORE for t in targets[:cut]):
            raise BadInput(f"{record.where}: {len(tokens)} tokens exceed the context of {self.context}; shorten it")
        return tokens[:cut], targets[:cut], views[:tokens[:cut].count(IMAGE) // self.visual]

    def sample(self, source, number, step):
        """(tokens, targets, [uint8 (S,S,3), ...]) of one sample as a step sees it."""
        tokens, targets, views = self.text(source, number, step)
        side = self.image_size
        return tokens, targets, [to_square(upright(image, side), side, region) for image, region in views]

    def readable(self, source, number, step, bad):
        """The sample, or the next readable one of its source: the choice depends on the number alone."""
        for n in range(min(TRIES, len(source))):
            try: return self.sample(source, (number + n) % len(source), step)
            except BadInput as e: bad.append(str(e))
        raise BadInput(f"source '{source.name}': {n + 1} samples in a row cannot be read; the first: {bad[-n - 1]}")

    def __getitem__(self, key):
        step, rank, world, micro, accum = key
        size, bad = self.batch // (world * accum), []
        rows = self.rows(step)[rank::world][micro * size:(micro + 1) * size].tolist()
        try: samples = [self.readable(self.sources[s], number, step, bad) for s, number in rows]
        except BadInput as e: return e                         # raised in a worker it would come with a traceback
        return collate(samples, self.tokenizer.pad, self.visual, self.image_size, self.bucket, bad)

    def batches(self, start=0, steps=None, rank=0, world=1, accum=1, workers=0, pin=False, prefetch=2):
        """Per step, from `start` on, the list of this rank's `accum` micro-batches; forever if steps is None."""
        if self.batch % (world * accum):
            raise BadInput(f"--batch {self.batch} does not split into {world} ranks x {accum} micro-batches; change it")
        steps = itertools.count(start) if steps is None else range(start, start + steps)
        keys = ((step, rank, world, micro, accum) for step in steps for micro in range(accum))
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, sampler=keys, num_workers=workers, pin_memory=pin,
            generator=torch.Generator(), **({"prefetch_factor": prefetch} if workers else {}))
        micro = []
        for batch in loader:
            if isinstance(batch, BadInput): raise batch
            self.seen += len(batch.tokens); self.bad += len(batch.bad); self.bad_names += batch.bad
            micro.append(batch)
            if len(micro) == accum: yield micro; micro = []

    def samples(self, name=None, rank=0, world=1, limit=None):
        """Records in order, for evaluation, of one source if named. What cannot be read is raised, never left out."""
        for source in self.sources:
            if name not in (None, source.name): continue
            for number in range(rank, min(len(source), limit or len(source)), world):
                record = source.read(number)
                pictures = [peek(ref, record.where) for ref in record.refs]
                size = pictures[0][1] if pictures else None
                turns = pose(record, source.task, common(record.answers), self.image_mark, size)
                yield dataclasses.replace(
                    record, source=source.name, task=source.task, number=number, prompt=turns[0][0], turns=turns,
                    images=[upright(image) for image, _ in pictures], size=size)

def common(answers): return Counter(answers).most_common(1)[0][0] if answers else ""
