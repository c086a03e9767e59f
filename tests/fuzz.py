"""Mutated files, thousands of each kind, read as a user's program reads them.

Inputs follow from a seed. They are read in a process of its own, which may end in any way: the next one goes on behind
the input that it died of. What counts is its outcome: read, refused in one sentence, or a fault: a traceback, a crash,
5 seconds of work, a process of over 1 GB. Seconds are of the processor, so that a busy machine finds no fault.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import tiny
import torch
from PIL import Image

import support.start
import weights.checkpoint
import weights.files
import weights.llama
from data import Data
from formats.files import INDEXED, opened
from formats.mixture import load_mixture
from model import Config, InfMLLM, LlamaConfig, ViTConfig, init
from support.errors import BadInput
from text.tokenizer import Tokenizer

SECONDS, GB = 5, 2**30
LEAVES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    -(2**70),
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a.png",
    "../a.png",
    "/etc/passwd",
    "a" * 300,
    "\ud800",
    "\0",
    "<image>",
    "<ImageHere>",
    "human",
    "gpt",
    "\u202e\u4e2d",
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [1, 2, 3, 4],
    ["a.png"] * 9,
    {"sent": "x"},
]


# ---- mutators --------------------------------------------------------------------------------------------------------


def bytes_of(raw, rng, marks=()):
    """Flips, cuts, repeats, numbers and foreign bytes at random places; marks: pieces that mean something there."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not raw:
            break
        at, kind = rng.randrange(len(raw)), rng.randrange(9)
        if kind < 2:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            raw[at] = rng.choice((0, 255, 127, 128, 10, 34, 44, 45, 48, 57, 91, 93, 123, 125))
        elif kind == 3:
            del raw[at : at + rng.choice((1, 4, 64, len(raw)))]
        elif kind == 4:
            raw[at:at] = raw[at : at + rng.choice((1, 8, 512))] * rng.choice((1, 3, 50))
        elif kind == 5:
            raw[at : at + 4] = struct.pack(
                rng.choice("<>") + "I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 65536))
            )
        elif kind == 6:
            raw[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1, 2**63, 2**64 - 1, 2**40, len(raw)))
            )
        elif kind == 7:
            raw[at:at] = rng.choice(marks) if marks else rng.randbytes(rng.choice((1, 7)))
        else:
            raw[at : at + 16] = rng.randbytes(16)
    return bytes(raw)


def tree(value, rng, chance=0.15):
    """A JSON value of which some parts are replaced, dropped, doubled or exchanged."""
    if rng.random() < chance / 3:
        return rng.choice(LEAVES)
    if isinstance(value, dict):
        pairs = [(k, tree(v, rng, chance)) for k, v in value.items() if rng.random() > chance / 5]
        if rng.random() < chance and pairs:
            pairs.append((rng.choice(pairs)[0] + rng.choice(("", "x")), rng.choice(LEAVES)))
        if rng.random() < chance / 2 and len(pairs) > 1:
            pairs[:2] = (pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])
        return dict(pairs)
    if isinstance(value, list):
        items = [tree(v, rng, chance) for v in value if rng.random() > chance / 5]
        if rng.random() < chance and items:
            items.append(rng.choice(items))
        return items
    if rng.random() < chance and isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice((value * -1, value * 10**6, value + 0.5, str(value), value + 1))
    return rng.choice(LEAVES) if rng.random() < chance else value


JSON_MARKS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\u",
    b"\\ud800",
    b"null",
    b"1e999",
    b"-",
    b"NaN",
    b"\n",
    b"\xff",
    b"[" * 2000,
    b'{"a":' * 1500,
    b"9" * 5000,
    b"\xef\xbb\xbf",
    b'"<image>"',
    b"<ImageHere>",
    b'"../../x.png"',
]


def json_of(value, rng):
    """Text of a value, mutated as a tree, as bytes or both."""
    for _ in range(rng.randrange(3)):
        value = tree(value, rng)
    raw = json.dumps(value).encode() if not isinstance(value, bytes) else value
    if isinstance(value, list) and rng.random() < 0.3:
        raw = b"\n".join(json.dumps(v).encode() for v in value)
    return bytes_of(raw, rng, JSON_MARKS) if rng.random() < 0.5 else raw


# ---- the readers: each makes its sound files once, and then reads a mutated one at a time ---------------------------

TURNS = [{"from": ("human", "gpt")[n % 2], "value": "ho" if n else "<image>\nhi"} for n in range(4)]


class Mixtures:
    """The five JSON formats, tars and pictures, through everything that data.py does with them."""

    SOUND = {
        "vqa": [
            {"image": "a.png", "question": "what?", "answers": ["red", "blue"]} for n in range(3)
        ],
        "refcoco": [
            {
                "img_name": "a.png",
                "bbox": [1, 2, 9, 9],
                "segment_id": n,
                "sentences": [{"sent": "it", "sent_id": 1}, {"sent": "that"}],
            }
            for n in range(2)
        ],
        "conversations": [{"id": n, "image": "a.png", "conversations": TURNS} for n in range(2)],
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

    def __init__(self, kind, folder):
        self.kind, self.folder, self.tokenizer = kind, folder, Tokenizer(tiny.TOKENIZER)
        (folder / "im").mkdir()
        picture = Image.new("RGB", (20, 20), (9, 99, 200))
        picture.save(folder / "im/a.png")
        self.pictures = []
        for name, how in (
            *((kind, {}) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")),
            ("JPEG", {"progressive": True}),
            ("TIFF", {"compression": "tiff_deflate"}),
        ):
            for mode in ("RGB", "L", "P", "RGBA", "I;16", "1", "CMYK", "LA"):
                out, plain = io.BytesIO(), "L" if mode == "I;16" else mode
                try:
                    picture.convert(plain).convert(mode).save(out, name, **how)
                except (OSError, ValueError, KeyError):
                    continue
                self.pictures.append(out.getvalue())
        source = {
            "name": "s",
            "format": {"questions": "vqa", "image": "vqa", "tar": "caption-shards"}.get(kind, kind),
        }
        if kind == "tar":
            source |= {"shards": "t.tar"}
        else:
            source |= {"annotations": "f.json", "images": "im"}
        if kind == "questions":
            source |= {"questions": "f.json", "annotations": "g.json", "image_name": "a.png"}
            (folder / "g.json").write_text(
                json.dumps(
                    {
                        "annotations": [
                            {"question_id": n, "answers": [{"answer": "red"}]} for n in range(3)
                        ]
                    }
                )
            )
        if kind == "image":
            (folder / "f.json").write_text(json.dumps(self.SOUND["vqa"]))
        (folder / "m.toml").write_text(
            "[[source]]\n" + "".join(f'{k} = "{v}"\n' for k, v in source.items())
        )

    def tar(self, rng):
        with tarfile.open(
            fileobj=(out := io.BytesIO()), mode="w", format=rng.choice((0, 1, 2))
        ) as tar:
            for n in range(3):
                words = rng.choice((("txt", b"a cross"), ("json", b'{"caption": "a"}')))
                for end, content in (("png", self.pictures[0]), words):
                    name = (
                        rng.choice(("", "../", "/", "d/" * 80, "\u4e2d"))
                        if rng.random() < 0.2
                        else ""
                    )
                    member = tarfile.TarInfo(f"{name}{n}.{end}")
                    member.size, member.type = (
                        len(content),
                        rng.choice((b"0",) * 15 + (b"2", b"1", b"5")),
                    )
                    if member.type != b"0":
                        member.linkname, member.size = "/etc/passwd", 0
                    tar.addfile(member, io.BytesIO(content if member.size else b""))
        return out.getvalue()

    def mutated(self, rng):
        if self.kind == "image":
            return bytes_of(rng.choice(self.pictures), rng)
        if self.kind != "tar":
            return json_of(self.SOUND[self.kind], rng)
        raw = bytearray(bytes_of(self.tar(rng), rng) if rng.random() < 0.8 else self.tar(rng))
        if rng.random() < 0.7:  # checksums mended, so that the rest is read
            for at in range(0, len(raw) - 511, 512):
                if raw[at + 257 : at + 262] == b"ustar":
                    total = sum(raw[at : at + 148]) + 256 + sum(raw[at + 156 : at + 512])
                    raw[at + 148 : at + 156] = b"%06o\0 " % total
        return bytes(raw)

    def read(self, raw):
        name = {"tar": "t.tar", "image": "im/a.png"}.get(self.kind, "f.json")
        (self.folder / name).write_bytes(raw)
        opened.cache_clear()
        INDEXED.clear()
        train = zlib.crc32(raw) % 2 == 0
        data = Data(
            load_mixture(str(self.folder / "m.toml"), train),
            self.tokenizer,
            image_size=16,
            visual=4,
            context=128,
            batch=2,
            train=train,
            window=4,
        )
        list(data.batches(0, 1)) if train else list(data.samples())


class Toml:
    TEXT = """[[source]]
name = "v"
format = "vqa"
annotations = "f.json"
images = "im"
weight = 1.5
crop = false
links = true

[[source]]
name = "r"
format = "refcoco"
annotations = "r.json"
images = "im"
weight = 2
task = "region"

[[source]]
name = "t"
format = "caption-shards"
shards = ["*.tar", "x/[0-9].tar"]
weight = 3
"""
    MARKS = [
        b"[",
        b"]",
        b"[[",
        b'"',
        b"'",
        b'"""',
        b"=",
        b"\n",
        b"{",
        b"}",
        b".",
        b"#",
        b"inf",
        b"nan",
        b"1e400",
        b"9" * 5000,
        b"2026-01-01",
        b"[" * 3000,
        b"a." * 2000,
        b"\0",
        b"\\u0000",
        b"\xff",
        b"weight = true",
        b"\\U0010ffff",
        b'"/"',
        b'".."',
    ]

    def __init__(self, kind, folder):
        self.folder = folder
        made = Mixtures("image", folder)
        (folder / "r.json").write_text(json.dumps(Mixtures.SOUND["refcoco"]))
        (folder / "x").mkdir()
        for name in ("t.tar", "x/7.tar"):
            (folder / name).write_bytes(Mixtures.tar(made, random.Random(1)))

    def mutated(self, rng):
        lines = self.TEXT.split("\n")
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(lines))
            key = lines[at].split("=")[0]
            lines[at] = rng.choice(
                (lines[at], "", rng.choice(lines), f"{key}= {json.dumps(rng.choice(LEAVES))}")
            )
        return (
            bytes_of("\n".join(lines).encode(), rng, self.MARKS)
            if rng.random() < 0.7
            else "\n".join(lines).encode(errors="surrogatepass")
        )

    def read(self, raw):
        (self.folder / "m.toml").write_bytes(raw)
        INDEXED.clear()
        load_mixture(self.folder / "m.toml")


class Tokenizers:
    def __init__(self, kind, folder):
        self.path, self.sound = folder / "tokenizer.model", Path(tiny.TOKENIZER).read_bytes()

    def mutated(self, rng):
        return bytes_of(
            self.sound, rng, [b"\x0a\x00", b"\x12", b"\x08\xff\xff\xff\xff\x0f", b"\xff" * 9]
        )

    def read(self, raw):
        self.path.write_bytes(raw)
        tokenizer = Tokenizer(self.path)
        tokenizer.decode(tokenizer.encode("A chat \u4e2d of <box>(0.12,0.34)\n"))


PICKLE_MARKS = [
    b"cos\nsystem\n",
    b"R",
    b"\x93",
    b"c__builtin__\neval\n",
    b"(",
    b"t",
    b"}",
    b"Vecho\n",
    b".",
]


class Weights:
    """Safetensors, config.json and torch's own files, in our directory and in others'."""

    def __init__(self, kind, folder):
        import oracle

        self.kind, self.folder, self.path = kind, folder / "c", folder / "c"
        llm = LlamaConfig(Tokenizer(tiny.TOKENIZER).size, 8, 1, 2, 1, 8, context=32)
        small = Config(ViTConfig(8, 4, 8, 1, 2, 8), llm, grid=2)
        if kind == "checkpoint":
            weights.checkpoint.save(
                self.path, init(InfMLLM(small)), Tokenizer(tiny.TOKENIZER), {"preset": "toy"}
            )
        else:
            oracle.folder(oracle.llama(num_hidden_layers=1), self.path)
        if kind == "pickle":
            state = {
                k: v.clone()
                for k, v in weights.files.load_tensors(self.path / "model.safetensors").items()
            }
            torch.save(state, self.path / "pytorch_model.bin")
            torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
            (self.path / "model.safetensors").unlink()
            self.both = [
                (self.path / "pytorch_model.bin").read_bytes(),
                (folder / "old.bin").read_bytes(),
            ]
        self.sound, self.dirty = (
            {f.name: f.read_bytes() for f in sorted(self.path.iterdir())},
            set(),
        )

    def mutated(self, rng):
        """(file, content) of a directory of which one file is not what it was; checksums speak for it."""
        if self.kind == "pickle":
            raw = rng.choice(self.both)
            inside = raw[:2] == b"PK" and rng.random() < 0.5
            return "pytorch_model.bin", self.zipped(raw, rng) if inside else bytes_of(raw, rng)
        name = rng.choice(
            (
                "config.json",
                "model.safetensors",
                "model.safetensors",
                "config.json",
                "checksums.json",
            )
        )
        if name not in self.sound:
            name = "config.json"
        raw = self.sound[name]
        if name.endswith(".json"):
            return name, json_of(json.loads(raw), rng)
        size = struct.unpack("<Q", raw[:8])[0]
        header, body = raw[8 : 8 + size], raw[8 + size :]
        if rng.random() < 0.3:
            return name, bytes_of(raw, rng)
        if rng.random() < 0.8:
            header = json_of(json.loads(header), rng)
        else:
            header = bytes_of(header, rng, [b"I32", b"F8_E4M3", b"BOOL"])
        other = rng.choice((b"I32", b"F16", b"BF16", b"F64", b"BOOL"))
        if rng.random() < 0.3:
            header = header.replace(b"F32", other, 1)
        return name, struct.pack("<Q", len(header)) + header + body

    def zipped(self, raw, rng):
        """The same archive with its pickle mutated and all checksums right."""
        with (
            zipfile.ZipFile(io.BytesIO(raw)) as old,
            zipfile.ZipFile(out := io.BytesIO(), "w") as new,
        ):
            for name in old.namelist():
                content = old.read(name)
                if name.endswith("data.pkl"):
                    content = bytes_of(content, rng, PICKLE_MARKS)
                new.writestr(name, content)
        return out.getvalue()

    def read(self, change):
        name, content = change
        for n in self.dirty:
            (self.path / n).write_bytes(self.sound[n])
        (self.path / name).write_bytes(content)
        self.dirty = {name}
        if self.kind == "checkpoint":
            if name != "checksums.json":
                sums = json.loads(self.sound["checksums.json"]) | {
                    name: [len(content), zlib.crc32(content)]
                }
                (self.path / "checksums.json").write_text(json.dumps(sums))
                self.dirty.add("checksums.json")
            support.start.load_model(self.path, device="cpu")
        elif self.kind == "llama" or zlib.crc32(content) % 4 == 0:
            weights.llama.load_llama(self.path)
        else:  # a tensor instead of all, for speed
            file = weights.files.TensorFile(self.path / name)
            if file.like:
                file.read(next(iter(file.like))).clone()


READERS = (
    {kind: Mixtures for kind in (*Mixtures.SOUND, "tar", "image")}
    | {"toml": Toml, "tokenizer": Tokenizers}
    | {kind: Weights for kind in ("checkpoint", "llama", "pickle")}
)


# ---- the loop --------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    pass


def too_long(*_):
    raise TooLong


def peak():
    """Bytes that this process has held at most since it was asked last."""
    try:
        held = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return held


def loop(kind, folder, seed, start, stop, notes):
    """In a process of its own: a line per input that did something else than to be read or refused."""
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = "/dev/null"  # nothing is kept between inputs
    warnings.simplefilter("ignore")
    resource.setrlimit(
        resource.RLIMIT_DATA, (6 * GB, 6 * GB)
    )  # what a leak may take before it is one
    for number, action in ((signal.SIGPROF, too_long), (signal.SIGALRM, signal.SIG_DFL)):
        signal.signal(number, action)
    folder = folder / f"{kind}-{start}"
    folder.mkdir(parents=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(folder.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
    reader, counts = READERS[kind](kind, folder), {"read": 0, "refused": 0}
    peak()
    for n in range(start, stop):
        raw = reader.mutated(random.Random(f"{seed} {kind} {n}"))
        notes.seek(0)
        notes.write(f"{n:>9} {counts['read']:>9} {counts['refused']:>9}\n")
        notes.flush()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(300)  # a wait that takes no processor time
        fault = None
        try:
            reader.read(raw)
            counts["read"] += 1
        except BadInput as e:
            counts["refused"] += 1
            if "\n" in str(e) or len(str(e)) > 20_000:
                fault = f"its sentence is no sentence: {str(e)[:200]!r}"
        except TooLong:
            fault = f"took over {SECONDS} s"
        except BaseException as e:
            fault = f"{type(e).__name__}: {str(e)[:150]}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        if n % 16 == 0 or fault:
            if (held := peak()) > GB:
                fault = f"held {held / GB:.1f} GB; {fault or ''}"
        if fault:
            notes.seek(0, 2)
            notes.write(f"{kind} {n}: {fault}\n")
            notes.flush()
    notes.seek(0)
    notes.write(f"{stop:>9} {counts['read']:>9} {counts['refused']:>9}\n")
    notes.flush()


def fuzz(kind, folder, count, seed=0):
    """-> ({"read": n, "refused": n}, faults) of so many mutated inputs"""
    start, totals, faults = 0, {"read": 0, "refused": 0}, []
    folder = Path(folder)
    while start < count:
        path = folder / f"{kind}-{start}.notes"
        folder.mkdir(exist_ok=True)
        with open(path, "w+") as notes:
            if (pid := os.fork()) == 0:
                try:
                    loop(kind, folder, seed, start, count, notes)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    notes.flush()
                    os._exit(99)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        head, *lines = path.read_text().splitlines()
        done, read, refused = map(int, head.split())
        totals["read"] += read
        totals["refused"] += refused
        faults += lines
        if code:
            faults.append(f"{kind} {done}: its process ended with {code}")
        shutil.rmtree(folder / f"{kind}-{start}", ignore_errors=True)
        start = done + bool(code)
        if len(faults) > 50:
            break
    return totals, faults


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        for name in sys.argv[2:] or READERS:
            began = time.process_time()
            totals, faults = fuzz(name, place, int(sys.argv[1]))
            used = sum(os.times()[:4]) - began
            print(name, totals, len(faults), "faults", f"{used:.0f} s of CPU in all", flush=True)
            for line in faults[:12]:
                print("   ", line[:300], flush=True)
