"""The toy world: scenes of a few coloured shapes, all about them known, on disk in the formats of the real thing.

    python toy.py                                              # out/toy: 10,000 scenes, and 500 + 500 held out
    python toy.py --out out/small --scenes 500 --seed 1
    python toy.py backbones                                    # assets/toy: the stand-ins anew; resumes by itself

A scene is a pure function of (seed, split, number). The splits never meet: `train`; `heldout`, more of it;
`compositional`, whose scenes show one of four (colour, shape) pairs that those neither show nor name; and `read`, which
is never drawn: what the LLaMA stand-in reads, all pairs in it, as Vicuna has read of things that no stage will show it.
"""
import argparse
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
from data import IGNORE, IMAGE, BadInput, Tokenizer, format_box, parse_box
from metrics import iou
from model import PIXEL_MEAN, PIXEL_STD, PRESETS, InfMLLM, Llama, ViT, init

SIDE = 64                              # pixels per side of a picture
FINE = 4                               # drawn so many times finer, then averaged down: soft edges
COLOURS = {"red": (222, 40, 44), "green": (36, 160, 56), "blue": (44, 84, 224), "yellow": (240, 214, 40),
           "purple": (150, 44, 190), "cyan": (40, 200, 214)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (7.5, 9.5), "large": (12.0, 15.0)}                   # radius in pixels
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
UNSEEN = [("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square")]
SPLITS = ("train", "heldout", "compositional")          # those on disk
EVERY_PAIR = ("compositional", "read")                   # splits in which the unseen pairs occur
MARGIN = 8                             # pixels by which centres must differ before a relation is asked about
SHARD = 1000                           # scenes per tar, and per unit of work


# ---- scenes ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    cx: float
    cy: float
    r: float

    @property
    def name(self): return f"{self.colour} {self.shape}"

    @property
    def outline(self):
        """Corners of the shape around (0, 0), radius 1; a circle has none."""
        a = .36                                                        # half the width of a cross's arm
        return {"square": [(-.88, -.88), (.88, -.88), (.88, .88), (-.88, .88)],
                "triangle": [(0, -1), (1, .8), (-1, .8)],
                "cross": [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a),
                          (-1, -a), (-a, -a)]}.get(self.shape)

    @property
    def box(self):
        """x1, y1, x2, y2 in pixels: what the shape touches."""
        xs, ys = zip(*(self.outline or [(-1, -1), (1, 1)]))
        return tuple(round(c + self.r * v, 2) for c, v in ((self.cx, min(xs)), (self.cy, min(ys)), (self.cx, max(xs)),
                                                           (self.cy, max(ys))))

    @property
    def box_text(self): return format_box([v / SIDE for v in self.box])


@dataclass(frozen=True)
class Scene:
    split: str
    number: int
    ground: tuple                      # RGB
    things: tuple


def rng_of(*key): return random.Random(" ".join(map(str, key)))


def scene(seed, split, number):
    """The scene of that number: one to four things, none touching another, no (colour, shape) twice."""
    rng = rng_of("scene", seed, split, number)
    count = rng.randint(1, 4)
    unseen = [rng.choice(UNSEEN)] if split == "compositional" else []
    others = [p for p in PAIRS if p not in unseen and (split in EVERY_PAIR or p not in UNSEEN)]
    pairs = unseen + rng.sample(others, count - len(unseen))
    rng.shuffle(pairs)
    shade = rng.choice((rng.uniform(8, 70), rng.uniform(150, 245)))
    ground = tuple(int(min(255, max(0, shade + rng.uniform(-8, 8)))) for _ in range(3))
    while True:                                                        # crowded draws are thrown away whole
        things = []
        for colour, shape in pairs:
            size = rng.choice(list(SIZES))
            r = rng.uniform(*SIZES[size])
            for _ in range(20):
                x, y = rng.uniform(r + 1, SIDE - r - 1), rng.uniform(r + 1, SIDE - r - 1)
                if all(max(abs(x - t.cx), abs(y - t.cy)) > r + t.r + 1 for t in things):
                    things.append(Thing(colour, shape, size, round(x, 2), round(y, 2), round(r, 2))); break
        if len(things) == count: return Scene(split, number, ground, tuple(things))


def draw(scene):
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), scene.ground)
    pen = ImageDraw.Draw(image)
    for t in scene.things:
        if t.outline: pen.polygon([(t.cx * FINE + t.r * FINE * x, t.cy * FINE + t.r * FINE * y) for x, y in t.outline],
                                  COLOURS[t.colour])
        else: pen.ellipse([v * FINE for v in t.box], COLOURS[t.colour])
    return image.reduce(FINE)


# ---- what is said about a scene --------------------------------------------------------------------------------------

def full_name(thing): return f"{thing.size} {thing.name}"


def caption(scene):
    """Everything there is, from left to right."""
    names = [f"a {full_name(t)}" for t in sorted(scene.things, key=lambda t: t.cx)]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def plural(shape): return shape + ("es" if shape == "cross" else "s")


def yes(truth): return "yes" if truth else "no"


def existence(scene, rng):
    """Is there ...? Half the answers are yes. What no stage may show, no stage may name either."""
    truth, pairs = [rng.random() < .5 for _ in range(3)], {(t.colour, t.shape) for t in scene.things}
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    absent = [c for c in COLOURS if c not in colours]
    missing = [s for s in SHAPES if s not in shapes] or list(shapes)
    known = [p for p in PAIRS if p not in pairs and (scene.split in EVERY_PAIR or p not in UNSEEN)]
    half = [p for p in known if p[0] in colours or p[1] in shapes]    # the colour or the shape is there: no cheap no
    pair = rng.choice(sorted(pairs) if truth[0] else half or known)
    colour = rng.choice(sorted(colours) if truth[1] else absent)
    shape = rng.choice(sorted(shapes) if truth[2] else missing)
    return [("exists", f"Is there a {pair[0]} {pair[1]}?", yes(pair in pairs)),
            ("exists-colour", f"Is there a {colour} object?", yes(colour in colours)),
            ("exists-shape", f"Is there a {shape}?", yes(shape in shapes))]


def relations(scene, rng):
    """left, right, above, below between two things, and which half a thing is in; never a close call."""
    out, pairs = [], [(a, b) for a in scene.things for b in scene.things if a is not b]
    for kind, axis, sign in (("left of", 0, 1), ("right of", 0, -1), ("above", 1, 1), ("below", 1, -1)):
        gaps = [(a, b, sign * ((b.cx - a.cx) if axis == 0 else (b.cy - a.cy))) for a, b in pairs]
        clear = [(a, b, gap) for a, b, gap in gaps if abs(gap) >= MARGIN]
        if clear:
            a, b, gap = rng.choice(clear)
            out.append((kind.split()[0], f"Is the {a.name} {kind} the {b.name}?", yes(gap > 0)))
    halves = [(t, side, at < SIDE / 2, low) for t in scene.things for side, at, low in
              (("left", t.cx, True), ("right", t.cx, False), ("upper", t.cy, True), ("lower", t.cy, False))
              if abs(at - SIDE / 2) >= MARGIN / 2]
    if halves:
        t, side, is_low, low = rng.choice(halves)
        out.append(("half", f"Is the {t.name} in the {side} half?", yes(is_low == low)))
    return out


def questions(scene, rng):
    """One question of every type that the scene allows: (type, question, answer)."""
    things, out = scene.things, []
    by_shape = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
    by_colour = [t for t in things if sum(o.colour == t.colour for o in things) == 1]
    if by_shape:
        t = rng.choice(by_shape)
        out.append(("colour", f"What colour is the {t.shape}?", t.colour))
    if by_colour:
        t = rng.choice(by_colour)
        out.append(("shape", f"What shape is the {t.colour} object?", t.shape))
    t = rng.choice(things)
    out.append(("size", f"What size is the {t.name}?", t.size))
    colour, shape = rng.choice((t.colour, rng.choice(list(COLOURS)))), rng.choice((t.shape, rng.choice(SHAPES)))
    what, number = rng.choice((("objects", len(things)),
                               (f"{colour} objects", sum(t.colour == colour for t in things)),
                               (plural(shape), sum(t.shape == shape for t in things))))
    out.append(("count", f"How many {what} are there?", str(number)))
    return out + existence(scene, rng) + relations(scene, rng)


def phrases(scene):
    """(phrase, thing) for every phrase that singles out one thing."""
    out = []
    for t in scene.things:
        out += [(f"the {full_name(t)}", t), (f"the {t.name}", t)]
        for phrase, same in ((f"the {t.shape}", lambda o, t=t: o.shape == t.shape),
                             (f"the {t.colour} object", lambda o, t=t: o.colour == t.colour),
                             (f"the {t.size} object", lambda o, t=t: o.size == t.size),
                             (f"the {t.size} {t.shape}", lambda o, t=t: (o.size, o.shape) == (t.size, t.shape))):
            if sum(map(same, scene.things)) == 1: out.append((phrase, t))
    return out


def say(kind, answer):
    """A short answer as one says it in a conversation."""
    if kind == "count": return "There is 1." if answer == "1" else f"There are {answer}."
    if kind in ("colour", "size"): return f"It is {answer}."
    return f"It is a {answer}." if kind == "shape" else answer.capitalize() + "."


def conversation(scene, rng):
    """Three to five turns of mixed kind: (kind, question, answer)."""
    phrase, there = rng.choice(phrases(scene))
    here = rng.choice(scene.things)
    turns = [("caption", "Describe the image.", caption(scene).capitalize() + "."),
             ("ground", f"Where is {phrase}?", there.box_text),
             ("region", f"What is at {here.box_text}?", f"A {full_name(here)}.")]
    turns = rng.sample(turns, rng.randint(1, 3))
    asked = [(kind, q, say(kind, a)) for kind, q, a in questions(scene, rng)]
    turns += rng.sample(asked, min(len(asked), rng.randint(2, 5 - min(3, len(turns)))))
    return rng.sample(turns, len(turns))


# ---- the world on disk -----------------------------------------------------------------------------------------------

def records(scene, seed):
    """What is written about a scene, by file."""
    rng, n, name = rng_of("text", seed, scene.split, scene.number), scene.number, f"{scene.number:06d}.png"
    asked = questions(scene, rng)
    asked = rng.sample(asked, min(5, len(asked)))
    ids = [n * 10 + i for i in range(len(asked))]
    by_thing = [(t, [p for p, of in phrases(scene) if of is t]) for t in scene.things]
    talk = conversation(scene, rng)
    turns = [{"from": who, "value": text} for _, q, a in talk for who, text in (("human", q), ("gpt", a))]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {
        "images": [{"id": n, "file_name": name, "width": SIDE, "height": SIDE}],
        "captions": [{"id": n, "image_id": n, "caption": caption(scene)}],
        "questions": [{"image_id": n, "question": q, "question_id": i, "type": k} for i, (k, q, _) in zip(ids, asked)],
        "answers": [{"image_id": n, "question_id": i, "question_type": k, "multiple_choice_answer": a,
                     "answers": [{"answer": a, "answer_id": j} for j in range(1, 11)]}
                    for i, (k, _, a) in zip(ids, asked)],
        "refs": [{"img_name": name, "bbox": t.box, "segment_id": n * 10 + i,
                  "sentences": [{"sent": p, "sent_id": n * 100 + i * 10 + j}
                                for j, p in enumerate(rng.sample(names, min(2, len(names))))]}
                 for i, (t, names) in enumerate(by_thing)],
        "regions": [{"img_name": name, "bbox": t.box, "segment_id": n * 10 + i,
                     "sentences": [{"sent": f"a {full_name(t)}", "sent_id": n * 10 + i}]}
                    for i, t in enumerate(scene.things)],
        "chat": [{"id": f"{n:06d}", "image": name, "types": [kind for kind, _, _ in talk], "conversations": turns}],
    }


def write_shard(job):
    """Pictures and a tar of scenes first..last-1; returns their records."""
    folder, seed, split, first, last = job
    out = {}
    with open(folder / "shards" / f"{first // SHARD:05d}.tar", "wb") as tar:
        for number in range(first, last):
            one, png = scene(seed, split, number), io.BytesIO()
            draw(one).save(png, "PNG")
            (folder / "images" / f"{number:06d}.png").write_bytes(png.getvalue())
            for ending, content in (("png", png.getvalue()), ("txt", caption(one).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            for name, rows in records(one, seed).items(): out.setdefault(name, []).extend(rows)
        tar.write(bytes(1024))                                         # the end mark
    return out


MIXTURES = {   # file -> split, and source -> weight; None: every task of the split, to be evaluated
    "stage1": ("train", {"shards": 1.0}),
    "stage2": ("train", {"captions": 0.5, "vqa": 2.0, "refs": 5.0, "regions": 0.5}),
    "stage3": ("train", {"chat": 3.0, "captions": 0.5, "vqa": 1.5, "refs": 1.5}),
    "heldout": ("heldout", None),
    "compositional": ("compositional", None),
}
SOURCES = {    # things at the edge must not be lost, so nothing is cropped
    "shards": 'format = "caption-shards"\nshards = "{0}/shards/*.tar"\ncrop = false',
    "captions": 'format = "coco-caption"\nannotations = "{0}/captions.json"\nimages = "{0}/images"\ncrop = false',
    "vqa": 'format = "vqa"\nquestions = "{0}/questions.json"\nannotations = "{0}/answers.json"\n'
           'images = "{0}/images"\nimage_name = "{{:06d}}.png"\ncrop = false',
    "refs": 'format = "refcoco"\nannotations = "{0}/refs.json"\nimages = "{0}/images"',
    "regions": 'format = "refcoco"\ntask = "region"\nannotations = "{0}/regions.json"\nimages = "{0}/images"',
    "chat": 'format = "conversations"\nannotations = "{0}/chat.json"\nimages = "{0}/images"',
}


def helper():
    """A pool's process: Ctrl-C is its parent's to hear, and SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_split(folder, parts):
    whole = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    head = {"info": {"description": "toy world"}, "data_type": "toy", "data_subtype": folder.name}
    for name, content in {
        "captions": {**head, "images": whole["images"], "annotations": whole["captions"]},
        "questions": {**head, "questions": whole["questions"]}, "answers": {**head, "annotations": whole["answers"]},
        "refs": whole["refs"], "regions": whole["regions"], "chat": whole["chat"],
    }.items(): (folder / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")))


def write(out, seed=0, scenes=10_000, workers=2):
    """The world at `out`, whole or not at all: written beside, renamed at the end; toy.json says it is complete."""
    out, made = Path(out), {"seed": seed, "scenes": scenes, "version": 2}
    if (out / "toy.json").is_file() and json.loads((out / "toy.json").read_text()) == made: return False
    if out.exists() and not (out / "toy.json").is_file() and any(out.iterdir()):
        raise BadInput(f"{out}: holds something that is not a toy world; name another --out")
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    sizes = {"train": scenes, "heldout": min(500, scenes), "compositional": min(500, scenes)}
    for split in SPLITS:
        for folder in ("images", "shards"): (part / split / folder).mkdir(parents=True)
    jobs = [(part / split, seed, split, first, min(first + SHARD, sizes[split]))
            for split in SPLITS for first in range(0, sizes[split], SHARD)]
    with multiprocessing.get_context("fork").Pool(workers, helper) as pool:
        parts = pool.map(write_shard, jobs, chunksize=1)
    for split in SPLITS: write_split(part / split, [p for p, job in zip(parts, jobs) if job[2] == split])
    for name, (split, weights) in MIXTURES.items():
        chosen = weights or dict.fromkeys([s for s in SOURCES if s != "shards"])
        tables = [f'[[source]]\nname = "{s}"\n' + (f"weight = {w}\n" if w else "") + SOURCES[s].format(split) + "\n"
                  for s, w in chosen.items()]
        (part / f"{name}.toml").write_text("\n".join(tables))
    (part / "toy.json").write_text(json.dumps(made))
    if out.exists(): shutil.rmtree(out)
    os.replace(part, out)
    return True


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

def texts(seed=0, scenes=2000):
    """All that the tokenizer is trained on: every kind of prompt and answer, numbers left out."""
    for number in range(scenes):
        one, rng = scene(seed, "train", number), rng_of("tokenizer", seed, number)
        yield from (data.prompt("caption"), caption(one))
        for _, q, a in questions(one, rng): yield from (data.prompt("vqa", q), a)
        for phrase, t in phrases(one):
            yield from (data.prompt("ground", phrase), data.prompt("region", t.box_text), f"a {full_name(t)}")
        for _, q, a in conversation(one, rng): yield from (data.prompt("chat", q), data.chat_turn(q), a)


def train_tokenizer(path):
    """A small sentencepiece model with LLaMA's conventions (unk 0, BOS 1, EOS 2, byte fallback, prefix space, nothing
    normalised), in which a number of a box is one piece: from 0.00 to 1.00 in steps of 0.01."""
    numbers = [f"{n / 100:.2f}" for n in range(101)]
    marks = ["<box>(", "),(", ")</box>"]
    sides = (side for text in texts() for side in text.split(data.HERE))
    lines = (line for side in sides for line in side.split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=640, hard_vocab_limit=False,
        byte_fallback=True, character_coverage=1.0, user_defined_symbols=numbers + marks, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=10_000,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())


# ---- stand-ins for pretrained backbones ------------------------------------------------------------------------------
# Stage 1 presupposes a ViT that sees and an LLM that reads. The toy's are taught here, apart from one another: the ViT
# names what lies in each patch of a drawing; the LLaMA reads scenes that are spelt out in its own word embeddings, as
# Vicuna has read the internet, and never gets a picture. No scene is common to the two.
# B scenes, C = P*P cells, T tokens, L = s*s patches, M supervised positions, W numbers that encode one edge.

CELLS = 4                              # P of the toy preset: an object belongs to the cell in which its centre lies
WAVES = 6                              # of a number: the edges of boxes are smooth for both stand-ins
KINDS = (list(COLOURS), SHAPES, list(SIZES))
TURNS = {0: (4, 4), 1200: (8, 3), 2400: (6, 4)}    # from this step on: so many hard and easy turns about a scene
AIDS = ("reverse", "boxes", "order")   # lessons that no stage asks for, but that the others are learnt from
NOISE = 0.15                           # on the symbolic prefix: what an adapter delivers will not be exact


@dataclass
class Schooling:
    steps: int
    batch: int                         # scenes per step
    lr: float
    decay: float                       # share of the steps in which the learning rate falls to zero


SCHOOL = {"vit": Schooling(3000, 32, 2e-3, .4), "llm": Schooling(5000, 16, 2e-3, .3)}


def waves(values):
    """(...) numbers from 0 to 1 -> (..., W): near numbers look alike, far ones do not."""
    k = math.pi * torch.arange(1, WAVES + 1)
    v = values[..., None]
    return torch.cat((2 * v - 1, torch.sin(k * v) / k.sqrt(), torch.cos(k * v) / k.sqrt()), dim=-1)


def cell_of(thing): return int(thing.cy * CELLS // SIDE) * CELLS + int(thing.cx * CELLS // SIDE)


class Seer(nn.Module):
    """The ViT with two linear heads that are thrown away: what covers a patch, what is centred in a cell of patches."""
    split = "train"

    def __init__(self, config, seed):
        super().__init__()
        self.vit = init(ViT(config), seed)
        self.sizes = [1 + len(kind) for kind in KINDS] + [4 * (2 * WAVES + 1)]       # class 0: nothing is there
        self.heads = nn.ModuleList(init(nn.Linear(config.width, sum(self.sizes)), seed) for _ in range(2))
        at = (torch.arange(config.side) + .5) / config.side                          # 2-D sines, at the image's scale
        at = at[:, None] * math.pi * 2 ** torch.linspace(0, 3, config.width // 4)    # (s, Dv/4)
        at = torch.cat((at.sin(), at.cos()), 1)                                      # (s, Dv/2)
        rows, columns = (x.expand(config.side, config.side, -1) for x in (at[:, None], at[None]))
        with torch.no_grad():
            self.vit.positions[1:] = .5 * torch.cat((rows, columns), -1).flatten(0, 1)
            self.vit.patch_embed.weight.mul_(2)

    def forward(self, images):                                                       # (B, 3, S, S) uint8
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
        x = self.vit((images.float() - mean) / std)[:, 1:].float()                   # (B, L, Dv)
        x = F.layer_norm(x, x.shape[-1:])
        w = self.vit.config.side // CELLS
        cells = x.view(len(x), CELLS, w, CELLS, w, -1).mean((2, 4)).flatten(1, 2)    # (B, C, Dv)
        return torch.cat((self.heads[0](x), self.heads[1](cells)), 1)                # (B, L+C, sum of sizes)

    def batch(self, seed, split, numbers, step=0):
        scenes = [scene(seed, split, n) for n in numbers]
        images = torch.from_numpy(np.stack([np.asarray(draw(s)) for s in scenes])).permute(0, 3, 1, 2)
        classes, edges = zip(*(self.labels(s) for s in scenes))
        return images, torch.from_numpy(np.stack(classes)), torch.from_numpy(np.stack(edges))

    def labels(self, scene):
        """(L+C, 3) classes and (L+C, 4) edges of what covers each patch and of what is centred in each cell."""
        side = self.vit.config.side
        places = side ** 2 + CELLS ** 2
        classes, edges = np.zeros((places, 3), np.int64), np.zeros((places, 4), np.float32)
        at = (np.arange(side) + .5) * SIDE / side
        for t in scene.things:
            x1, y1, x2, y2 = t.box
            covered = ((at > y1 - 2) & (at < y2 + 2))[:, None] & ((at > x1 - 2) & (at < x2 + 2))
            where = [*np.flatnonzero(covered), side ** 2 + cell_of(t)]
            classes[where] = [1 + kind.index(v) for kind, v in zip(KINDS, (t.colour, t.shape, t.size))]
            edges[where] = np.array(t.box) / SIDE
        return classes, edges

    def loss(self, batch, step):
        images, classes, edges = batch
        out, total, patches = self(images).float(), 0, self.vit.config.side ** 2
        for part in (slice(None, patches), slice(patches, None)):
            *kinds, at = out[:, part].split(self.sizes, -1)
            for k, scores in enumerate(kinds):
                weight = torch.tensor([.3] + [1.] * (scores.shape[-1] - 1))          # most of a picture is ground
                total = total + F.cross_entropy(scores.flatten(0, 1), classes[:, part, k].flatten(), weight)
            there = classes[:, part, 0] > 0
            total = total + 4 * (at.unflatten(-1, (4, -1)) - waves(edges[:, part]))[there].square().mean()
        return total

    @torch.no_grad()
    def gate(self, seed, split="heldout", scenes=256):
        """By cell: is it known that something is there, and what? Edges: mean error in pixels."""
        images, classes, edges = self.batch(seed, split, range(scenes))
        *kinds, at = self(images)[:, -CELLS ** 2:].split(self.sizes, -1)
        classes, edges = classes[:, -CELLS ** 2:], edges[:, -CELLS ** 2:]
        there = classes[..., 0] > 0
        result = {"something": ((kinds[0].argmax(-1) > 0) == there).float().mean()}
        for k, name in enumerate(("colour", "shape", "size")):
            result[name] = (kinds[k].argmax(-1) == classes[..., k])[there].float().mean()
        linear = (at.unflatten(-1, (4, -1))[..., 0] + 1) / 2
        result["pixels off"] = SIDE * (linear - edges)[there].abs().mean()
        return {k: round(float(v), 3) for k, v in result.items()}


def lessons(scene, rng, hard, easy):
    """(kind, prompt after the image, answer) about one scene: what the stages will ask, so many that are answered by
    comparing and counting and so many that are looked up; and AIDS: captions alone teach to look up by colour."""
    def tail(task, text=""): return data.prompt(task, text).split(data.HERE)[1]
    asked = [(kind, tail("vqa", q), a) for _ in range(2) for kind, q, a in questions(scene, rng)]
    compare = [lesson for lesson in asked if lesson[2] in ("yes", "no") or lesson[0] == "count"]
    look = [lesson for lesson in asked[:len(asked) // 2] if lesson not in compare]
    named = phrases(scene)
    for phrase, t in (rng.choice(named), rng.choice(named)): look.append(("ground", tail("ground", phrase), t.box_text))
    t = rng.choice(scene.things)
    look += [("region", tail("region", t.box_text), f"a {full_name(t)}"), ("caption", tail("caption"), caption(scene))]
    across, down = (sorted(scene.things, key=key) for key in (lambda t: t.cx, lambda t: t.cy))
    look += [("reverse", "Shapes:", ", ".join(f"{t.shape} {t.colour} {t.size}" for t in across)),
             ("boxes", "Boxes:", ", ".join(f"{t.name} {t.box_text}" for t in across)),
             ("order", "Downwards:", ", ".join(t.name for t in down))]
    kind, q, a = rng.choice(conversation(scene, rng))
    look.append((f"chat-{kind}", data.chat_turn(q), a))
    chosen = rng.sample(compare, min(hard, len(compare))) + rng.sample(look, easy)
    return rng.sample(chosen, len(chosen))


def overlap(one, other):
    boxes = parse_box(one), parse_box(other)
    return iou(*boxes) if all(boxes) else 0.0


def same(one, other):
    """The same answer, the same things in any order."""
    def parts(text): return sorted(text.lower().rstrip(".").replace(" and ", ", ").split(", "))
    return parts(one) == parts(other)


class Reader(nn.Module):
    """The LLaMA, and four matrices that tell the edges of a box apart in the sum of embeddings that is a cell."""
    split = "read"

    def __init__(self, config, seed, tokenizer):
        super().__init__()
        self.llm = init(Llama(config), seed)
        self.slots = nn.Parameter(torch.zeros(4, config.width, config.width))
        self.encode, self.decode = lru_cache(50_000)(tokenizer.encode), tokenizer.decode
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        piece = tokenizer.model.piece_to_id
        self.word = {w: piece("▁" + w) for kind in KINDS for w in kind}
        self.number = [piece(f"{n / 100:.2f}") for n in range(101)]
        assert tokenizer.pad not in (*self.word.values(), *self.number), "a word of the toy world is not one piece"
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            embed, n = self.llm.embed.weight, waves(torch.arange(101) / 100)
            embed.copy_(torch.randn(embed.shape, generator=rng) * .5)
            embed[self.number] = n @ torch.randn(n.shape[1], config.width, generator=rng) * (.5 / n.norm(dim=1).mean())
            self.llm.lm_head.weight.copy_(embed * .1)
            for slot in self.slots: slot.copy_(torch.linalg.qr(torch.randn(slot.shape, generator=rng))[0])

    def symbols(self, scene):
        """(C, 7): the pieces of colour, shape, size and four edges of what is centred in each cell; -1: nothing."""
        cells = np.full((CELLS ** 2, 7), -1)
        for t in scene.things:
            words = [self.word[w] for w in (t.colour, t.shape, t.size)]
            cells[cell_of(t)] = words + [self.number[round(100 * v / SIDE)] for v in t.box]
        return cells

    def batch(self, seed, split, numbers, step=0):
        """tokens, targets, weights (B,T), cells (B,C,7) and [(row, first, past the last, kind)] of all answers."""
        rows, cells, answers, turns = [], [], [], TURNS[max(first for first in TURNS if first <= step)]
        for b, number in enumerate(numbers):
            one = scene(seed, split, number)
            tokens = [self.bos] + self.encode("<image>") + [IMAGE] * CELLS ** 2
            targets, weights = [IGNORE] * len(tokens), [0.] * len(tokens)
            for kind, q, a in lessons(one, rng_of("lesson", seed, number), *turns):
                q, a = self.encode(q), self.encode(a) + [self.eos]
                answers.append((b, len(tokens) + len(q) - 1, len(tokens) + len(q) + len(a) - 1, kind))
                tokens, targets = tokens + q + a, targets + [IGNORE] * len(q) + a
                weights += [0.] * len(q) + [len(a) ** -.5] * len(a)    # else boxes and captions drown out yes and no
            rows.append((tokens[:-1], targets[1:], weights[1:]))
            cells.append(self.symbols(one))
        T = max(len(tokens) for tokens, _, _ in rows)
        filled = [[row[k] + [fill] * (T - len(row[k])) for row in rows] for k, fill in enumerate((0, IGNORE, 0.))]
        return *map(torch.tensor, filled), torch.from_numpy(np.stack(cells)), answers

    def forward(self, tokens, cells, noise=None):                                    # -> (B, T, D)
        x = self.llm.embed(tokens.clamp(min=0))
        e = self.llm.embed(cells.clamp(min=0))                                       # (B, C, 7, D)
        visual = e[:, :, :3].sum(2) + torch.einsum("bckd,kde->bce", e[:, :, 3:], self.slots)
        visual = torch.where(cells[:, :, :1] < 0, 0., visual)
        if noise is not None: visual = visual + NOISE * torch.randn(visual.shape, generator=noise)
        at = tokens[0].tolist().index(IMAGE)                                         # the same in every row
        return self.llm(torch.cat((x[:, :at], visual, x[:, at + CELLS ** 2:]), 1))   # (B, at + C + rest, D)

    def loss(self, batch, step):
        tokens, targets, weights, cells, _ = batch
        at = targets != IGNORE
        hidden = self(tokens, cells, torch.Generator().manual_seed(step))[at].float()              # (M, D)
        losses = F.cross_entropy(self.llm.head(hidden), targets[at], reduction="none")             # (M,)
        return (losses * weights[at]).sum() / weights[at].sum()

    @torch.no_grad()
    def gate(self, seed, split="heldout", scenes=200):
        """Share of right answers by kind, from a symbolic prefix; a box is right from IoU 0.5 on."""
        right, count = Counter(), Counter()
        for first in range(0, scenes, 50):
            tokens, targets, _, cells, answers = self.batch(seed, split, range(first, min(scenes, first + 50)))
            said = self.llm.head(self(tokens, cells)).argmax(-1)                     # (B, T): right so far is greedy's
            for row, start, stop, kind in (a for a in answers if a[3] not in AIDS):
                ours, truth = said[row, start:stop], targets[row, start:stop]
                ours, truth = self.decode(ours.tolist()), self.decode(truth.tolist())
                ok = same(ours, truth) or overlap(ours, truth) >= .5
                for name in {kind.split("-")[0] if kind.startswith("chat") else kind, "all"}:
                    right[name] += ok; count[name] += 1
        return {kind: round(right[kind] / n, 3) for kind, n in sorted(count.items())}

    @torch.no_grad()
    def held_out(self, seed, split="heldout", scenes=200):
        """Cross-entropy per token of all answers about so many symbolic scenes, and the share of right ones."""
        total, tokens = 0.0, 0
        for first in range(0, scenes, 50):
            ids, targets, _, cells, _ = self.batch(seed, split, range(first, min(scenes, first + 50)))
            at = targets != IGNORE
            logits = self.llm.head(self(ids, cells)[at]).double()                    # (M, V)
            total += F.cross_entropy(logits, targets[at], reduction="sum").item()
            tokens += int(at.sum())
        return {"loss": total / tokens, "tokens": tokens, "right": self.gate(seed, split, scenes)["all"]}


def reading(llm, tokenizer, slots="assets/toy/slots.safetensors", seed=0, scenes=200):
    """What is left of what an LLM could read before it saw pictures: Reader.held_out of a trained model's."""
    reader = Reader(llm.config, seed, tokenizer)
    reader.llm, reader.slots.data = llm, load_file(slots)["slots"]
    return reader.held_out(seed, "heldout", scenes)


def pupil(part, seed, tokenizer, config=None):
    config = config or PRESETS["toy"]()
    return Seer(config.vit, seed) if part == "vit" else Reader(config.llm, seed, tokenizer)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal before it is applied (Jordan et al., 2024; its Newton-Schulz iteration), scaled to the
    length of an AdamW update. torch's own works in bf16, a tenth as fast as this on processors that lack it."""

    def __init__(self, params, lr): super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {p.shape for p in group["params"]}:           # all matrices of one shape at once
            params = [p for p in group["params"] if p.shape == shape]
            for p in params: self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, .05)
            x = torch.stack([p.grad.lerp(self.state[p]["momentum"], .95) for p in params])           # (n, out, in)
            if shape[0] > shape[1]: x = x.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
            for p, u in zip(params, x.mT if shape[0] > shape[1] else x):
                p.sub_(u, alpha=group["lr"] * .2 * max(shape) ** .5)


def optimizers(net, lr):
    """Muon for the matrices inside, AdamW for the rest: half the steps that AdamW alone takes."""
    inside = {n: p for n, p in net.named_parameters() if p.ndim == 2 and ("blocks." in n or "layers." in n)}
    rest = [p for n, p in net.named_parameters() if n not in inside]
    return [Muon(inside.values(), lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(.9, .98), weight_decay=0.)]


def school(part, scratch, seed, plan=None, config=None, stop=None, every=200):
    """Teach one stand-in on one core, on from its last checkpoint in `scratch`; the losses of its steps."""
    torch.set_num_threads(1)
    plan, file, losses = plan or SCHOOL[part], Path(scratch) / f"{part}.pt", []
    net = pupil(part, seed, Tokenizer(Path(scratch) / "tokenizer.model"), config)
    both, done, start = optimizers(net, plan.lr), 0, time.time()
    if file.is_file():
        state = torch.load(file)
        if state["seed"] != seed: raise BadInput(f"{file}: began with --seed {state['seed']}; take it, or delete it")
        net.load_state_dict(state["net"])
        for optimizer, held in zip(both, state["optimizers"]): optimizer.load_state_dict(held)
        done = state["step"]
    for step in range(done, min(plan.steps, stop or plan.steps)):
        for group in (g for o in both for g in o.param_groups):
            group["lr"] = plan.lr * min(1, (step + 1) / 100, (plan.steps - step) / (plan.decay * plan.steps))
        batch = net.batch(seed, net.split, range(step * plan.batch, (step + 1) * plan.batch), step)
        loss = net.loss(batch, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in both: optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 in (plan.steps, stop):
            held = {"net": net.state_dict(), "optimizers": [o.state_dict() for o in both]}
            torch.save({**held, "step": step + 1, "seed": seed}, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
            print(f"{part} step {step + 1} of {plan.steps}  loss {sum(losses[-every:]) / len(losses[-every:]):.3f}  "
                  f"{time.time() - start:.0f} s  {net.gate(seed)}", flush=True)
    return losses


def backbones(out="assets/toy", scratch="out/backbones", seed=0):
    """Both stand-ins at once, a core each; then one checkpoint of them, with an adapter that knows nothing yet."""
    scratch = Path(scratch)
    train_tokenizer(scratch / "tokenizer.model")
    with multiprocessing.get_context("spawn").Pool(len(SCHOOL)) as pool:
        pool.starmap(school, [(part, scratch, seed) for part in SCHOOL])
    assemble(out, scratch, seed)


def assemble(out, scratch, seed):
    tokenizer = Tokenizer(scratch / "tokenizer.model")
    model = init(InfMLLM(PRESETS["toy"]()), seed)
    vocab = model.config.llm.vocab
    assert vocab == tokenizer.size, f"the toy preset has {vocab} pieces and its tokenizer {tokenizer.size}"
    nets = {part: pupil(part, seed, tokenizer) for part in SCHOOL}
    for part, net in nets.items():
        net.load_state_dict(torch.load(scratch / f"{part}.pt")["net"])
        getattr(model, part).load_state_dict(getattr(net, part).state_dict())
    gates = {part: net.gate(seed) for part, net in nets.items()}
    checkpoint.save(out, model, tokenizer, training={"backbones": {"seed": seed, "gates": gates}})
    save_file({"slots": nets["llm"].slots.detach()}, Path(out) / "slots.safetensors")       # for the test of the gate
    print(f"{out}: {gates}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("world", "backbones"), default="world", help="default: world")
    parser.add_argument("--out", help="folder to write; default out/toy, or assets/toy for the backbones")
    parser.add_argument("--scratch", default="out/backbones", help="where the backbones' training stands")
    parser.add_argument("--seed", type=int, default=0, help="of all scenes and of the backbones; default 0")
    parser.add_argument("--scenes", type=int, default=10_000, help="training scenes; held-out sets have up to 500")
    args = parser.parse_args()
    if args.what == "backbones": return backbones(args.out or "assets/toy", args.scratch, args.seed)
    if args.scenes < 1: raise BadInput(f"--scenes {args.scenes}: draw at least one")
    out = args.out or "out/toy"
    print(f"{out}: " + ("written" if write(out, args.seed, args.scenes) else "already there, unchanged"))


if __name__ == "__main__":
    try: main()
    except BadInput as e: print(e, file=sys.stderr); sys.exit(2)
