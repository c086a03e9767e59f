"""Mutated files, thousands of each kind, read as a user's program reads them.

Inputs follow from a seed. They are read in a process of its own, which may end in any way: the next one goes on behind
the input that it died of. What counts is the outcome of each: read, refused in one sentence, or a fault: a traceback, a
crash, seconds of work (of the processor), a process of over 1 GB.
"""

import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import oracle
import published
import tiny
import torch
from faults import forked
from PIL import Image
from small import tar_of

import support.start
import weights.checkpoint
import weights.llama
from data import Data
from support.errors import BadInput
from text.tokenizer import Tokenizer

SECONDS = 10  # twice what is promised of a quiet core: programs beside it cost time, too
GB = 2**30
TORCH = GB // 2  # what a process holds that has imported torch

# ---- processes of their own ------------------------------------------------------------------------------------------


class TooLong(BaseException):
    pass


def too_long(*_):
    raise TooLong(f"over {SECONDS} s of work")


def held():
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcome(do):
    """do() -> "read", "refused: " and why, or "fault: " and what"""
    before = held()
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(300)  # ends the process where it waits, or never comes back from C
    try:
        do()
        said = "read"
    except BadInput as e:
        said = f"refused: {e}"
    except BaseException as e:
        said = f"fault: {type(e).__name__} {e!r:.200}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    if "\n" in said or len(said) > 20_000:
        said = f"fault: no sentence: {said[:200]!r}"
    if held() - before > GB - TORCH:
        said = f"fault: held {(held() - before) / GB:.1f} GB more; {said[:200]}"
    return said


def apart(work):
    """work(say) in a process of its own -> (lines that it said, its exit code)"""
    with tempfile.TemporaryFile("w+", errors="replace") as notes:

        def begin():
            sys.stdout = open(os.devnull, "w")
            warnings.simplefilter("ignore")
            os.environ["XDG_CACHE_HOME"] = "/dev/null"  # no index is kept between inputs
            most = 6 * GB  # of what a leak may take before it is one
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            work(lambda line: print(line, file=notes, flush=True))

        process = forked(begin)
        process.join()
        notes.seek(0)
        return notes.read().splitlines(), process.exitcode


def fuzz(kind, folder, count, seed=0):
    """-> the outcomes of so many mutated inputs, in their order"""
    outcomes = []

    def work(say):
        place = Path(tempfile.mkdtemp(dir=folder))
        reader = READERS[kind](kind, place)
        for n in range(len(outcomes), count):
            raw = reader.mutated(random.Random(f"{seed} {kind} {n}"))
            said = outcome(lambda: reader.read(raw))  # noqa: B023
            say(said)
            if said.startswith("fault: held"):
                return  # the next process begins with little memory

    while len(outcomes) < count:
        lines, code = apart(work)
        outcomes += lines
        if code:
            outcomes.append(f"fault: its process ended with {code}")
    return outcomes


# ---- mutators --------------------------------------------------------------------------------------------------------

NUMBERS = 0, 1, 127, 255, 65536, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1
LEAVES = [
    None,
    0,
    -1,
    2**31,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a.png",
    "../a.png",
    "/etc/passwd",
    "a" * 300,
    "\ud800",
    "<image>",
    "<ImageHere>",
    "human",
    "\u202e\u4e2d",
    [],
    {},
    {"": {}},
    ["a.png"] * 9,
    {"sent": "x"},
]


def bytes_of(raw, rng, marks=(b"\0", b"\xff")):
    """Pieces cut, repeated, flipped, made random or numbers; marks: what means something in such a file."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(raw) + 1)
        piece = raw[at : at + rng.choice((1, 1, 4, 8, 64, 512))]
        number = rng.choice(NUMBERS).to_bytes(8, rng.choice(("little", "big")))
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1]) + piece[1:]
        ways = (
            b"",
            piece * rng.choice((2, 50)),
            flipped,
            rng.randbytes(len(piece)),
            (number * 64)[: len(piece)],
            rng.choice(marks) + piece,
        )
        raw[at : at + len(piece)] = rng.choice(ways)
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw) + 1) :]
    return bytes(raw)


def tree(value, rng, chance=0.1):
    """A JSON value of which some parts are replaced, dropped, doubled or renamed."""
    if rng.random() < chance:
        return rng.choice(LEAVES)
    keep = lambda: rng.random() > chance / 3
    if isinstance(value, dict):
        end = rng.choice(("", "", "", "", "", "", "", "x"))
        return {k if keep() else k + end: tree(v, rng, chance) for k, v in value.items() if keep()}
    if isinstance(value, list):
        items = [tree(v, rng, chance) for v in value if keep()]
        return items if keep() else items * 2
    if isinstance(value, int) and not keep():
        return rng.choice((-value, value * 10**6, value + 0.5, str(value), value + 1))
    return value


JSON_MARKS = (
    rb'[ ] { } , : " \u \ud800 null 1e999 - NaN "<image>" <ImageHere> "../../x.png"'.split()
)
JSON_MARKS += [b"\n", b"\xff", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 1500, b"9" * 5000]


def json_of(value, rng):
    """Text of a value, mutated as a tree, as bytes or both."""
    if rng.random() < 0.7:
        value = tree(value, rng)
    raw = json.dumps(value).encode()
    if isinstance(value, list) and rng.random() < 0.3:
        raw = b"\n".join(json.dumps(v).encode() for v in value)
    return bytes_of(raw, rng, JSON_MARKS) if rng.random() < 0.5 else raw


# ---- the readers: each makes its sound files once, and then reads a mutated one at a time ---------------------------

TURNS = [{"from": ("human", "gpt")[n % 2], "value": "ho" if n else "<image>\nhi"} for n in range(4)]
JSONS = {
    "vqa": [{"image": "a.png", "question": "what?", "answers": ["red", "blue"]}] * 3,
    "refcoco": [
        {
            "img_name": "a.png",
            "bbox": [1, 2, 9, 9],
            "segment_id": 3,
            "sentences": [{"sent": "it", "sent_id": 1}, {"sent": "that"}],
        }
    ]
    * 2,
    "conversations": [{"id": 1, "image": "a.png", "conversations": TURNS}] * 2,
    "coco-caption": {
        "info": {},
        "images": [{"id": n, "file_name": "a.png"} for n in range(3)],
        "annotations": [{"image_id": n % 3, "caption": "a cross"} for n in range(5)],
    },
    "questions": {
        "data_subtype": "x",
        "questions": [{"question_id": n, "image_id": n, "question": "what?"} for n in range(3)],
    },
}
ANSWERS = {"annotations": [{"question_id": n, "answers": [{"answer": "red"}]} for n in range(3)]}
VQA = '[[source]]\nname = "s"\nformat = "vqa"\nannotations = "f.json"\nimages = "im"\n'
QUESTIONS = VQA.replace("f.json", "g.json") + 'questions = "f.json"\nimage_name = "a.png"\n'
TAR = '[[source]]\nname = "t"\nformat = "caption-shards"\nshards = "t.tar"\n'
TOML = f"{VQA}weight = 1.5\ncrop = false\nlinks = true\n{TAR}weight = 3\n"
TOML_MARKS = (
    rb"""[ ] [[ " ' = { } . # inf nan 1e400 2026-01-01 \u0000 \U0010ffff "/" ".." """.split()
)
TOML_MARKS += [b'"""', b"\n", b"\0", b"\xff", b"9" * 5000, b"[" * 3000, b"a." * 2000]


def toml_of(rng):
    """A mixture of which one line holds another value, or bytes are mutated, or both."""
    lines = TOML.splitlines()
    at = rng.randrange(len(lines))
    key = lines[at].split("=")[0]
    if rng.random() < 0.8:
        lines[at] = f"{key}= {json.dumps(rng.choice(LEAVES))}"
    raw = "\n".join(lines).encode()
    return bytes_of(raw, rng, TOML_MARKS) if rng.random() < 0.6 else raw


PICTURES = (
    "PNG/RGB PNG/P PNG/RGBA PNG/I;16 PNG/1 PNG/LA JPEG/RGB JPEG/L JPEG/CMYK GIF/P WEBP/RGB WEBP/RGBA "
    "TIFF/RGB TIFF/CMYK TIFF/I;16 BMP/RGB PPM/L"
).split()


def pictures():
    """Files of every format and of many modes, plain and packed."""
    picture = Image.new("RGB", (20, 20), (9, 99, 200))
    files = []
    for name in PICTURES:
        kind, mode = name.split("/")
        for how in ({}, {"progressive": True, "compression": "tiff_deflate"}):
            out = io.BytesIO()
            picture.convert("L" if mode == "I;16" else "RGB").convert(mode).save(out, kind, **how)
            files.append(out.getvalue())
    return files


TAR_MARKS = b"1", b"2", b"5", b"L", b"x", b"../", b"/", b"7777777", b"path=", b"ustar"


def shard(path, picture, rng):
    """A tar of captioned pictures, of any of the three formats, some under odd names."""
    members = []
    for n in range(3):
        key = rng.choice(("", "", "", "", "../", "/", "d/" * 80, "\u4e2d")) + str(n)
        words = rng.choice(((".txt", b"a cross"), (".json", b'{"caption": "a"}')))
        members += [(key + ".png", picture), (key + words[0], words[1])]
    tar_of(path, members, format=rng.choice((0, 1, 2)))
    return path.read_bytes()


def mended(raw):
    """A tar whose headers have right checksums, so that the rest of them is read."""
    raw = bytearray(raw)
    for at in range(0, len(raw) - 511, 512):
        if raw[at + 257 : at + 262] == b"ustar":
            total = sum(raw[at : at + 148]) + 256 + sum(raw[at + 156 : at + 512])
            raw[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(raw)


class Mixtures:
    """The TOML, the JSON formats, tars and pictures, through everything that data.py does with them."""

    def __init__(self, kind, folder):
        self.kind = kind
        self.folder = folder
        self.tokenizer = Tokenizer(tiny.TOKENIZER)
        self.pictures = pictures()
        (folder / "im").mkdir()
        (folder / "im/a.png").write_bytes(self.pictures[0])
        (folder / "f.json").write_text(json.dumps(JSONS["vqa"]))
        (folder / "g.json").write_text(json.dumps(ANSWERS))
        shard(folder / "t.tar", self.pictures[0], random.Random(1))
        mixtures = {"image": VQA, "tar": TAR, "toml": TOML, "questions": QUESTIONS}
        mixture = mixtures.get(kind, VQA.replace("vqa", kind))
        (folder / "m.toml").write_text(mixture)
        files = {"image": "im/a.png", "tar": "t.tar", "toml": "m.toml"}
        self.file = folder / files.get(kind, "f.json")

    def mutated(self, rng):
        if self.kind == "image":
            return bytes_of(rng.choice(self.pictures), rng)
        if self.kind == "toml":
            return toml_of(rng)
        if self.kind != "tar":
            return json_of(JSONS[self.kind], rng)
        raw = shard(self.file, self.pictures[0], rng)
        if rng.random() < 0.8:
            raw = bytes_of(raw, rng, TAR_MARKS)
        return mended(raw) if rng.random() < 0.7 else raw

    def read(self, raw):
        self.file.write_bytes(raw)
        self.everything(train=zlib.crc32(raw) % 2 == 0)

    def everything(self, train=True):
        data = Data(
            str(self.folder / "m.toml"),
            self.tokenizer,
            image_size=16,
            visual=4,
            context=128,
            batch=2,
            train=train,
            window=4,
        )
        list(data.batches(0, 1) if train else data.samples())


PAPER = """[[source]]
name = "gqa"
format = "gqa"
annotations = "gqa/train_balanced_questions.json"
images = "gqa/images"
[[source]]
name = "textvqa"
format = "textvqa"
annotations = "textvqa/TextVQA_0.5.1_train.json"
images = "textvqa/train_images"
[[source]]
name = "textcaps"
format = "textcaps"
annotations = "textcaps/TextCaps_0.1_train.json"
images = "textvqa/train_images"
[[source]]
name = "ocrvqa"
format = "ocrvqa"
split = "train"
annotations = "ocr_vqa/dataset.json"
images = "ocr_vqa/images"
[[source]]
name = "aokvqa"
format = "aokvqa"
annotations = "aokvqa/aokvqa_v1p0_train.json"
images = "coco/train2017"
[[source]]
name = "vg"
format = "visual-genome"
annotations = "vg/region_descriptions.json"
images = "vg"
[[source]]
name = "refs"
format = "refer"
split = "all"
annotations = "refcoco/refs(unc).p"
instances = "refcoco/instances.json"
images = "coco/train2014"
"""
HUB = '[[source]]\nname = "hub"\nformat = "parquet"\nfiles = "hub.parquet"\n'


class Published(Mixtures):
    """The paper's sets as they are published, and parquet: one file of all is not what it was."""

    MARKS = (
        b"cos\nsystem\n",
        b"R",
        b"c__builtin__\neval\n",
        b"(",
        b"t",
        b"}",
        b".",
        b"r\xff\xff\xff\x00",
    )

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.tokenizer = Tokenizer(tiny.TOKENIZER)
        published.write_sets(folder)
        if kind == "parquet":
            import pyarrow
            from pyarrow import parquet

            said = [{"user": "what?", "assistant": "red"}]
            shown = [{"bytes": pictures()[0], "path": "a.png"}]
            rows = {"images": [shown, None] * 4, "texts": [said, said * 2] * 4}
            parquet.write_table(pyarrow.table(rows), folder / "hub.parquet", row_group_size=3)
            names = [folder / "hub.parquet"]
        else:
            names = [folder / "refcoco/refs(unc).p"] if kind == "refs" else folder.rglob("*.json")
        (folder / "m.toml").write_text(HUB if kind == "parquet" else PAPER)
        named = (folder / "m.toml").read_text()
        keep = [path for path in names if path.relative_to(folder).as_posix() in named]
        self.sound = {path: path.read_bytes() for path in sorted(keep or names)}

    def mutated(self, rng):
        path = rng.choice(list(self.sound))
        raw = self.sound[path]
        if path.suffix == ".json":
            return path, json_of(json.loads(raw), rng)
        return path, bytes_of(raw, rng, self.MARKS)

    def read(self, change):
        for path, raw in (*self.sound.items(), change):
            path.write_bytes(raw)
        self.everything(train=zlib.crc32(change[1]) % 2 == 0)


class Words:
    """tokenizer.json of a byte-level BPE."""

    def __init__(self, kind, folder):
        self.file = folder / "tokenizer.json"
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        letters = [chr(n) for n in range(33, 127)] + ["ab", "abc"]
        words = {name: n + 3 for n, name in enumerate(letters)}
        words |= {"<unk>": 0, "<s>": 1, "</s>": 2}
        special = [{"id": 2, "content": "</s>", "special": True}]
        cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        split = {
            "type": "Split",
            "pattern": {"Regex": r"\p{N}| ?[^\s\p{L}\p{N}]+"},
            "behavior": "Isolated",
        }
        self.sound = {
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, cut]},
            "post_processor": None,
            "model": {"type": "BPE", "vocab": words, "merges": ["a b", "ab c"]},
        }

    def mutated(self, rng):
        return json_of(self.sound, rng)

    def read(self, raw):
        self.file.write_bytes(raw)
        tokenizer = Tokenizer(self.file)
        tokenizer.decode(tokenizer.encode("A chat \u4e2d of abc <box>(0.12,0.34)\n"))


class Tokenizers:
    MARKS = b"\x0a\x00", b"\x12", b"\x08\xff\xff\xff\xff\x0f", b"\xff" * 9

    def __init__(self, kind, folder):
        self.file = folder / "tokenizer.model"
        self.sound = Path(tiny.TOKENIZER).read_bytes()

    def mutated(self, rng):
        return bytes_of(self.sound, rng, self.MARKS)

    def read(self, raw):
        self.file.write_bytes(raw)
        tokenizer = Tokenizer(self.file)
        tokenizer.decode(tokenizer.encode("A chat \u4e2d of <box>(0.12,0.34)\n"))


class Weights:
    """Safetensors, config.json and torch's own files, in our directory and in others'."""

    HEADER_MARKS = b"I32", b"F8_E4M3", b"BOOL", b"F16", b"BF16", b"F64"
    PICKLE_MARKS = b"cos\nsystem\n", b"R", b"\x93", b"c__builtin__\neval\n", b"(", b"t", b"}", b"."

    def __init__(self, kind, folder):
        self.kind = kind
        self.folder = folder / "c"
        if kind == "checkpoint":
            weights.checkpoint.save(self.folder, tiny.model(), Tokenizer(tiny.TOKENIZER))
        else:
            model = oracle.llama(num_hidden_layers=1)
            oracle.folder(model, self.folder)
        if kind == "pickle":
            (self.folder / "model.safetensors").unlink()
            self.pickles = []
            for new in (True, False):
                out = io.BytesIO()
                torch.save(model.state_dict(), out, _use_new_zipfile_serialization=new)
                self.pickles.append(out.getvalue())
        self.sound = {f.name: f.read_bytes() for f in self.folder.iterdir()}

    def mutated(self, rng):
        """(name, content) of a file that is not what it was"""
        if self.kind == "pickle":
            raw = bytes_of(rng.choice(self.pickles), rng, self.PICKLE_MARKS)
            return "pytorch_model.bin", raw
        names = self.sound.keys() & {"config.json", "model.safetensors", "checksums.json"}
        name = rng.choice(sorted(names))
        raw = self.sound[name]
        if name.endswith(".json"):
            return name, json_of(json.loads(raw), rng)
        if rng.random() < 0.3:
            return name, bytes_of(raw, rng)
        size = int.from_bytes(raw[:8], "little")
        header = json_of(json.loads(raw[8 : 8 + size]), rng)
        if rng.random() < 0.5:
            header = bytes_of(raw[8 : 8 + size], rng, self.HEADER_MARKS)
        if rng.random() < 0.3:
            header = header.replace(b"F32", rng.choice(self.HEADER_MARKS), 1)
        return name, len(header).to_bytes(8, "little") + header + raw[8 + size :]

    def read(self, change):
        name, content = change
        files = self.sound | {name: content}
        if self.kind == "checkpoint" and name != "checksums.json":  # a stranger's are right
            sums = json.loads(files["checksums.json"]) | {name: [len(content), zlib.crc32(content)]}
            files["checksums.json"] = json.dumps(sums).encode()
        for file, raw in files.items():
            (self.folder / file).write_bytes(raw)
        if self.kind == "checkpoint":
            support.start.load_model(self.folder, device="cpu")
        else:
            weights.llama.load_llama(self.folder)


READERS = (
    dict.fromkeys((*JSONS, "tar", "image", "toml"), Mixtures)
    | dict.fromkeys(("paper", "refs", "parquet"), Published)
    | {"tokenizer": Tokenizers, "words": Words}
    | dict.fromkeys(("checkpoint", "llama", "pickle"), Weights)
)
