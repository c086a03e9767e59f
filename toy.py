"""The toy world: scenes of a few coloured shapes, about which everything is known, on disk in real formats.

    python toy.py                                     # out/toy: 10,000 scenes, and 500 + 500 held out
    python toy.py --out out/small --scenes 500 --seed 1

A scene is a pure function of (seed, split, number). The splits never meet:

    train           what the stages learn from
    heldout         more of the same
    compositional   every scene shows one of the four UNSEEN pairs of colour and shape, which train and
                    heldout neither show nor name
    read            never drawn: the scenes that the LLaMA stand-in has read about (tools/backbones.py), all
                    pairs among them, as Vicuna has read about things that no stage will show it
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from support.errors import BadInput, complain
from text.boxes import format_box

SIDE = 64  # pixels per side of a picture
FINE = 4  # pictures are drawn so many times finer and averaged down: soft edges
COLOURS = {
    "red": (222, 40, 44),
    "green": (36, 160, 56),
    "blue": (44, 84, 224),
    "yellow": (240, 214, 40),
    "purple": (150, 44, 190),
    "cyan": (40, 200, 214),
}
ARM = 0.36  # half the width of a cross's arm
CORNERS = {  # around (0, 0), in radii; of a circle those of the box around it
    "circle": [(-1, -1), (1, 1)],
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM)],  # of one arm; the loop below turns it
}
for _ in range(3):
    CORNERS["cross"] += [(-y, x) for x, y in CORNERS["cross"][-3:]]
SHAPES = tuple(CORNERS)
SIZES = {"small": (7.5, 9.5), "large": (12.0, 15.0)}  # radius in pixels
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
UNSEEN = [("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square")]
SPLITS = ("train", "heldout", "compositional")  # those on disk
MARGIN = 8  # pixels by which centres must differ before a relation is asked about
SHARD = 1000  # scenes per tar


# ---------------------------------------------------------------------------------------------------
# Scenes


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
    def full_name(self):
        return f"{self.size} {self.name}"

    def corners(self):
        return [(self.cx + self.r * x, self.cy + self.r * y) for x, y in CORNERS[self.shape]]

    @property
    def box(self):
        """x1, y1, x2, y2 in pixels: what the shape touches."""
        xs, ys = zip(*self.corners())
        return tuple(round(v, 2) for v in (min(xs), min(ys), max(xs), max(ys)))

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


def possible_pairs(split):
    """Which pairs of colour and shape a split may show and name."""
    return [p for p in PAIRS if split in ("compositional", "read") or p not in UNSEEN]


def scene(seed, split, number):
    """One to four things, none touching another, no pair of colour and shape twice."""
    rng = rng_of("scene", seed, split, number)
    count = rng.randint(1, 4)
    pairs = [rng.choice(UNSEEN)] if split == "compositional" else []
    others = [p for p in possible_pairs(split) if p not in pairs]
    pairs += rng.sample(others, count - len(pairs))
    rng.shuffle(pairs)
    shade = rng.choice((rng.uniform(8, 70), rng.uniform(150, 245)))
    ground = tuple(int(shade + rng.uniform(-8, 8)) for _ in range(3))
    things = []
    while len(things) < count:  # where one found no room, all are placed anew
        things = place(pairs, rng)
    return Scene(split, number, ground, tuple(things))


def place(pairs, rng):
    """Things of these colours and shapes at random places, without those that found no room in 20 tries."""
    things = []
    for colour, shape in pairs:
        size = rng.choice(list(SIZES))
        r = rng.uniform(*SIZES[size])
        for _ in range(20):
            x = rng.uniform(r + 1, SIDE - r - 1)
            y = rng.uniform(r + 1, SIDE - r - 1)
            if all(max(abs(x - t.cx), abs(y - t.cy)) > r + t.r + 1 for t in things):
                things.append(Thing(colour, shape, size, round(x, 2), round(y, 2), round(r, 2)))
                break
    return things


def draw(scene):
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), scene.ground)
    pen = ImageDraw.Draw(image)
    for t in scene.things:
        if t.shape == "circle":
            pen.ellipse([v * FINE for v in t.box], COLOURS[t.colour])
        else:
            pen.polygon([(x * FINE, y * FINE) for x, y in t.corners()], COLOURS[t.colour])
    return image.reduce(FINE)


# ---------------------------------------------------------------------------------------------------
# What is said about a scene


def caption(scene):
    """Everything there is, from left to right."""
    *names, last = [f"a {t.full_name}" for t in sorted(scene.things, key=lambda t: t.cx)]
    if not names:
        return last
    return f"{', '.join(names)} and {last}"


def yes(truth):
    return "yes" if truth else "no"


def unique(thing, things, *attributes):
    """Whether no other thing has the same values of these attributes."""
    alike = [o for o in things if all(getattr(o, a) == getattr(thing, a) for a in attributes)]
    return len(alike) == 1


def existence(scene, rng):
    """Is there ...? Half the answers are yes."""
    truths = [rng.random() < 0.5 for _ in range(3)]
    pairs = sorted((t.colour, t.shape) for t in scene.things)
    colours = sorted({t.colour for t in scene.things})
    shapes = sorted({t.shape for t in scene.things})
    absent = [p for p in possible_pairs(scene.split) if p not in pairs]
    # the colour or the shape alone is there, so that "no" takes a close look
    near = [p for p in absent if p[0] in colours or p[1] in shapes]
    other_colours = [c for c in COLOURS if c not in colours]
    other_shapes = [s for s in SHAPES if s not in shapes]
    pair = rng.choice(pairs if truths[0] else near or absent)
    colour = rng.choice(colours if truths[1] else other_colours)
    shape = rng.choice(shapes if truths[2] else other_shapes or list(SHAPES))
    return [
        ("exists", f"Is there a {' '.join(pair)}?", yes(pair in pairs)),
        ("exists-colour", f"Is there a {colour} object?", yes(colour in colours)),
        ("exists-shape", f"Is there a {shape}?", yes(shape in shapes)),
    ]


MIDDLE = Thing("", "", "", SIDE / 2, SIDE / 2, 0)
DIRECTIONS = (  # the words, the half of the picture, and how far in that direction a lies from b
    ("left of", "left", lambda a, b: b.cx - a.cx),
    ("right of", "right", lambda a, b: a.cx - b.cx),
    ("above", "upper", lambda a, b: b.cy - a.cy),
    ("below", "lower", lambda a, b: a.cy - b.cy),
)


def relations(scene, rng):
    """Where a thing lies from another one, and in which half of the picture; never a close call."""
    asked = []
    things = scene.things
    for words, _, distance in DIRECTIONS:
        clear = [(a, b) for a in things for b in things if abs(distance(a, b)) >= MARGIN]
        if clear:
            a, b = rng.choice(clear)
            question = f"Is the {a.name} {words} the {b.name}?"
            asked.append((words.split()[0], question, yes(distance(a, b) > 0)))
    halves = []
    for t in things:
        for _, half, distance in DIRECTIONS:
            inside = distance(t, MIDDLE)
            if abs(inside) >= MARGIN / 2:
                halves.append((f"Is the {t.name} in the {half} half?", yes(inside > 0)))
    if halves:
        asked.append(("half", *rng.choice(halves)))
    return asked


def questions(scene, rng):
    """One question of every type that the scene allows: (type, question, answer)."""
    things = scene.things
    asked = []
    by_shape = [t for t in things if unique(t, things, "shape")]
    if by_shape:
        t = rng.choice(by_shape)
        asked.append(("colour", f"What colour is the {t.shape}?", t.colour))
    by_colour = [t for t in things if unique(t, things, "colour")]
    if by_colour:
        t = rng.choice(by_colour)
        asked.append(("shape", f"What shape is the {t.colour} object?", t.shape))
    t = rng.choice(things)
    asked.append(("size", f"What size is the {t.name}?", t.size))
    colour = rng.choice((t.colour, rng.choice(list(COLOURS))))
    shape = rng.choice((t.shape, rng.choice(SHAPES)))
    counts = [
        ("objects", len(things)),
        (f"{colour} objects", sum(t.colour == colour for t in things)),
        (shape + ("es" if shape == "cross" else "s"), sum(t.shape == shape for t in things)),
    ]
    what, number = rng.choice(counts)
    asked.append(("count", f"How many {what} are there?", str(number)))
    return asked + existence(scene, rng) + relations(scene, rng)


def phrases(scene):
    """(phrase, thing) for every phrase that singles out one thing."""
    out = []
    for t in scene.things:
        for phrase, attributes in (
            (f"the {t.full_name}", ("colour", "shape")),
            (f"the {t.name}", ("colour", "shape")),
            (f"the {t.shape}", ("shape",)),
            (f"the {t.colour} object", ("colour",)),
            (f"the {t.size} object", ("size",)),
            (f"the {t.size} {t.shape}", ("size", "shape")),
        ):
            if unique(t, scene.things, *attributes):
                out.append((phrase, t))
    return out


def say(kind, answer):
    """A short answer as one says it in a conversation."""
    if kind == "count":
        return "There is 1." if answer == "1" else f"There are {answer}."
    if kind in ("colour", "size"):
        return f"It is {answer}."
    if kind == "shape":
        return f"It is a {answer}."
    return answer.capitalize() + "."


def conversation(scene, rng):
    """Three to five turns of mixed kind: (kind, question, answer)."""
    phrase, there = rng.choice(phrases(scene))
    here = rng.choice(scene.things)
    turns = [
        ("caption", "Describe the image.", caption(scene).capitalize() + "."),
        ("ground", f"Where is {phrase}?", there.box_text),
        ("region", f"What is at {here.box_text}?", f"A {here.full_name}."),
    ]
    turns = rng.sample(turns, rng.randint(1, 3))
    asked = [(kind, q, say(kind, a)) for kind, q, a in questions(scene, rng)]
    more = rng.randint(2, 5 - len(turns))
    turns += rng.sample(asked, min(len(asked), more))
    return rng.sample(turns, len(turns))


# ---------------------------------------------------------------------------------------------------
# The world on disk

# things at the edge of a picture must not be lost, so nothing is cropped
SOURCES = {
    "shards": """format = "caption-shards"
shards = "{0}/shards/*.tar"
crop = false""",
    "captions": """format = "coco-caption"
annotations = "{0}/captions.json"
images = "{0}/images"
crop = false""",
    "vqa": """format = "vqa"
questions = "{0}/questions.json"
annotations = "{0}/answers.json"
images = "{0}/images"
image_name = "{{:06d}}.png"
crop = false""",
    "refs": """format = "refcoco"
annotations = "{0}/refs.json"
images = "{0}/images\"""",
    "regions": """format = "refcoco"
task = "region"
annotations = "{0}/regions.json"
images = "{0}/images\"""",
    "chat": """format = "conversations"
annotations = "{0}/chat.json"
images = "{0}/images\"""",
}
EVERY_TASK = dict.fromkeys(("captions", "vqa", "refs", "regions", "chat"))
MIXTURES = {  # file -> split, and source -> weight; None: by size, all that there is
    "stage1": ("train", {"shards": 1.0}),
    "stage2": ("train", {"captions": 0.5, "vqa": 2.0, "refs": 5.0, "regions": 0.5}),
    "stage3": ("train", {"chat": 3.0, "captions": 0.5, "vqa": 1.5, "refs": 1.5}),
    "heldout": ("heldout", EVERY_TASK),
    "compositional": ("compositional", EVERY_TASK),
}


def records(scene, seed):
    """What is written about a scene: {file: its records}."""
    rng = rng_of("text", seed, scene.split, scene.number)
    n = scene.number
    image = f"{n:06d}.png"
    out = {"questions": [], "answers": [], "refs": [], "regions": []}
    out["images"] = [{"id": n, "file_name": image, "width": SIDE, "height": SIDE}]
    out["captions"] = [{"id": n, "image_id": n, "caption": caption(scene)}]

    asked = questions(scene, rng)
    for i, (kind, question, answer) in enumerate(rng.sample(asked, min(5, len(asked)))):
        key = n * 10 + i
        out["questions"].append(
            {"image_id": n, "question": question, "question_id": key, "type": kind}
        )
        out["answers"].append(
            {
                "image_id": n,
                "question_id": key,
                "question_type": kind,
                "multiple_choice_answer": answer,
                "answers": [{"answer": answer, "answer_id": j} for j in range(1, 11)],
            }
        )

    talk = conversation(scene, rng)
    turns = []
    for _, question, answer in talk:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    kinds = [kind for kind, _, _ in talk]
    out["chat"] = [{"id": f"{n:06d}", "image": image, "types": kinds, "conversations": turns}]

    named = phrases(scene)
    for i, t in enumerate(scene.things):
        key = n * 10 + i
        thing = {"img_name": image, "bbox": t.box, "segment_id": key}
        names = [phrase for phrase, of in named if of is t]
        names = rng.sample(names, min(2, len(names)))
        said = [{"sent": name, "sent_id": key * 10 + j} for j, name in enumerate(names)]
        out["refs"].append(thing | {"sentences": said})
        said = [{"sent": f"a {t.full_name}", "sent_id": key}]
        out["regions"].append(thing | {"sentences": said})
    return out


def write_split(folder, seed, count):
    """Pictures, one by one and in tars, and the annotations of a split's first `count` scenes."""
    split = folder.name
    (folder / "images").mkdir(parents=True)
    (folder / "shards").mkdir()
    files = {}
    for number in range(count):
        one = scene(seed, split, number)
        png = io.BytesIO()
        draw(one).save(png, "PNG")
        (folder / "images" / f"{number:06d}.png").write_bytes(png.getvalue())
        with open(folder / "shards" / f"{number // SHARD:05d}.tar", "ab") as tar:
            for ending, content in (("png", png.getvalue()), ("txt", caption(one).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + content)
                tar.write(bytes(-len(content) % 512))  # members begin at multiples of 512
            if number + 1 == count or (number + 1) % SHARD == 0:
                tar.write(bytes(1024))  # the end mark
        for name, rows in records(one, seed).items():
            files.setdefault(name, []).extend(rows)
    head = {"info": {"description": "toy world"}, "data_type": "toy", "data_subtype": split}
    files["captions"] = head | {"images": files.pop("images"), "annotations": files["captions"]}
    files["questions"] = head | {"questions": files["questions"]}
    files["answers"] = head | {"annotations": files["answers"]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")))


def write_mixture(path, split, weights):
    tables = []
    for source, weight in weights.items():
        share = f"weight = {weight}\n" if weight else ""
        text = SOURCES[source].format(split)
        tables.append(f'[[source]]\nname = "{source}"\n{share}{text}\n')
    path.write_text("\n".join(tables))


def write(out, seed=0, scenes=10_000):
    """The world at `out`, whole or not at all: written beside it and renamed. -> whether it had to be.

    toy.json says that a world is complete."""
    out = Path(out)
    done = out / "toy.json"
    made = {"seed": seed, "scenes": scenes, "version": 2}
    if done.is_file() and json.loads(done.read_text()) == made:
        return False
    if out.exists() and not done.is_file() and any(out.iterdir()):
        raise BadInput(f"{out}: holds something that is not a toy world; name another --out")
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    for split in SPLITS:
        write_split(part / split, seed, scenes if split == "train" else min(500, scenes))
    for name, (split, weights) in MIXTURES.items():
        write_mixture(part / f"{name}.toml", split, weights)
    (part / "toy.json").write_text(json.dumps(made))
    if out.exists():
        shutil.rmtree(out)
    os.replace(part, out)
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out/toy", help="folder to write; default out/toy")
    parser.add_argument("--seed", type=int, default=0, help="of all scenes; default 0")
    parser.add_argument(
        "--scenes", type=int, default=10_000, help="training scenes; held-out sets have up to 500"
    )
    args = parser.parse_args()
    if args.scenes < 1:
        raise BadInput(f"--scenes {args.scenes}: draw at least one")
    written = write(args.out, args.seed, args.scenes)
    print(f"{args.out}: {'written' if written else 'already there, unchanged'}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        sys.exit(complain(e))
