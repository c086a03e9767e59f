"""Files on disk -> records: any sample of any format by its number, nothing held in memory.

    sources = load_mixture("recipes/stage2.toml")     # opened: JSON and tars are indexed once
    record = sources[0].read(123)                     # see Record; its images are named, not decoded

A mixture is a TOML file of [[source]] tables (see Source); every file is read where it lies, nothing is converted.
To add a format, write its reader and name it in FORMATS.
"""
import dataclasses
import functools
import glob
import hashlib
import io
import json
import os
import re
import time
import tomllib
import zlib
from array import array
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = "<ImageHere>"                   # where the visual tokens go; reserved, so it may not stand in anybody's text
CROPPED = ("caption", "vqa")           # tasks that may see a part of the picture in training: no box is involved


class BadInput(ValueError):
    """What a user brought is wrong. One sentence: the file, the record, the remedy. Scripts print it and exit 2.
    Names in a stranger's file may hold line ends or a terminal's commands: they are said with blanks instead."""
    def __init__(self, text): super().__init__("".join(c if c.isprintable() else " " for c in text))


# ---- bytes on disk ---------------------------------------------------------------------------------------------------
# In memory are integers only: records are read from their file by position, and the page cache serves every worker.


@contextmanager
def reading(path):
    try: yield
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check path and rights") from e


@functools.lru_cache(maxsize=128)      # open files: a thousand tars would exceed the usual limit
def opened(path): return open(path, "rb", buffering=0)


INDEXED = {}                           # path -> size and time that the file had when it was indexed


def state(stat): return stat.st_size, stat.st_mtime_ns


def read_at(path, offset, size):
    """Bytes of a file by position; pread has no file pointer, so forked workers do not disturb one another."""
    with reading(path):
        file = opened(path).fileno()
        now, data = state(os.fstat(file)), os.pread(file, size, offset)
    if INDEXED.get(path, now) != now: raise BadInput(f"{path}: has changed since it was indexed; start again")
    if len(data) < size: raise BadInput(f"{path}: ends before byte {offset + size}; if it has changed, start again")
    return data


def whole(path):
    with reading(path): return Path(path).read_bytes()


def indexed(path, kind, build):
    """build(path) -> int64 array, kept in the user's cache folder until the file's size or time changes."""
    with reading(path): now = state(os.stat(path))
    if INDEXED.setdefault(path, now) != now: opened.cache_clear(); INDEXED[path] = now
    key = f"2 {kind} {os.path.realpath(path)} {now[0]} {now[1]}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoinfmllm"
    cached = folder / (hashlib.sha1(key.encode(errors="replace")).hexdigest() + ".npy")
    try:
        raw = cached.read_bytes()
        if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "big"): raise ValueError
        return np.load(io.BytesIO(raw[:-4]), allow_pickle=False)
    except (OSError, ValueError, EOFError): index = build(path)
    part, raw = cached.with_suffix(f".{os.getpid()}.part"), io.BytesIO()
    try:                                                       # beside, then renamed: another process never sees half
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.part"):                      # of a process that was killed
            if time.time() - old.stat().st_mtime > 3600: old.unlink(missing_ok=True)
        np.save(raw, index)
        part.write_bytes(raw.getvalue() + zlib.crc32(raw.getvalue()).to_bytes(4, "big"))
        os.replace(part, cached)
    except OSError:
        with suppress(OSError): part.unlink(missing_ok=True)
        print(f"note: {folder} cannot be written, so {path} is indexed anew at each start")
    return index


JSON, SPACES = json.JSONDecoder().raw_decode, re.compile(rb"[ \t\r\n]*")
LONGEST = 2 ** 23                      # bytes of a record; a stranger's longer one could fill any memory with brackets


class Values:
    """The JSON values of a file by position. Python's parser wants text, so it sees the file through a window that
    moves on; a character per byte (latin-1), so that positions in it are the file's."""
    def __init__(self, raw): self.raw, self.start, self.text = raw, 0, ""
    def skip(self, at): return SPACES.match(self.raw, at).end()
    def is_at(self, at, mark): return self.raw[at:at + 1] == mark

    def at(self, at):
        """(value, end) of the value that begins here."""
        for size in (0, 2 ** 18, LONGEST):                     # 0: the window as it is
            if size: self.start, self.text = at, str(self.raw[at:at + size], "latin-1")
            elif not self.start <= at < self.start + len(self.text): continue
            last = self.start + len(self.text) == len(self.raw)
            try: value, end = JSON(self.text, at - self.start)
            except json.JSONDecodeError as e:
                if last: raise ValueError(f"{e.msg} at byte {self.start + e.pos}") from e
                continue
            if end < len(self.text) or last: return value, self.start + end            # else it may be half a number
        raise ValueError(f"nothing of less than {LONGEST} bytes at byte {at}")

    def elements(self, at):
        """(value, start, end) of each element of the list that begins here."""
        at, count = self.skip(at + 1), 0
        while not self.is_at(at, b"]"):
            value, end = self.at(at)
            yield value, at, end
            plausible(count := count + 1, end)
            at = self.skip(end)
            if self.is_at(at, b","): at = self.skip(at + 1)
            elif not self.is_at(at, b"]"): raise ValueError(f"',' or ']' expected at byte {at}")

    def find_array(self, key):
        """Position of the top-level array, or of the array under `key` of the top-level object."""
        at = self.skip(3 if self.raw.startswith(b"\xef\xbb\xbf") else 0)
        while key is not None:                                 # walk the object's keys, stop behind the one we want
            if self.raw[at:at + 1] not in (b"{", b","): raise ValueError(f"it is not an object with a list '{key}'")
            name, at = self.at(self.skip(at + 1))
            at = self.skip(at)
            if not self.is_at(at, b":"): raise ValueError(f"':' expected at byte {at}")
            at = self.skip(at + 1)
            if name == key: break
            if self.is_at(at, b"["):                           # element by element: it may be long
                end = max((end for _, _, end in self.elements(at)), default=at + 1)
                at = self.skip(self.skip(end) + 1)
            else: at = self.skip(self.at(at)[1])
        if not self.is_at(at, b"["): raise ValueError(f"'{key}' is not a list" if key else "it is not a list")
        return at


def plausible(records, size):
    """An index takes 32 bytes a record: no file of nothing but brackets may ask for many times its own size."""
    if records > 2 ** 20 and 8 * records > size: raise ValueError("it has more records than its bytes can hold")


def scan_json(raw, key, tags):
    """Rows (start, stop, tag, images) of the records of a JSON list; tags(record) gives an integer per row."""
    values, rows = Values(raw), array("q")
    for record, at, end in values.elements(values.find_array(key)):
        for tag in tags(record): rows.extend((at, end, tag, raw.count(b"<image>", at, end)))
        plausible(len(rows) // 4, end)
    return rows


def lines(raw):
    """(start, stop) of the lines that hold more than a carriage return."""
    at = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    while at < len(raw):
        stop = raw.find(b"\n", at + 2 ** 22) if len(raw) > at + 2 ** 22 else len(raw)
        if stop < 0: stop = len(raw)
        ends = np.append(np.flatnonzero(np.frombuffer(raw, np.uint8, stop - at, at) == 10) + at, stop)
        starts = np.concatenate(([at], ends[:-1] + 1))
        full = ends - starts > 1
        yield from zip(starts[full].tolist(), ends[full].tolist())
        at = stop + 1


def scan_lines(raw, tags):
    """The same of a JSON-lines file; lines are not parsed where tags is None, so a million take two seconds."""
    rows = array("q")
    for start, end in lines(raw):
        try: numbers = tags(json.loads(raw[start:end])) if tags and end - start <= LONGEST else (0,)
        except (ValueError, RecursionError): numbers = (0,)                             # said when it is read
        for tag in numbers: rows.extend((start, end, tag, raw.count(b"<image>", start, end)))
        plausible(len(rows) // 4, end)
    return rows


def json_index(path, key=None, by=""):
    """The rows of a JSON or JSONL file (see scan_json), tagged by an id; by="sentences": a row for each of them."""
    tags = sentences_of if by == "sentences" else tag_by(by) if by else None
    def build(path):
        raw = whole(path)
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"): raise BadInput(f"{path}: is UTF-16; save it as UTF-8")
        of_lines = key is None and raw[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
        try: rows = scan_lines(raw, tags) if of_lines else scan_json(raw, key, tags or (lambda record: (0,)))
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{path}: is not the JSON it should be ({e}); fetch it again or check `format`") from e
        return np.asarray(rows, np.int64).reshape(-1, 4)
    return indexed(path, f"json {key} {by}", build)


def json_at(path, start, stop, where):
    raw = read_at(path, start, within(stop - start, where))
    try: record = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: is not valid JSON in UTF-8 ({e}); mend or remove it") from e
    if not isinstance(record, dict): raise BadInput(f"{where}: is {type(record).__name__}, not an object; remove it")
    return record


def within(size, where):
    if size > LONGEST: raise BadInput(f"{where}: has {size} bytes, and {LONGEST} are the most; shorten or remove it")
    return size


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


def extended(raw):
    """The pairs of an extended tar header, "<length> <key>=<value>\\n" each."""
    pairs, at = {}, 0
    while (found := re.compile(rb"(\d{1,9}) ([^=]{1,99})=").match(raw, at)) and at + int(found[1]) > found.end():
        value, at = raw[found.end():at + int(found[1]) - 1], at + int(found[1])
        if found[2] == b"path" or found[2] == b"size" and value.isdigit() and len(value) < 20: pairs[found[2]] = value
    return pairs


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
        if kind in b"xg":
            pairs = extended(read_at(path, body, size)) if kind == b"x" else {}
            name, size = pairs.get(b"path", name), int(pairs.get(b"size") or b"-1")
            size = None if size < 0 else size
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
    if 0 < end < at + 512: raise BadInput(f"{path}: is cut, its end mark is missing; fetch it again")
    return np.array(list(samples.values()), np.int64).reshape(-1, 5)


# ---- formats: a reader each ------------------------------------------------------------------------------------------
# A reader takes a Source and returns (bytes of text per sample, images per sample or None, read(number) -> Record).


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
    if len(text) > LONGEST // 8: raise BadInput(f"{where}: holds a text of {len(text)} characters; shorten it")
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
        raw = read_at(tar, text, within(length, where))
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
        if self.weight is not None and not (0 < self.weight < 1e9):
            self.wrong(f"weight {self.weight} is not between 0 and 1e9; mend it")
        self.task = self.task or task
        can = self.task in CROPPED
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
        if len(name) > 4096: raise BadInput(f"{where}: image {name[:60]!r}... has too long a name for a file; mend it")
        with reading(f"{where}: image {name!r}"):
            path = os.path.normpath(os.path.join(self.folder, name))
            real = path if self.links else os.path.realpath(path)
        if not all(place.startswith(os.path.join(self.folder, "")) for place in (path, real)):
            raise BadInput(f"{where}: image {name!r} leads out of {self.folder}; for links set `links = true`")
        return path, 0, -1


def load_mixture(path, train=True):
    """A mixture TOML -> its sources, opened. Relative paths are relative to the TOML file."""
    raw = whole(path)
    try: tables = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as e:
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
