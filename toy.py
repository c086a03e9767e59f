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

import base64
import csv
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from support.commands import Parser, positive, run
from support.errors import BadInput
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


def unique(things, form):
    """(text, thing) for each thing that is singled out by the text, the form filled with what it is."""
    texts = [form.format(t) for t in things]
    return [(text, t) for text, t in zip(texts, things) if texts.count(text) == 1]


def existence(scene, rng):
    """Is there ...? Half the answers are yes."""
    names = {t.name for t in scene.things}
    colours = {t.colour for t in scene.things}
    shapes = {t.shape for t in scene.things}
    # the colour or the shape alone is there, so that "no" takes a close look
    near = [f"{c} {s}" for c, s in possible_pairs(scene.split) if c in colours or s in shapes]
    kinds = (
        ("exists", "Is there a {}?", names, near),
        ("exists-colour", "Is there a {} object?", colours, COLOURS),
        ("exists-shape", "Is there a {}?", shapes, SHAPES),
    )
    truths = [rng.random() < 0.5 for _ in kinds]
    asked = []
    for truth, (kind, question, present, possible) in zip(truths, kinds):
        absent = [name for name in possible if name not in present]
        name = rng.choice(sorted(present) if truth else absent or SHAPES)
        asked.append((kind, question.format(name), yes(name in present)))
    return asked


DIRECTIONS = (  # the words, the half of the picture, the coordinate, and its sign that way
    ("left of", "left", "cx", -1),
    ("right of", "right", "cx", 1),
    ("above", "upper", "cy", -1),
    ("below", "lower", "cy", 1),
)


def relations(scene, rng):
    """Where a thing lies from another one, and in which half of the picture; never a close call."""
    asked = []
    things = scene.things
    for words, _, axis, sign in DIRECTIONS:
        place = {t: sign * getattr(t, axis) for t in things}
        clear = [(a, b) for a in things for b in things if abs(place[a] - place[b]) >= MARGIN]
        if clear:
            a, b = rng.choice(clear)
            question = f"Is the {a.name} {words} the {b.name}?"
            asked.append((words.split()[0], question, yes(place[a] > place[b])))
    halves = []
    for t in things:
        for _, half, axis, sign in DIRECTIONS:
            inside = sign * (getattr(t, axis) - SIDE / 2)
            if abs(inside) >= MARGIN / 2:
                halves.append((f"Is the {t.name} in the {half} half?", yes(inside > 0)))
    if halves:
        asked.append(("half", *rng.choice(halves)))
    return asked


def questions(scene, rng):
    """One question of every type that the scene allows: (type, question, answer)."""
    things = scene.things
    asked = []
    for kind, form in (
        ("colour", "What colour is the {0.shape}?"),
        ("shape", "What shape is the {0.colour} object?"),
        ("size", "What size is the {0.name}?"),
    ):
        clear = unique(things, form)
        if clear:
            question, t = rng.choice(clear)
            asked.append((kind, question, getattr(t, kind)))
    colour = rng.choice((t.colour, rng.choice(list(COLOURS))))
    shape = rng.choice((t.shape, rng.choice(SHAPES)))
    counts = [
        ("objects", len(things)),
        (f"{colour} objects", sum(t.colour == colour for t in things)),
        (shape + ("es" if shape == "cross" else "s"), sum(t.shape == shape for t in things)),
    ]
    what, count = rng.choice(counts)
    asked.append(("count", f"How many {what} are there?", str(count)))
    return asked + existence(scene, rng) + relations(scene, rng)


PHRASES = (
    "the {0.size} {0.colour} {0.shape}",
    "the {0.colour} {0.shape}",
    "the {0.shape}",
    "the {0.colour} object",
    "the {0.size} object",
    "the {0.size} {0.shape}",
)


def phrases(scene):
    """(phrase, thing) for every phrase that singles out one thing, in the order of the things."""
    found = [named for form in PHRASES for named in unique(scene.things, form)]
    return sorted(found, key=lambda named: scene.things.index(named[1]))


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
    """What is written about a scene: (file, record) each."""
    rng = rng_of("text", seed, scene.split, scene.number)
    n = scene.number
    image = f"{n:06d}.png"
    yield "images", {"id": n, "file_name": image, "width": SIDE, "height": SIDE}
    yield "captions", {"id": n, "image_id": n, "caption": caption(scene)}

    asked = questions(scene, rng)
    for i, (kind, question, answer) in enumerate(rng.sample(asked, min(5, len(asked)))):
        key = n * 10 + i
        yield "questions", {"image_id": n, "question": question, "question_id": key, "type": kind}
        yield (
            "answers",
            {
                "image_id": n,
                "question_id": key,
                "question_type": kind,
                "multiple_choice_answer": answer,
                "answers": [{"answer": answer, "answer_id": j} for j in range(1, 11)],
            },
        )

    talk = conversation(scene, rng)
    turns = []
    for _, question, answer in talk:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    kinds = [kind for kind, _, _ in talk]
    yield "chat", {"id": f"{n:06d}", "image": image, "types": kinds, "conversations": turns}

    named = phrases(scene)
    for i, t in enumerate(scene.things):
        key = n * 10 + i
        thing = {"img_name": image, "bbox": t.box, "segment_id": key}
        names = [phrase for phrase, of in named if of is t]
        names = rng.sample(names, min(2, len(names)))
        said = [{"sent": name, "sent_id": key * 10 + j} for j, name in enumerate(names)]
        yield "refs", thing | {"sentences": said}
        said = [{"sent": f"a {t.full_name}", "sent_id": key}]
        yield "regions", thing | {"sentences": said}


def choice(scene, seed):
    """A question of multiple choice about a scene, a row of choice.tsv: a colour or a shape out of four."""
    rng = rng_of("choice", seed, scene.split, scene.number)
    possible = {"colour": list(COLOURS), "shape": list(SHAPES)}
    asked = [one for one in questions(scene, rng) if one[0] in possible]
    if not asked:
        return None
    kind, question, answer = rng.choice(asked)
    others = [text for text in possible[kind] if text != answer]
    options = dict(zip("ABCD", rng.sample([answer, *rng.sample(others, 3)], 4)))
    row = {"index": scene.number, "question": question, "category": kind, **options}
    row["answer"] = next(letter for letter, text in options.items() if text == answer)
    png = io.BytesIO()
    draw(scene).save(png, "PNG")
    return row | {"image": base64.b64encode(png.getvalue()).decode()}


def write_choices(path, seed, split, count):
    columns = ("index", "image", "question", *"ABCD", "answer", "category")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(filter(None, (choice(scene(seed, split, n), seed) for n in range(count))))


def write_split(folder, seed, count):
    """Pictures, one by one and in tars, and the annotations of a split's first `count` scenes."""
    split = folder.name
    (folder / "images").mkdir(parents=True)
    (folder / "shards").mkdir()
    files = defaultdict(list)
    for n in range(count):
        one = scene(seed, split, n)
        png = io.BytesIO()
        draw(one).save(png, "PNG")
        (folder / "images" / f"{n:06d}.png").write_bytes(png.getvalue())
        with open(folder / "shards" / f"{n // SHARD:05d}.tar", "ab") as tar:
            for ending, content in (("png", png.getvalue()), ("txt", caption(one).encode())):
                member = tarfile.TarInfo(f"{n:06d}.{ending}")
                member.size = len(content)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + content)
                tar.write(bytes(-len(content) % 512))  # members begin at multiples of 512
            if n + 1 == count or (n + 1) % SHARD == 0:
                tar.write(bytes(1024))  # the end mark
        for name, record in records(one, seed):
            files[name].append(record)
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


def made_as(out):
    """How the world at `out` was made, None where there is none: toy.json says that a world is complete."""
    with suppress(FileNotFoundError):
        return json.loads((out / "toy.json").read_text())


def write(out, seed=0, scenes=10_000):
    """The world at `out`, whole or not at all: written beside it and renamed. -> whether it had to be."""
    out = Path(out)
    made = {"seed": seed, "scenes": scenes, "version": 3}
    there = made_as(out)
    if there == made:
        return False
    if not there and out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: holds something that is not a toy world; name another --out")
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    for split in SPLITS:
        write_split(part / split, seed, scenes if split == "train" else min(500, scenes))
    write_choices(part / "heldout/choice.tsv", seed, "heldout", min(500, scenes))
    for name, (split, weights) in MIXTURES.items():
        write_mixture(part / f"{name}.toml", split, weights)
    (part / "toy.json").write_text(json.dumps(made))
    if made_as(out) not in (None, made):  # another world makes room
        old = part.with_name(f"{part.name}.old")
        with suppress(FileNotFoundError):  # another process may have moved it
            os.replace(out, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(part, out)
    except OSError:
        shutil.rmtree(part)
        if made_as(out) == made:
            return False  # another process has drawn it the while
        raise
    return True


def main():
    parser = Parser(__doc__)
    parser.flag("--out", str, "folder to write; default out/toy", "out/toy")
    parser.flag("--seed", int, "of all scenes; default 0", 0)
    most = "training scenes, and for each held-out set up to 500; default 10,000"
    parser.flag("--scenes", positive, most, 10_000)
    args = parser.parse_args()
    written = write(args.out, args.seed, args.scenes)
    print(f"{args.out}: {'written' if written else 'already there, unchanged'}")


if __name__ == "__main__":
    sys.exit(run(main))
