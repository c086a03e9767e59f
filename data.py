"""Records -> samples -> token ids and targets -> batches. How records are read from disk: formats/.

    data = Data("recipes/stage2.toml", Tokenizer("vicuna-7b-v1.5"), image_size=448, visual=256, context=2048, batch=256)
    for micro_batches in data.batches(start=step, rank=rank, world=world, accum=4, workers=8): ...
    for item in data.samples("refcoco"): ...                 # in order, for evaluation

Names of dimensions: B rows, T tokens, N images, S pixels per side, V = P*P visual tokens per image.
"""

import itertools
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from formats import load_mixture
from formats.mixture import BOXED
from formats.pictures import (
    WHOLE,
    fractions,
    move_box,
    not_corners,
    padded_region,
    peek,
    random_region,
    to_square,
    upright,
)
from model import IGNORE, IMAGE
from support.errors import BadInput
from support.processes import LOADERS, follow_the_trainer, held_back
from text import encode_turns, truncate
from text.boxes import format_box
from text.templates import MARK, TASKS, TEMPLATES, chat_turn, plain_caption, prompt

BUCKET = 16  # T and the supervised count are rounded up to this: few shapes, 1% waste
WINDOW = 128  # steps whose rows are sorted by length together; 1 keeps every batch mixed
ROUND = 4096  # rows after which the mixture's shares are exact
LOOKED_AT = 64  # samples of a source that are read at the start
TRIES = 100  # unreadable samples in a row before we give up


def some(count, limit=None):
    """Which of so many records are looked at: a random sample, always the same, in order; all without a limit."""
    if not limit or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, limit, replace=False).tolist())


def most_common(answers):
    return Counter(answers).most_common(1)[0][0] if answers else ""


def to_turns(record, task, answer, image_mark, template, views):
    """A record as (prompt, answer) turns; its box as it lies in the region that its picture's view shows."""
    if task == "chat":
        clean = TEMPLATES[template].clean
        return [
            (chat_turn(q.replace("<image>", image_mark), template, first=n == 0), clean(a))
            for n, (q, a) in enumerate(record.turns)
        ]
    if task == "caption":
        return [(prompt(task), plain_caption(answer))]
    if record.box is None:
        return [(prompt(task, record.text), answer)]
    [(picture, region)] = views
    box = move_box(fractions(record.box, picture.size, record.where), region)
    if task == "ground":
        return [(prompt(task, record.text), format_box(box))]
    return [(prompt(task, format_box(box)), record.text)]


def boxes_of(source, numbers):
    """(box, size of its picture) of these records, as far as they can be read."""
    found = []
    for number in numbers:
        with suppress(BadInput, TypeError, ValueError):
            record = source.read(number)
            box = [float(v) for v in record.box]
            found.append((box, peek(record.refs[0], record.where).size))
    return [(box, size) for box, size in found if len(box) == 4]


@dataclass
class Batch:
    images: torch.Tensor  # (N,3,S,S) uint8; one grey picture if the rows have none
    tokens: torch.Tensor  # (B,T) int64, padded on the right
    targets: torch.Tensor  # (B,T) int64, IGNORE where nothing is asked
    image_positions: torch.Tensor  # (N*V,) int64, b*T + t of every placeholder; -1: nowhere
    target_positions: torch.Tensor  # (M,) int64, b*T + t of every target, padded with -1
    supervised: int  # how many targets count
    bad: list  # a sentence for every sample that was replaced

    def with_tensors(self, change):
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    def to(self, device, non_blocking=False):
        return self.with_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self.with_tensors(torch.Tensor.pin_memory)


def round_up(n, bucket):
    return -(-max(1, n) // bucket) * bucket


def collate(samples, pad, visual, image_size, bucket=BUCKET, bad=()):
    """samples: (tokens, targets, [uint8 (S,S,3), ...]) per row -> Batch."""
    B = len(samples)
    T = round_up(max(len(row) for row, _, _ in samples), bucket)
    tokens = np.full((B, T), pad)
    targets = np.full((B, T), IGNORE)
    pictures = []
    for b, (row_tokens, row_targets, row_pictures) in enumerate(samples):
        tokens[b, : len(row_tokens)] = row_tokens
        targets[b, : len(row_targets)] = row_targets
        pictures += row_pictures
    image_positions = np.flatnonzero(tokens == IMAGE)
    assert len(image_positions) == len(pictures) * visual, "placeholders do not match the images"
    if not pictures:  # the ViT and the adapter run in every step, so there is always a picture
        pictures = [np.full((image_size, image_size, 3), 127, np.uint8)]
        image_positions = np.full(visual, -1)
    supervised = np.flatnonzero(targets != IGNORE)
    target_positions = np.full(round_up(len(supervised), bucket), -1)
    target_positions[: len(supervised)] = supervised
    images = np.stack(pictures).transpose(0, 3, 1, 2)  # (N,3,S,S), a view
    arrays = (images, tokens, targets, image_positions, target_positions)
    return Batch(*map(torch.from_numpy, arrays), len(supervised), list(bad))


def mix(x):
    """splitmix64's finaliser: 64 well-stirred bits from any 64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(places, n, keys):
    """Where each of these places of 0..n-1 stands in the permutation that its key names.

    A Feistel network of six rounds on the next power of four, walked until it lands below n. Nothing is
    stored: any place of any epoch costs the same."""
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    places = places.astype(np.uint64)
    todo = np.ones(len(places), bool)
    while todo.any():
        left = places[todo] >> half
        right = places[todo] & low
        for turn in range(6):
            stirred = mix(right + mix(keys[todo] + np.uint64(turn)))
            left, right = right, left ^ (stirred & low)
        places[todo] = (left << half) | right
        todo &= places >= n
    return places.astype(np.int64)


def estimate_length(sizes, numbers, counts):
    """Tokens of text of all samples, from their bytes on disk and the token counts of some of them.

    A line through 64 samples is enough: the estimate only decides which rows share a batch, so an error
    of some tokens costs some padding and nothing else."""
    some = sizes[numbers]
    slope, base = 0, counts[0]
    if len(np.unique(some)) > 2:
        slope, base = np.polyfit(some.astype(float), np.array(counts, float), 1)
    return base + slope * sizes


@dataclass(eq=False)
class Data:
    """A mixture, ready to be trained on or evaluated. Every batch is a pure function of (seed, step): see rows."""

    mixture: object  # a TOML file, or the opened sources
    tokenizer: object
    image_size: int
    visual: int  # V
    context: int  # T at most
    batch: int = 1
    seed: int = 0
    train: bool = True
    image_mark: str = MARK
    bucket: int = BUCKET
    window: int = WINDOW

    def __post_init__(self):
        self.sources = self.mixture
        if not isinstance(self.mixture, list):
            self.sources = load_mixture(self.mixture, self.train)
        self.bad = 0  # samples that were replaced
        self.drawn = (None, None)  # the window last drawn, and its rows
        weights = np.array([source.weight or len(source) for source in self.sources], float)
        shares = np.floor(weights / weights.sum() * ROUND).astype(int)
        self.shares = np.maximum(1, shares)  # rows of a ROUND
        self.shares[self.shares.argmax()] += ROUND - self.shares.sum()
        self.digest = zlib.crc32(self.shares)  # of shares, records' lengths and 64 texts each
        self.foreign = {}  # share of each source's text that the tokenizer has no words for
        self.lengths = []  # tokens of each source's samples, estimated
        for source in self.sources:
            texts = self.first_look(source)
            ids = [token for tokens in texts.values() for token in tokens if token != IMAGE]
            self.foreign[source.name] = self.tokenizer.foreign(ids)
            for tokens in texts.values():
                self.digest = zlib.crc32(np.array(tokens), self.digest)
            self.digest = zlib.crc32(source.lengths.astype(np.int64), self.digest)
            counts = [len(tokens) - tokens.count(IMAGE) for tokens in texts.values()]
            text = estimate_length(source.lengths, list(texts), counts)
            lengths = text + source.images_each * self.visual
            self.lengths.append(lengths.clip(1, self.context).astype(np.int32))

    @property
    def counts(self):
        return {source.name: len(source) for source in self.sources}

    def first_look(self, source):
        """{number: tokens} of 64 samples, less those that cannot be read; if none can, that is raised."""
        texts, problems = {}, []
        numbers = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist()
        for number in numbers:
            try:
                texts[number], _, _ = self.text(source, number, 0)
            except BadInput as e:
                problems.append(e)
        if source.task in BOXED and (seem := not_corners(boxes_of(source, numbers))):
            raise BadInput(
                f"{source.toml}: source '{source.name}': its boxes are not all [x1, y1, x2, y2] in pixels of "
                f"their pictures and seem to be {seem}"
            )
        if not texts:
            raise problems[0]
        return texts

    def rows(self, step):
        """(B,2) of (source, number): the global batch of a step, short rows first, from (seed, step) alone."""
        window, slot = divmod(step, self.window)
        if self.drawn[0] != window:
            first = window * self.window * self.batch
            self.drawn = window, self.sort_by_length(self.draw_rows(first), first)
        return self.drawn[1][slot]

    def draw_rows(self, first):
        """(window*B,2) of (source, number): the rows from `first` on of an endless sequence.

        The mixture is dealt out in rounds of ROUND rows, each a permutation of the sources by their shares, so
        that shares are exact. Each epoch of a source is a permutation of it: every sample once."""
        count = self.window * self.batch
        begin = first // ROUND
        end = -(-(first + count) // ROUND)
        deck = np.repeat(np.arange(len(self.shares)), self.shares)
        rounds = [
            np.random.default_rng((self.seed, 1, n)).permutation(deck) for n in range(begin, end)
        ]
        sources = np.concatenate(rounds)
        numbers = np.empty_like(sources)
        for s, share in enumerate(self.shares):
            mine = np.flatnonzero(sources == s)
            turn = begin * share + np.arange(len(mine))  # how many rows the source has had before
            size = len(self.sources[s])
            epoch, place = np.divmod(turn, size)
            seed = mix(np.array([self.seed + 1], np.uint64))
            keys = mix(seed + np.uint64(s << 40) + epoch.astype(np.uint64))
            numbers[mine] = shuffled(place, size, keys)
        return np.stack((sources, numbers), 1)[first - begin * ROUND :][:count]

    def sort_by_length(self, rows, first):
        """The same rows as (window,B,2): batches of like length, in an order that is shuffled again.

        Rows are padded to the longest of their batch: mixed, a third of the tokens would be padding."""
        length = np.array([self.lengths[s][number] for s, number in rows.tolist()])
        coarse = length // (BUCKET // 2)  # as far as the padding feels it; ties stay mixed
        order = np.argsort(coarse, kind="stable").reshape(self.window, self.batch)
        within = np.argsort(length[order], axis=1, kind="stable")  # exactly, for micro-batches
        batches = rows[np.take_along_axis(order, within, axis=1)]
        return batches[np.random.default_rng((self.seed, 2, first)).permutation(self.window)]

    def text(self, source, number, step):
        """(tokens, targets, views) of a sample; a view is a peeked picture and the region of it to be shown."""
        record = source.read(number)
        rng = np.random.default_rng((self.seed, 3, step, self.sources.index(source), number))
        if self.train:
            answer = record.answers[rng.integers(len(record.answers))]
        else:
            answer = most_common(record.answers)
        views = []
        for ref in record.refs[: self.context // self.visual + 1]:
            picture = peek(ref, record.where)
            region = WHOLE
            if TASKS[source.task].pad:
                region = padded_region(picture.size)
            elif self.train and source.crop:
                region = random_region(picture.size, rng)
            views.append((picture, region))
        turns = to_turns(
            record, source.task, answer, self.image_mark, self.tokenizer.template, views
        )
        tokens, targets = encode_turns(self.tokenizer, turns, self.visual, self.context)
        cut = truncate(tokens, self.context)
        unanswered = all(target == IGNORE for target in targets[:cut])
        if unanswered or (cut < len(tokens) and not self.train):
            raise BadInput(
                f"{record.where}: its tokens exceed the context of {self.context}; shorten it"
            )
        tokens = tokens[:cut]
        return tokens, targets[:cut], views[: tokens.count(IMAGE) // self.visual]

    def sample(self, source, number, step):
        """(tokens, targets, [uint8 (S,S,3), ...]) of one sample as a step sees it."""
        tokens, targets, views = self.text(source, number, step)
        side = self.image_size
        pictures = [to_square(upright(picture, side), side, region) for picture, region in views]
        return tokens, targets, pictures

    def readable_sample(self, source, number, step, bad):
        """The sample, or the next readable one of its source: the choice depends on the number alone."""
        problems = []
        for n in range(min(TRIES, len(source))):
            try:
                return self.sample(source, (number + n) % len(source), step)
            except BadInput as e:
                problems.append(str(e)[:1000])
                bad.append(problems[-1])
        raise BadInput(
            f"source '{source.name}': {len(problems)} samples in a row cannot be read; "
            f"the first: {problems[0]}"
        )

    def __getitem__(self, key):
        """The Batch of a key (step, rank, world, micro, accum): what a DataLoader asks of a dataset."""
        step, rank, world, micro, accum = key
        size = self.batch // (world * accum)
        rows = self.rows(step)[rank::world][micro * size :][:size]
        bad = []
        samples = [
            self.readable_sample(self.sources[s], number, step, bad) for s, number in rows.tolist()
        ]
        return collate(samples, self.tokenizer.pad, self.visual, self.image_size, self.bucket, bad)

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
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,  # a key is a batch already
            sampler=keys,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin,
            worker_init_fn=follow_the_trainer,
            multiprocessing_context=LOADERS if workers else None,
            generator=torch.Generator(),  # the loader draws a seed that nobody needs: not from ours
        )
        with held_back():  # no signal ends a loader before it can ignore it
            stream = iter(loader)
        while micro_batches := list(itertools.islice(stream, accum)):
            self.bad += sum(len(batch.bad) for batch in micro_batches)
            yield micro_batches

    def record(self, source, number):
        """A record for evaluation: with its pictures whole, and turns that are prompts and answers."""
        record = source.read(number)
        pictures = [peek(ref, record.where) for ref in record.refs]
        views = [(picture, WHOLE) for picture in pictures]
        answer = most_common(record.answers)
        turns = to_turns(
            record, source.task, answer, self.image_mark, self.tokenizer.template, views
        )
        return replace(
            record,
            source=source.name,
            task=source.task,
            number=number,
            prompt=turns[0][0],
            turns=turns,
            images=[upright(picture) for picture in pictures],
            size=pictures[0].size if pictures else None,
        )

    def samples(self, name=None):
        """All records in order, of one source if named. What cannot be read is raised, never left out."""
        for source in self.sources:
            if name in (None, source.name):
                for number in range(len(source)):
                    yield self.record(source, number)
