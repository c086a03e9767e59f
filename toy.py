"""The toy world: scenes of a few coloured shapes, all about them known, on disk in the formats of the real thing.

    python toy.py                                              # out/toy: 10,000 scenes, and 500 + 500 held out
    python toy.py --out out/small --scenes 500 --seed 1

A scene is a pure function of (seed, split, number). The splits never meet: `train`; `heldout`, more of it;
`compositional`, whose scenes show one of four (colour, shape) pairs that those neither show nor name; and `read`, which
is never drawn: what the LLaMA stand-in reads, all pairs in it, as Vicuna has read of things that no stage will show it.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from support.errors import BadInput
from text.boxes import format_box

SIDE = 64  # pixels per side of a picture

FINE = 4  # drawn so many times finer, then averaged down: soft edges

COLOURS = {
    "red": (222, 40, 44),
    "green": (36, 160, 56),
    "blue": (44, 84, 224),
    "yellow": (240, 214, 40),
    "purple": (150, 44, 190),
    "cyan": (40, 200, 214),
}

SHAPES = ("circle", "square", "triangle", "cross")

SIZES = {"small": (7.5, 9.5), "large": (12.0, 15.0)}  # radius in pixels

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]

UNSEEN = [("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square")]

SPLITS = ("train", "heldout", "compositional")  # those on disk

EVERY_PAIR = ("compositional", "read")  # splits in which the unseen pairs occur

MARGIN = 8  # pixels by which centres must differ before a relation is asked about

SHARD = 1000  # scenes per tar, and per unit of work


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
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def outline(self):
        """Corners of the shape around (0, 0), radius 1; a circle has none."""
        a = 0.36  # half the width of a cross's arm
        return {
            "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
            "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
            "cross": [
                (-a, -1),
                (a, -1),
                (a, -a),
                (1, -a),
                (1, a),
                (a, a),
                (a, 1),
                (-a, 1),
                (-a, a),
                (-1, a),
                (-1, -a),
                (-a, -a),
            ],
        }.get(self.shape)

    @property
    def box(self):
        """x1, y1, x2, y2 in pixels: what the shape touches."""
        xs, ys = zip(*(self.outline or [(-1, -1), (1, 1)]))
        return tuple(
            round(c + self.r * v, 2)
            for c, v in (
                (self.cx, min(xs)),
                (self.cy, min(ys)),
                (self.cx, max(xs)),
                (self.cy, max(ys)),
            )
        )

    @property
    def box_text(self):
        return format_box([v / SIDE for v in self.box])


@dataclass(frozen=True)
class Scene:
    split: str
    number: int
    ground: tuple  # RGB
    things: tuple


def rng_of(*key):
    return random.Random(" ".join(map(str, key)))


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
    while True:  # crowded draws are thrown away whole
        things = []
        for colour, shape in pairs:
            size = rng.choice(list(SIZES))
            r = rng.uniform(*SIZES[size])
            for _ in range(20):
                x, y = rng.uniform(r + 1, SIDE - r - 1), rng.uniform(r + 1, SIDE - r - 1)
                if all(max(abs(x - t.cx), abs(y - t.cy)) > r + t.r + 1 for t in things):
                    things.append(Thing(colour, shape, size, round(x, 2), round(y, 2), round(r, 2)))
                    break
        if len(things) == count:
            return Scene(split, number, ground, tuple(things))


def draw(scene):
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), scene.ground)
    pen = ImageDraw.Draw(image)
    for t in scene.things:
        if t.outline:
            pen.polygon(
                [
                    (t.cx * FINE + t.r * FINE * x, t.cy * FINE + t.r * FINE * y)
                    for x, y in t.outline
                ],
                COLOURS[t.colour],
            )
        else:
            pen.ellipse([v * FINE for v in t.box], COLOURS[t.colour])
    return image.reduce(FINE)


# ---- what is said about a scene --------------------------------------------------------------------------------------
def full_name(thing):
    return f"{thing.size} {thing.name}"


def caption(scene):
    """Everything there is, from left to right."""
    names = [f"a {full_name(t)}" for t in sorted(scene.things, key=lambda t: t.cx)]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def yes(truth):
    return "yes" if truth else "no"


def existence(scene, rng):
    """Is there ...? Half the answers are yes. What no stage may show, no stage may name either."""
    truth, pairs = (
        [rng.random() < 0.5 for _ in range(3)],
        {(t.colour, t.shape) for t in scene.things},
    )
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    absent = [c for c in COLOURS if c not in colours]
    missing = [s for s in SHAPES if s not in shapes] or list(shapes)
    known = [p for p in PAIRS if p not in pairs and (scene.split in EVERY_PAIR or p not in UNSEEN)]
    half = [
        p for p in known if p[0] in colours or p[1] in shapes
    ]  # the colour or the shape is there: no cheap no
    pair = rng.choice(sorted(pairs) if truth[0] else half or known)
    colour = rng.choice(sorted(colours) if truth[1] else absent)
    shape = rng.choice(sorted(shapes) if truth[2] else missing)
    return [
        ("exists", f"Is there a {pair[0]} {pair[1]}?", yes(pair in pairs)),
        ("exists-colour", f"Is there a {colour} object?", yes(colour in colours)),
        ("exists-shape", f"Is there a {shape}?", yes(shape in shapes)),
    ]


def relations(scene, rng):
    """left, right, above, below between two things, and which half a thing is in; never a close call."""
    out, pairs = [], [(a, b) for a in scene.things for b in scene.things if a is not b]
    for kind, axis, sign in (
        ("left of", 0, 1),
        ("right of", 0, -1),
        ("above", 1, 1),
        ("below", 1, -1),
    ):
        gaps = [(a, b, sign * ((b.cx - a.cx) if axis == 0 else (b.cy - a.cy))) for a, b in pairs]
        clear = [(a, b, gap) for a, b, gap in gaps if abs(gap) >= MARGIN]
        if clear:
            a, b, gap = rng.choice(clear)
            out.append((kind.split()[0], f"Is the {a.name} {kind} the {b.name}?", yes(gap > 0)))
    halves = [
        (t, side, at < SIDE / 2, low)
        for t in scene.things
        for side, at, low in (
            ("left", t.cx, True),
            ("right", t.cx, False),
            ("upper", t.cy, True),
            ("lower", t.cy, False),
        )
        if abs(at - SIDE / 2) >= MARGIN / 2
    ]
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
    colour, shape = (
        rng.choice((t.colour, rng.choice(list(COLOURS)))),
        rng.choice((t.shape, rng.choice(SHAPES))),
    )
    what, number = rng.choice(
        (
            ("objects", len(things)),
            (f"{colour} objects", sum(t.colour == colour for t in things)),
            (plural(shape), sum(t.shape == shape for t in things)),
        )
    )
    out.append(("count", f"How many {what} are there?", str(number)))
    return out + existence(scene, rng) + relations(scene, rng)


def phrases(scene):
    """(phrase, thing) for every phrase that singles out one thing."""
    out = []
    for t in scene.things:
        out += [(f"the {full_name(t)}", t), (f"the {t.name}", t)]
        for phrase, same in (
            (f"the {t.shape}", lambda o, t=t: o.shape == t.shape),
            (f"the {t.colour} object", lambda o, t=t: o.colour == t.colour),
            (f"the {t.size} object", lambda o, t=t: o.size == t.size),
            (f"the {t.size} {t.shape}", lambda o, t=t: (o.size, o.shape) == (t.size, t.shape)),
        ):
            if sum(map(same, scene.things)) == 1:
                out.append((phrase, t))
    return out


def say(kind, answer):
    """A short answer as one says it in a conversation."""
    if kind == "count":
        return "There is 1." if answer == "1" else f"There are {answer}."
    if kind in ("colour", "size"):
        return f"It is {answer}."
    return f"It is a {answer}." if kind == "shape" else answer.capitalize() + "."


def conversation(scene, rng):
    """Three to five turns of mixed kind: (kind, question, answer)."""
    phrase, there = rng.choice(phrases(scene))
    here = rng.choice(scene.things)
    turns = [
        ("caption", "Describe the image.", caption(scene).capitalize() + "."),
        ("ground", f"Where is {phrase}?", there.box_text),
        ("region", f"What is at {here.box_text}?", f"A {full_name(here)}."),
    ]
    turns = rng.sample(turns, rng.randint(1, 3))
    asked = [(kind, q, say(kind, a)) for kind, q, a in questions(scene, rng)]
    turns += rng.sample(asked, min(len(asked), rng.randint(2, 5 - min(3, len(turns)))))
    return rng.sample(turns, len(turns))


# ---- the world on disk -----------------------------------------------------------------------------------------------
def records(scene, seed):
    """What is written about a scene, by file."""
    rng, n, name = (
        rng_of("text", seed, scene.split, scene.number),
        scene.number,
        f"{scene.number:06d}.png",
    )
    asked = questions(scene, rng)
    asked = rng.sample(asked, min(5, len(asked)))
    ids = [n * 10 + i for i in range(len(asked))]
    by_thing = [(t, [p for p, of in phrases(scene) if of is t]) for t in scene.things]
    talk = conversation(scene, rng)
    turns = [
        {"from": who, "value": text} for _, q, a in talk for who, text in (("human", q), ("gpt", a))
    ]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {
        "images": [{"id": n, "file_name": name, "width": SIDE, "height": SIDE}],
        "captions": [{"id": n, "image_id": n, "caption": caption(scene)}],
        "questions": [
            {"image_id": n, "question": q, "question_id": i, "type": k}
            for i, (k, q, _) in zip(ids, asked)
        ],
        "answers": [
            {
                "image_id": n,
                "question_id": i,
                "question_type": k,
                "multiple_choice_answer": a,
                "answers": [{"answer": a, "answer_id": j} for j in range(1, 11)],
            }
            for i, (k, _, a) in zip(ids, asked)
        ],
        "refs": [
            {
                "img_name": name,
                "bbox": t.box,
                "segment_id": n * 10 + i,
                "sentences": [
                    {"sent": p, "sent_id": n * 100 + i * 10 + j}
                    for j, p in enumerate(rng.sample(names, min(2, len(names))))
                ],
            }
            for i, (t, names) in enumerate(by_thing)
        ],
        "regions": [
            {
                "img_name": name,
                "bbox": t.box,
                "segment_id": n * 10 + i,
                "sentences": [{"sent": f"a {full_name(t)}", "sent_id": n * 10 + i}],
            }
            for i, t in enumerate(scene.things)
        ],
        "chat": [
            {
                "id": f"{n:06d}",
                "image": name,
                "types": [kind for kind, _, _ in talk],
                "conversations": turns,
            }
        ],
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
            for name, rows in records(one, seed).items():
                out.setdefault(name, []).extend(rows)
        tar.write(bytes(1024))  # the end mark
    return out


MIXTURES = {  # file -> split, and source -> weight; None: every task of the split, to be evaluated
    "stage1": ("train", {"shards": 1.0}),
    "stage2": ("train", {"captions": 0.5, "vqa": 2.0, "refs": 5.0, "regions": 0.5}),
    "stage3": ("train", {"chat": 3.0, "captions": 0.5, "vqa": 1.5, "refs": 1.5}),
    "heldout": ("heldout", None),
    "compositional": ("compositional", None),
}

SOURCES = {  # things at the edge must not be lost, so nothing is cropped
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
        "questions": {**head, "questions": whole["questions"]},
        "answers": {**head, "annotations": whole["answers"]},
        "refs": whole["refs"],
        "regions": whole["regions"],
        "chat": whole["chat"],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")))


def write(out, seed=0, scenes=10_000, workers=2):
    """The world at `out`, whole or not at all: written beside, renamed at the end; toy.json says it is complete."""
    out, made = Path(out), {"seed": seed, "scenes": scenes, "version": 2}
    if (out / "toy.json").is_file() and json.loads((out / "toy.json").read_text()) == made:
        return False
    if out.exists() and not (out / "toy.json").is_file() and any(out.iterdir()):
        raise BadInput(f"{out}: holds something that is not a toy world; name another --out")
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    sizes = {"train": scenes, "heldout": min(500, scenes), "compositional": min(500, scenes)}
    for split in SPLITS:
        for folder in ("images", "shards"):
            (part / split / folder).mkdir(parents=True)
    jobs = [
        (part / split, seed, split, first, min(first + SHARD, sizes[split]))
        for split in SPLITS
        for first in range(0, sizes[split], SHARD)
    ]
    with multiprocessing.get_context("fork").Pool(workers, helper) as pool:
        parts = pool.map(write_shard, jobs, chunksize=1)
    for split in SPLITS:
        write_split(part / split, [p for p, job in zip(parts, jobs) if job[2] == split])
    for name, (split, weights) in MIXTURES.items():
        chosen = weights or dict.fromkeys([s for s in SOURCES if s != "shards"])
        tables = [
            f'[[source]]\nname = "{s}"\n'
            + (f"weight = {w}\n" if w else "")
            + SOURCES[s].format(split)
            + "\n"
            for s, w in chosen.items()
        ]
        (part / f"{name}.toml").write_text("\n".join(tables))
    (part / "toy.json").write_text(json.dumps(made))
    if out.exists():
        shutil.rmtree(out)
    os.replace(part, out)
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="folder to write; default out/toy")
    parser.add_argument("--seed", type=int, default=0, help="of all scenes; default 0")
    parser.add_argument(
        "--scenes", type=int, default=10_000, help="training scenes; held-out sets have up to 500"
    )
    args = parser.parse_args()
    if args.scenes < 1:
        raise BadInput(f"--scenes {args.scenes}: draw at least one")
    out = args.out or "out/toy"
    print(
        f"{out}: "
        + ("written" if write(out, args.seed, args.scenes) else "already there, unchanged")
    )


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        print(e, file=sys.stderr)
        sys.exit(2)
