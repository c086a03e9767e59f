"""Records -> samples -> token ids and targets -> batches. How records are read from disk: formats.py.

    data = Data("recipes/stage2.toml", Tokenizer("vicuna-7b-v1.5"), image_size=448, visual=256, context=2048, batch=256)
    for micro_batches in data.batches(start=step, rank=rank, world=world, accum=4, workers=8): ...
    for item in data.samples("refcoco"): ...                 # in order, for evaluation

Names of dimensions: B rows, T tokens, N images, S pixels per side, V = P*P visual tokens per image.
"""

import dataclasses
import itertools
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from formats.mixture import load_mixture
from formats.pictures import (
    WHOLE,
    fractions,
    move_box,
    padded_region,
    peek,
    random_region,
    to_square,
    upright,
)
from model import IGNORE, IMAGE
from support.errors import BadInput
from support.processes import METHOD, deaf, stay
from text.boxes import format_box
from text.templates import MARK, SYSTEM, TASKS, chat_turn, plain, prompt
from text.tokenizer import encode_turns, truncate

BUCKET = 16  # T and the supervised count are rounded up to this: few shapes, 1% waste

WINDOW = 128  # steps whose rows are sorted by length together; 1 keeps every batch mixed

ROUND = 4096  # rows after which the mixture's shares are exact

TRIES = 100  # unreadable samples in a row before we give up


def pose(record, task, answer, mark, size=None, region=WHOLE):
    """A record as the (prompt, answer) turns that a model reads; its box as it lies in `region` of the image."""
    if task == "chat":
        turns = [
            (chat_turn(question.replace("<image>", mark)), said) for question, said in record.turns
        ]
        return [(SYSTEM + turns[0][0], turns[0][1])] + turns[1:]
    if task == "caption":
        return [(prompt(task), plain(answer, " "))]
    if task == "vqa":
        return [(prompt(task, record.text), answer)]
    box = format_box(move_box(fractions(record.box, size, record.where), region))
    return (
        [(prompt(task, record.text), box)]
        if task == "ground"
        else [(prompt(task, box), record.text)]
    )


# ---- batches ---------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    images: torch.Tensor  # (N,3,S,S) uint8; one grey picture if the rows have none
    tokens: torch.Tensor  # (B,T) int64, padded on the right
    targets: torch.Tensor  # (B,T) int64, IGNORE where nothing is asked
    image_at: torch.Tensor  # (N*V,) int64, b*T + t of every placeholder; -1 for the grey picture
    target_at: torch.Tensor  # (M,) int64, b*T + t of every target, padded with -1
    supervised: int  # how many targets count
    bad: list  # a sentence for every sample that was replaced

    def each(self, do):
        return dataclasses.replace(
            self, **{k: do(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        )

    def to(self, device, non_blocking=False):
        return self.each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self.each(torch.Tensor.pin_memory)


def collate(samples, pad, visual, side, bucket=BUCKET, bad=()):
    """samples: (tokens, targets, [uint8 (S,S,3), ...]) per row -> Batch."""
    up = lambda n: -(-max(1, n) // bucket) * bucket
    B, T = len(samples), up(max(len(tokens) for tokens, _, _ in samples))
    tokens, targets = np.full((B, T), pad), np.full((B, T), IGNORE)
    for b, (ids, wanted, _) in enumerate(samples):
        tokens[b, : len(ids)], targets[b, : len(ids)] = ids, wanted
    pictures = [picture for _, _, row in samples for picture in row]
    images = np.stack(pictures or [np.full((side, side, 3), 127, np.uint8)])
    images = torch.from_numpy(images).permute(
        0, 3, 1, 2
    )  # a view, channels last: nothing is turned
    image_at = np.flatnonzero(tokens == IMAGE) if pictures else np.full(visual, -1)
    assert len(image_at) == len(images) * visual, (
        f"{len(image_at)} placeholders for {len(images)} images x {visual}"
    )
    wanted = np.flatnonzero(targets != IGNORE)
    target_at = np.full(up(len(wanted)), -1)
    target_at[: len(wanted)] = wanted
    tensors = [
        torch.from_numpy(a.astype(np.int64, copy=False))
        for a in (tokens, targets, image_at, target_at)
    ]
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
        for turn in range(6):
            left, right = right, left ^ (mix(right + mix(key[todo] + np.uint64(turn))) & low)
        i[todo] = (left << half) | right
        todo &= i >= n
    return i.astype(np.int64)


class Data:
    """A mixture, ready to be trained on or evaluated. Every batch is a pure function of (seed, step): see rows."""

    def __init__(
        self,
        mixture,
        tokenizer,
        image_size,
        visual,
        context,
        batch=1,
        seed=0,
        train=True,
        image_mark=MARK,
        bucket=BUCKET,
        window=WINDOW,
    ):
        self.sources = mixture if isinstance(mixture, list) else load_mixture(mixture, train)
        self.tokenizer, self.image_size, self.visual, self.context = (
            tokenizer,
            image_size,
            visual,
            context,
        )
        self.batch, self.seed, self.train, self.image_mark = batch, seed, train, image_mark
        self.bucket, self.window = bucket, window
        self.bad = 0  # samples that were replaced
        weights = np.array([s.weight or len(s) for s in self.sources], float)
        self.shares = np.maximum(1, np.floor(weights / weights.sum() * ROUND)).astype(
            int
        )  # rows of a ROUND
        self.shares[self.shares.argmax()] += ROUND - self.shares.sum()
        self.digest = zlib.crc32(self.shares)  # of shares, records' lengths and 64 texts each
        self.lengths = [self.estimate(s) for s in range(len(self.sources))]
        self.drawn = None, None  # the window last drawn

    @property
    def counts(self):
        return {source.name: len(source) for source in self.sources}

    def estimate(self, s):
        """Tokens per sample, from bytes on disk by a line through 64 of them: enough to put like with like.
        Also the first look at a source: if none of the 64 can be read, it is said now."""
        source, seen, first = self.sources[s], [], None
        for number in np.unique(np.linspace(0, len(source) - 1, 64).astype(int)).tolist():
            try:
                tokens = self.text(source, number, 0)[0]
            except BadInput as e:
                first = first or e
                continue
            self.digest = zlib.crc32(np.array(tokens), self.digest)
            seen.append((source.bytes[number], sum(t != IMAGE for t in tokens)))
        if not seen:
            raise first
        self.digest = zlib.crc32(source.bytes.astype(np.int64), self.digest)
        slope, base = (
            np.polyfit(*np.array(seen, float).T, 1) if len(dict(seen)) > 2 else (0, seen[0][1])
        )
        images = 1 if source.marks is None else source.marks
        return (
            (base + slope * source.bytes + images * self.visual)
            .clip(1, self.context)
            .astype(np.int32)
        )

    def rows(self, step):
        """(batch, 2) of (source, number): the global batch of a step, short rows first, from (seed, step) alone.

        Rows are drawn by the mixture, `window` steps at a time. Those are sorted by length, as far as the padding feels
        it, and cut into batches, whose order is then shuffled. Each epoch of a source is a permutation of it."""
        which, slot = divmod(step, self.window)
        if self.drawn[0] != which:
            self.drawn = which, self.draw(which * self.window * self.batch)
        return self.drawn[1][slot]

    def draw(self, first):
        count, turn = self.window * self.batch, first // ROUND
        pool = np.repeat(np.arange(len(self.shares)), self.shares)
        rounds = range(turn, (first + count - 1) // ROUND + 1)
        source = np.concatenate(
            [np.random.default_rng((self.seed, 1, r)).permutation(pool) for r in rounds]
        )
        nth = np.empty_like(source)  # how many of its source came before, ever
        for s, share in enumerate(self.shares):
            at = np.flatnonzero(source == s)
            nth[at] = turn * share + np.arange(len(at))
        source, nth = (a[first - turn * ROUND :][:count] for a in (source, nth))
        number, length = np.empty(count, np.int64), np.empty(count, np.int64)
        for s, lengths in enumerate(self.lengths):
            mine = np.flatnonzero(source == s)
            epoch, place = np.divmod(nth[mine], len(lengths))
            key = mix(
                mix(np.array([self.seed + 1], np.uint64))
                + np.uint64(s << 40)
                + epoch.astype(np.uint64)
            )
            number[mine] = shuffled(place, len(lengths), key)
            length[mine] = lengths[number[mine]]
        cut = np.argsort(length // (BUCKET // 2), kind="stable").reshape(self.window, self.batch)
        fine = np.argsort(
            length[cut], axis=1, kind="stable"
        )  # within a batch exactly: for its micro-batches
        rows = np.stack((source, number), 1)[np.take_along_axis(cut, fine, axis=1)]
        return rows[np.random.default_rng((self.seed, 2, first)).permutation(self.window)]

    def text(self, source, number, step):
        """tokens, targets and (peeked picture, region) of a sample; no picture is decoded yet."""
        record = source.read(number)
        rng = np.random.default_rng((self.seed, 3, step, self.sources.index(source), number))
        answer = (
            record.answers[rng.integers(len(record.answers))]
            if self.train
            else common(record.answers)
        )
        views, size, region = [], None, WHOLE
        for ref in record.refs[: self.context // self.visual + 1]:
            image, size = peek(ref, record.where)
            region = random_region(size, rng) if self.train and source.crop else WHOLE
            if TASKS[source.task].pad:
                region = padded_region(size)
            views.append((image, region))
        turns = pose(record, source.task, answer, self.image_mark, size, region)
        tokens, targets = encode_turns(self.tokenizer, turns, self.visual, self.context)
        cut = truncate(tokens, self.context)
        if cut < len(tokens) and not self.train or all(t == IGNORE for t in targets[:cut]):
            raise BadInput(
                f"{record.where}: its tokens exceed the context of {self.context}; shorten it"
            )
        return tokens[:cut], targets[:cut], views[: tokens[:cut].count(IMAGE) // self.visual]

    def sample(self, source, number, step):
        """(tokens, targets, [uint8 (S,S,3), ...]) of one sample as a step sees it."""
        tokens, targets, views = self.text(source, number, step)
        side = self.image_size
        return (
            tokens,
            targets,
            [to_square(upright(image, side), side, region) for image, region in views],
        )

    def readable(self, source, number, step, bad):
        """The sample, or the next readable one of its source: the choice depends on the number alone."""
        for n in range(min(TRIES, len(source))):
            try:
                return self.sample(source, (number + n) % len(source), step)
            except BadInput as e:
                bad.append(str(e)[:1000])
        raise BadInput(
            f"source '{source.name}': {n + 1} samples in a row cannot be read; the first: {bad[-n - 1]}"
        )

    def micro_batch(self, key):
        """The Batch of (step, rank, world, micro, accum), or a BadInput: raised in a worker it would come with a
        traceback."""
        step, rank, world, micro, accum = key
        size, bad = self.batch // (world * accum), []
        rows = self.rows(step)[rank::world][micro * size : (micro + 1) * size].tolist()
        try:
            samples = [self.readable(self.sources[s], number, step, bad) for s, number in rows]
        except BadInput as e:
            return e
        return collate(samples, self.tokenizer.pad, self.visual, self.image_size, self.bucket, bad)

    __getitem__ = micro_batch  # a DataLoader takes it for a dataset

    def batches(
        self, start=0, steps=None, rank=0, world=1, accum=1, workers=0, pin=False, prefetch=2
    ):
        """Per step, from `start` on, the list of this rank's `accum` micro-batches; forever if steps is None."""
        if self.batch % (world * accum):
            raise BadInput(
                f"--batch {self.batch} does not split into {world} ranks x {accum} micro-batches; change it"
            )
        steps = itertools.count(start) if steps is None else range(start, start + steps)
        keys = ((step, rank, world, micro, accum) for step in steps for micro in range(accum))
        more = dict(prefetch_factor=prefetch, multiprocessing_context=METHOD) if workers else {}
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            generator=torch.Generator(),
            worker_init_fn=stay,
            **more,
        )
        micro = []
        with deaf():
            loader = iter(loader)  # no signal ends a loader before it can stay()
        for batch in loader:
            if isinstance(batch, BadInput):
                raise batch
            if pin:
                batch = batch.pin_memory()
            self.bad += len(batch.bad)
            micro.append(batch)
            if len(micro) == accum:
                yield micro
                micro = []

    def samples(self, name=None, rank=0, world=1, limit=None):
        """Records in order, for evaluation, of one source if named. What cannot be read is raised, never left out."""
        for source in self.sources:
            if name not in (None, source.name):
                continue
            for number in range(rank, min(len(source), limit or len(source)), world):
                record = source.read(number)
                pictures = [peek(ref, record.where) for ref in record.refs]
                size = pictures[0][1] if pictures else None
                turns = pose(record, source.task, common(record.answers), self.image_mark, size)
                yield dataclasses.replace(
                    record,
                    source=source.name,
                    task=source.task,
                    number=number,
                    prompt=turns[0][0],
                    turns=turns,
                    images=[upright(image) for image, _ in pictures],
                    size=size,
                )


def common(answers):
    return Counter(answers).most_common(1)[0][0] if answers else ""
