"""Files from strangers: whatever is in them is read or refused in a sentence, in bounded memory and time; none runs.

A few hundred mutated files of each kind here, 20,000 with `python -m pytest -m chaos`.
"""

import json
import os
import resource
import signal
import struct
import tarfile
import zlib

import pytest
import tiny
import torch
from fuzz import GB, READERS, SECONDS, Mixtures, fuzz, peak
from PIL import Image

import sample
import support.start
import weights.files
from data import Data
from formats.mixture import load_mixture
from support.errors import BadInput
from text.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", READERS)
def test_a_mutated_file_is_read_or_refused_in_a_sentence(tmp_path, kind):
    totals, faults = fuzz(kind, tmp_path, 100, seed=1)
    assert not faults, "\n".join(faults[:20])
    assert totals["read"] >= 3 and totals["refused"] >= 30, totals


def bounded(do):
    """do() in a process of its own: what it was refused with, having taken neither 5 s of work nor 1 GB."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        held = None
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # over SECONDS of work ends it
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            resource.setrlimit(resource.RLIMIT_DATA, (4 * GB, 4 * GB))
            peak()
            try:
                do()
                said = "read"
            except BadInput as e:
                said = str(e)
            held = peak()
            os.write(
                write,
                f"{'too much memory' if held > GB else ''}{said}"[:5000].encode(errors="replace"),
            )
        except BaseException as e:
            os.write(write, f"fault: {type(e).__name__} {e}"[:5000].encode(errors="replace"))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as f:
        said = f.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0 and said and not said.startswith(("fault", "too much")), (code, said)
    return said


def world(folder, kind, content, name="f.json"):
    reader = Mixtures(kind, folder)
    (folder / name).write_bytes(content)
    return reader


def everything(folder):
    data = Data(
        load_mixture(str(folder / "m.toml"), True),
        Tokenizer(tiny.TOKENIZER),
        image_size=16,
        visual=4,
        context=128,
        batch=2,
        window=4,
    )
    list(data.batches(0, 1))


MB = 10**6
BOMBS = {  # 100 MB each; as vqa where nothing else is said
    "brackets within brackets": lambda n: b"[" * n,
    "objects within objects": lambda n: b'{"a":' * (n // 5),
    "a list of empty lists": lambda n: b"[" + b"[]," * (n // 3) + b"[]]",
    "a list of empty objects": lambda n: b"[" + b"{}," * (n // 3) + b"{}]",
    "one record of empty lists": lambda n: b'[{"a":[' + b"[]," * (n // 3) + b"[]]}]",
    "a list of numbers": lambda n: b"[" + b"1," * (n // 2) + b"1]",
    "lines without anything": lambda n: b"{}" + b"\n" * n,
    "lines of empty objects": lambda n: b"{}\n" * (n // 3),
    "one line of brackets": lambda n: b'{"a":' + b"[" * n,
    "one line of lists": lambda n: b'{"question":"q","a":[' + b"[]," * (n // 3) + b"[]]}\n",
    "a text without an end": lambda n: b'[{"a":"' + b"x" * n,
}


@pytest.mark.chaos
@pytest.mark.parametrize("name", BOMBS)
def test_a_hundred_million_brackets_are_refused_in_bounded_memory_and_time(
    tmp_path, monkeypatch, name
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    world(tmp_path, "vqa", BOMBS[name](100 * MB))
    assert bounded(lambda: everything(tmp_path)) != "read"


@pytest.mark.parametrize("name", BOMBS)
def test_a_quarter_of_a_million_brackets_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    world(tmp_path, "vqa", BOMBS[name](MB // 4))
    with pytest.raises(BadInput):
        everything(tmp_path)


def test_a_list_that_is_not_asked_for_is_passed_by_in_bounded_memory(tmp_path):
    world(
        tmp_path,
        "coco-caption",
        b'{"info":[' + b"[]," * (4 * MB) + b'[]],"images":[],"annotations":[]}',
    )
    assert "has no records" in bounded(lambda: everything(tmp_path))


def test_a_tar_whose_headers_are_made_to_take_long_takes_no_longer(tmp_path):
    """A megabyte of digits in a header would keep tarfile.TarFile busy for minutes (CVE-2024-6232)."""
    world(tmp_path, "tar", b"", "t.tar")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**20
    (tmp_path / "t.tar").write_bytes((header.tobuf() + b"1" * 2**20) * 40 + bytes(10240))
    assert "has no records" in bounded(lambda: everything(tmp_path))
    header.type, header.size = tarfile.REGTYPE, -1024
    (tmp_path / "t.tar").write_bytes(bytes(header.tobuf(tarfile.GNU_FORMAT)) * 9 + bytes(10240))
    assert "is no tar, or cut, at byte 0" in bounded(lambda: everything(tmp_path))


def test_a_conversation_of_a_hundred_thousand_turns_is_cut_and_one_of_as_many_pictures_refused(
    tmp_path,
):
    turns = [{"from": ("human", "gpt")[n % 2], "value": "say something"} for n in range(100_000)]
    world(tmp_path, "conversations", json.dumps([{"id": 1, "conversations": turns}]).encode())
    assert bounded(lambda: everything(tmp_path)) == "read"
    turns[0]["value"] = "<image>" * 100_000
    record = {"id": 1, "conversations": turns[:2], "image": ["a.png"] * 100_000}
    (tmp_path / "f.json").write_text(json.dumps([record]))
    assert "context" in bounded(lambda: everything(tmp_path))


def png(width, height, mode, rows=b""):
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *mode, 0, 0, 0))
        + chunk(b"IDAT", rows or zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "width, height, mode",
    [
        (32_000, 32_000, (1, 0)),
        (10**9, 1, (8, 2)),
        (9_000, 9_000, (8, 6)),
        (9_000, 9_000, (16, 0)),
        (2**31 - 1, 2**31 - 1, (8, 2)),
    ],
)
def test_a_picture_of_a_billion_pixels_is_refused_by_its_header(tmp_path, width, height, mode):
    world(tmp_path, "image", png(width, height, mode), "im/a.png")
    assert "pixels" in bounded(lambda: everything(tmp_path))  # and not: is cut short


@pytest.mark.chaos
@pytest.mark.parametrize("mode, bytes_each", [((8, 2), 3), ((8, 0), 1)])
def test_the_largest_picture_that_is_let_in_stays_within_the_bounds(tmp_path, mode, bytes_each):
    side = 9_400  # 88 million pixels, all there
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(side * bytes_each + 1)) for _ in range(side)) + pack.flush()
    world(tmp_path, "image", png(side, side, mode, rows), "im/a.png")
    assert bounded(lambda: everything(tmp_path)) == "read"


def test_a_picture_that_a_program_would_have_to_draw_is_none(tmp_path, monkeypatch):
    drawn = []  # by Ghostscript, be it installed here or not
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript",
        lambda *a, **k: drawn.append(a) or Image.new("L", (9, 9)).im,
    )
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    world(tmp_path, "image", script, "im/a.png")
    with pytest.raises(BadInput, match="cannot be read as an image"):
        everything(tmp_path)
    with pytest.raises(BadInput):
        sample.open_image(tmp_path / "im/a.png")
    assert not drawn
    Image.open(tmp_path / "im/a.png").load()  # Pillow by itself has it drawn
    assert drawn


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_no_file_of_weights_and_no_index_runs_code(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    attacks = {"new.bin": {}, "old.pth": {"_use_new_zipfile_serialization": False}}
    for name, how in attacks.items():
        torch.save({"x": torch.ones(2), "y": Attack(marker)}, tmp_path / name, **how)
        with pytest.raises(BadInput, match="refused|cannot be read"):
            weights.files.load_tensors(tmp_path / name)
        with pytest.raises(BadInput):
            support.start.load_model(tmp_path / name, tiny.TOKENIZER, device="cpu")
    assert not marker.exists()
    Attack(marker).__reduce__()[0](Attack(marker).__reduce__()[1][0])  # it would have worked
    assert marker.exists()


def test_names_in_tars_and_json_reach_nothing_outside(tmp_path, monkeypatch):
    import io

    secret = tmp_path / "secret.png"
    Image.new("RGB", (20, 20), "red").save(secret)
    (tmp_path / "w").mkdir()
    reader = Mixtures("tar", tmp_path / "w")
    read, opened = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *a, **k: read.append(str(path)) or opened(path, *a, **k)
    )
    with tarfile.open(tmp_path / "w/t.tar", "w") as tar:
        for name, kind, link in (
            ("0.png", tarfile.SYMTYPE, str(secret)),
            ("1.png", tarfile.LNKTYPE, "../secret.png"),
            ("../2.png", tarfile.REGTYPE, ""),
            (str(secret), tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = len(reader.pictures[0]) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(reader.pictures[0]))
        for name in ("0.txt", "1.txt", "../2.txt", str(secret.with_suffix(".txt"))):
            member = tarfile.TarInfo(name)
            member.size = 7
            tar.addfile(member, io.BytesIO(b"a cross"))
    (source,) = load_mixture(str(tmp_path / "w/m.toml"), True)
    for number in range(len(source)):
        try:
            record = source.read(number)
        except BadInput as e:
            assert "lacks its image or its caption" in str(e)
            continue
        assert record.refs[0][0].endswith("t.tar"), "a picture of a tar lies in the tar"
    assert not any("secret" in name for name in read)
