"""Small data files in a test's own folder, what becomes of them, and how they are refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Data
from model import IGNORE, IMAGE
from support.errors import BadInput
from text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parent.parent / "assets/toy")
V = 4  # visual tokens per image
BLUE = (30, 60, 200)
RED = (200, 30, 30)
SEEN = "▁< image > * * * *"  # <image> is ordinary text in front of the placeholders
ASK = {"image": "a.png", "question": "what?", "answers": ["red"]}


def write(path, content):
    """Bytes and text as they are, anything else as JSON."""
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def picture(colour=BLUE, size=(20, 20)):
    """The bytes of a PNG of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def noise(size, seed=0):
    w, h = size
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tar_of(path, members, pax=(), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.pax_headers = dict(pax)
            tar.addfile(member, io.BytesIO(content))


def source(kind, **more):
    """A [[source]] table of a JSON file and a folder of pictures."""
    return {"name": kind, "format": kind, "annotations": "a.json", "images": "im", **more}


def mixture(folder, *tables):
    lines = []
    for table in tables:
        lines.append("[[source]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return write(folder / "mix.toml", "\n".join(lines))


def data_of(folder, *tables, **more):
    options = {"image_size": 16, "visual": V, "context": 256, "train": False, **more}
    return Data(mixture(folder, *tables), TOKENIZER, **options)


def pieces(ids):
    """Tokens as text: * for a place of an image, - where nothing is asked."""
    marks = {IMAGE: "*", IGNORE: "-"}
    return " ".join(marks.get(i) or TOKENIZER.model.id_to_piece(i) for i in ids)


def check(data, number, *turns, colours=(BLUE,)):
    """A sample is BOS and its turns, asked and said; targets are what is said, its EOS included."""
    tokens, targets, pictures = data.sample(data.sources[0], number, 0)
    assert pieces(tokens) == f"<s> {' '.join(turns)}".removesuffix(" </s>")
    expected = []
    for asked, said in zip(turns[0::2], turns[1::2]):
        expected += ["-"] * len(asked.split()) + [said]
    assert pieces(targets) == " ".join(expected)
    assert len(pictures) == len(colours)
    for pixels, colour in zip(pictures, colours):
        assert pixels.shape == (16, 16, 3) and (pixels == colour).all()


def refusal(folder, *tables):
    """The sentence that refuses a mixture: at its start, in training or in evaluation."""
    with pytest.raises(BadInput) as caught:
        data = data_of(folder, *tables, batch=2, train=True)
        list(data.batches(0, 2))
        list(data.samples())
    said = str(caught.value)
    assert "Traceback" not in said and str(folder) in said
    assert len(said) < 400 + 12 * len(str(folder))
    return said


def refused_record(folder, table, record, change):
    """The sentence that refuses a sound record with a change; None takes a key away."""
    write(folder / "im/a.png", picture())
    fields = {key: value for key, value in {**record, **change}.items() if value is not None}
    write(folder / "a.json", [fields])
    return refusal(folder, table)
