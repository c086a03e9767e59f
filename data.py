"""Records -> samples -> token ids and targets -> batches. How records are read from disk: formats.py.

    data = Data("recipes/stage2.toml", Tokenizer("vicuna-7b-v1.5"), image_size=448, visual=256, context=2048, batch=256)
    for micro_batches in data.batches(start=step, rank=rank, world=world, accum=4, workers=8): ...
    for item in data.samples("refcoco"): ...                 # in order, for evaluation

Names of dimensions: B rows, T tokens, N images, S pixels per side, V = P*P visual tokens per image.
"""
import ctypes
import dataclasses
import io
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageOps

from formats import HERE, BadInput, Record, clean, load_mixture, read_at, whole  # noqa: F401  (some passed on)
from model import IGNORE, IMAGE

MARK = "<image><ImageHere>"            # what a conversation's <image> becomes; LLaVA's own models want HERE alone
MEAN_COLOUR = (122, 116, 104)          # CLIP's mean in bytes: what pads a picture to a square
CROP_SCALE = (0.5, 1.0)                # share of the area that a random crop keeps
BUCKET = 16                            # T and the supervised count are rounded up to this: few shapes, 1% waste
WINDOW = 128                           # steps whose rows are sorted by length together; 1 keeps every batch mixed
ROUND = 4096                           # rows after which the mixture's shares are exact
METHOD = "fork" if sys.platform == "linux" else None       # of loader processes, whatever Python would do: a child of
#                                        the helper that newer Pythons fork from outlives a training that was killed
TRIES = 100                            # unreadable samples in a row before we give up
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")    # Pillow has more; one runs Ghostscript
PIXELS = 89_000_000                    # an image that claims more is a bomb or a mistake
warnings.simplefilter("ignore", Image.DecompressionBombWarning)        # Pillow warns where we refuse


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
        raise BadInput(f"{where}: cannot be read as an image ({why}); fetch it again or leave it out") from e


def peek(ref, where=""):
    """(path, offset, size) -> (image, its upright size). Reads the header alone."""
    path, offset, size = ref
    where = f"{where}: image {path}" if size < 0 else where
    with pillow(where):
        if size < 0 and not os.path.isfile(path): raise BadInput(f"{where}: is no file; mend or remove the record")
        image = Image.open(path if size < 0 else io.BytesIO(read_at(path, offset, size)), formats=KINDS)
        plain = image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr") and "transparency" not in image.info
        most = PIXELS if plain else PIXELS // 4                # the others take up to four copies on their way to RGB
        if image.width * image.height > most: raise BadInput(f"{where}: has over {most} pixels; shrink it")
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
    pad: bool = False                  # pad to a square with the mean colour, instead of squashing


TASKS = {   # the prompts of captioning and of region captions are not published: those two are ours
    "caption": Task(MARK + "Short caption:"),
    "vqa": Task(MARK + "Question:{} Short answer:", plain),
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


def encode_turns(tokenizer, turns, visual, context=math.inf):
    """(prompt, answer) turns -> tokens, targets, equally long and shifted: targets[t] is to be predicted at t.
    An answer of None ends the sequence after its prompt, ready for generation. Turns behind the context are left out,
    but for the one that shows that there are any."""
    ids, wanted = [], []
    for i, (text, answer) in enumerate(turns):
        asked = encode_prompt(tokenizer, text, visual, bos=i == 0)
        said = [] if answer is None else tokenizer.encode(answer) + [tokenizer.eos]
        ids += asked + said
        wanted += [IGNORE] * len(asked) + said
        if len(ids) > context + 1: break
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
    images = np.stack(pictures or [np.full((side, side, 3), 127, np.uint8)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)              # a view, channels last: nothing is turned
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


@contextmanager
def deaf():
    """SIGTERM and SIGINT are held back; from what is forked in here, for good."""
    if not hasattr(signal, "pthread_sigmask"): yield; return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try: yield
    finally: signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stay(worker):
    """A loader process outlives the signals that a terminal or a scheduler sends to all. It leaves when its parent
    does, which may have a step to finish; by itself it would wait for ever to write into a pipe that nobody reads."""
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)             # PR_SET_PDEATHSIG: this signal when the parent has gone
        if os.getppid() != multiprocessing.parent_process().pid: os._exit(1)       # it went before that line


class Data:
    """A mixture, ready to be trained on or evaluated. Every batch is a pure function of (seed, step): see rows."""
    def __init__(self, mixture, tokenizer, image_size, visual, context, batch=1, seed=0, train=True, image_mark=MARK,
                 bucket=BUCKET, window=WINDOW):
        self.sources = mixture if isinstance(mixture, list) else load_mixture(mixture, train)
        self.tokenizer, self.image_size, self.visual, self.context = tokenizer, image_size, visual, context
        self.batch, self.seed, self.train, self.image_mark = batch, seed, train, image_mark
        self.bucket, self.window = bucket, window
        self.bad = 0                                                   # samples that were replaced
        weights = np.array([s.weight or len(s) for s in self.sources], float)
        self.shares = np.maximum(1, np.floor(weights / weights.sum() * ROUND)).astype(int)     # rows of a ROUND
        self.shares[self.shares.argmax()] += ROUND - self.shares.sum()
        self.digest = zlib.crc32(self.shares)                          # of shares, records' lengths and 64 texts each
        self.lengths = [self.estimate(s) for s in range(len(self.sources))]
        self.drawn = None, None                                        # the window last drawn

    @property
    def counts(self): return {source.name: len(source) for source in self.sources}

    def estimate(self, s):
        """Tokens per sample, from bytes on disk by a line through 64 of them: enough to put like with like.
        Also the first look at a source: if none of the 64 can be read, it is said now."""
        source, seen, first = self.sources[s], [], None
        for number in np.unique(np.linspace(0, len(source) - 1, 64).astype(int)).tolist():
            try: tokens = self.text(source, number, 0)[0]
            except BadInput as e: first = first or e; continue
            self.digest = zlib.crc32(np.array(tokens), self.digest)
            seen.append((source.bytes[number], sum(t != IMAGE for t in tokens)))
        if not seen: raise first
        self.digest = zlib.crc32(source.bytes.astype(np.int64), self.digest)
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
        cut = np.argsort(length // (BUCKET // 2), kind="stable").reshape(self.window, self.batch)
        fine = np.argsort(length[cut], axis=1, kind="stable")          # within a batch exactly: for its micro-batches
        rows = np.stack((source, number), 1)[np.take_along_axis(cut, fine, axis=1)]
        return rows[np.random.default_rng((self.seed, 2, first)).permutation(self.window)]

    def text(self, source, number, step):
        """tokens, targets and (peeked picture, region) of a sample; no picture is decoded yet."""
        record = source.read(number)
        rng = np.random.default_rng((self.seed, 3, step, self.sources.index(source), number))
        answer = record.answers[rng.integers(len(record.answers))] if self.train else common(record.answers)
        views, size, region = [], None, WHOLE
        for ref in record.refs[:self.context // self.visual + 1]:
            image, size = peek(ref, record.where)
            region = random_region(size, rng) if self.train and source.crop else WHOLE
            if TASKS[source.task].pad: region = padded_region(size)
            views.append((image, region))
        turns = pose(record, source.task, answer, self.image_mark, size, region)
        tokens, targets = encode_turns(self.tokenizer, turns, self.visual, self.context)
        cut = truncate(tokens, self.context)
        if cut < len(tokens) and not self.train or all(t == IGNORE for t in targets[:cut]):
            raise BadInput(f"{record.where}: its tokens exceed the context of {self.context}; shorten it")
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
            except BadInput as e: bad.append(str(e)[:1000])
        raise BadInput(f"source '{source.name}': {n + 1} samples in a row cannot be read; the first: {bad[-n - 1]}")

    def micro_batch(self, key):
        """The Batch of (step, rank, world, micro, accum), or a BadInput: raised in a worker it would come with a
        traceback."""
        step, rank, world, micro, accum = key
        size, bad = self.batch // (world * accum), []
        rows = self.rows(step)[rank::world][micro * size:(micro + 1) * size].tolist()
        try: samples = [self.readable(self.sources[s], number, step, bad) for s, number in rows]
        except BadInput as e: return e
        return collate(samples, self.tokenizer.pad, self.visual, self.image_size, self.bucket, bad)

    __getitem__ = micro_batch                                          # a DataLoader takes it for a dataset

    def batches(self, start=0, steps=None, rank=0, world=1, accum=1, workers=0, pin=False, prefetch=2):
        """Per step, from `start` on, the list of this rank's `accum` micro-batches; forever if steps is None."""
        if self.batch % (world * accum):
            raise BadInput(f"--batch {self.batch} does not split into {world} ranks x {accum} micro-batches; change it")
        steps = itertools.count(start) if steps is None else range(start, start + steps)
        keys = ((step, rank, world, micro, accum) for step in steps for micro in range(accum))
        more = dict(prefetch_factor=prefetch, multiprocessing_context=METHOD) if workers else {}
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, sampler=keys, num_workers=workers, generator=torch.Generator(), worker_init_fn=stay,
            **more)
        micro = []
        with deaf(): loader = iter(loader)                     # no signal ends a loader before it can stay()
        for batch in loader:
            if isinstance(batch, BadInput): raise batch
            if pin: batch = batch.pin_memory()
            self.bad += len(batch.bad)
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
