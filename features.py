"""What the frozen ViT makes of a picture, kept on disk: `train.py --cache-features`, stages 1 and 3.

A picture whose features are there is neither opened nor seen by the ViT again. What is kept are the window means of the
normalised patches (adapter.PoolAdapter.fixed), which come before every weight that trains, in bf16. Fresh ones are
rounded to bf16 as well, so that a run's losses do not depend on when a picture was met first.

    features-HASH.index    an entry a picture: its key (0: none), its width and height, the checksum of its features
    features-HASH.bin      at the same place (P*P, Dv) bf16; a sparse file, as large as what has been met

HASH is of the ViT's weights, the image size, P and the arithmetic's dtype, so other weights never meet old features. A
picture is known by its file, its place in it, the file's size and time of change, and whether it is padded to a square.

    V = P*P visual tokens per image         Dv the ViT's width         N pictures of a batch, n of them not yet kept
"""
import fcntl
import hashlib
import json
import os
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data import TASKS, BadInput, Data, collate, peek, to_square, upright
from model import trains

ENTRY = np.dtype([("key", "<i8"), ("width", "<u4"), ("height", "<u4"), ("crc", "<u4"), ("unused", "<u4")])
VERSION = 1                            # of what is kept: another transform of pictures must count it up


def fingerprint(model, dtype):
    """Of all that decides what a picture becomes, read as the weights are before they are cast or moved."""
    norm = model.front.norm and model.front.norm.eps
    said = hashlib.blake2b(json.dumps([VERSION, asdict(model.config.vit), model.config.grid, norm, dtype]).encode())
    for name, p in model.vit.named_parameters():
        said.update(name.encode())
        said.update(p.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return said.hexdigest()[:16]


@dataclass
class Kept:
    """A picture of a sample: kept features (V, Dv), or the square that the ViT has still to see."""
    key: int
    size: tuple
    values: np.ndarray = None          # bf16 as int16
    square: np.ndarray = None


class Features:
    """The two files. Entries are found by hashing, the next free place on a collision; written under a lock, features
    first, and read without one: what is torn or damaged fails its checksum and counts as missing."""

    def __init__(self, folder, name, room, shape):
        self.args, self.shape, self.bytes = (folder, name, room, shape), shape, 2 * shape[0] * shape[1]
        self.path = Path(folder) / f"features-{name}-{room}"           # room: entries, twice the pictures there may be
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.index = os.open(f"{self.path}.index", os.O_RDWR | os.O_CREAT, 0o644)
            self.values = os.open(f"{self.path}.bin", os.O_RDWR | os.O_CREAT, 0o644)
            with self.locked():                                        # written and not left sparse: a full disk must
                missing = room * ENTRY.itemsize - os.fstat(self.index).st_size     # be said here, not by SIGBUS later
                if missing > 0: os.pwrite(self.index, bytes(missing), room * ENTRY.itemsize - missing)
        except OSError as e: self.wrong(e)
        self.entries = np.memmap(f"{self.path}.index", ENTRY, "r+", shape=(room,))
        self.used = int(np.count_nonzero(self.entries["key"]))

    def __reduce__(self): return Features, self.args

    def wrong(self, e):
        raise BadInput(f"--cache-features: {self.path} cannot be written ({e.strerror}); make room, name another "
                       "folder, or leave the flag out") from None

    @contextmanager
    def locked(self):                                                  # ranks of one machine share the files
        fcntl.flock(self.index, fcntl.LOCK_EX)
        try: yield
        finally: fcntl.flock(self.index, fcntl.LOCK_UN)

    def key(self, ref, pad):
        """63 bits that name a picture, or 0 where there is none: peek will say so."""
        path, offset, size = ref
        try: found = os.stat(path)
        except OSError: return 0
        named = repr((os.path.abspath(path), offset, size, found.st_size, found.st_mtime_ns, pad)).encode()
        return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big") >> 1 | 1

    def place(self, key):
        """Where the key is, or would be."""
        at = key % len(self.entries)
        while self.entries["key"][at] not in (0, key): at = (at + 1) % len(self.entries)
        return at

    def get(self, key):
        """(features, (width, height)) or None."""
        entry = self.entries[at := self.place(key)].copy()
        if not key or entry["key"] != key: return None
        values = os.pread(self.values, self.bytes, int(at) * self.bytes)
        if zlib.crc32(values) != entry["crc"]: return None
        return np.frombuffer(values, np.int16).reshape(self.shape), (int(entry["width"]), int(entry["height"]))

    def put(self, pictures, values):
        """pictures (n, 3): key, width, height; values (n, V, Dv) bf16."""
        values = values.cpu().contiguous().view(torch.int16).numpy()
        try:
            with self.locked():
                for (key, width, height), value in zip(pictures.tolist(), values):
                    if self.used > 0.9 * len(self.entries): return     # files that change leave old entries behind
                    at, said = self.place(key), value.tobytes()
                    done = os.pwrite(self.values, said, int(at) * self.bytes)
                    if done < len(said): raise OSError(28, "no space left")
                    self.used += self.entries["key"][at] == 0
                    self.entries[at] = key, width, height, zlib.crc32(said), 0
        except OSError as e: self.wrong(e)

    def complete(self, model, batch):
        """The features (N, V, Dv) of a batch on its device: the kept ones, and what the ViT says of the others."""
        features = batch.features.view(torch.bfloat16)
        if len(batch.images) == 0: return features
        with torch.no_grad(): fresh = model.fixed_features(batch.images).bfloat16()
        self.put(batch.pictures, fresh)
        return features.index_copy(0, batch.fresh, fresh)


class Remembering(Data):
    """A Data whose batches hold the features that are kept, and only the pictures whose features are not."""

    def __init__(self, features, *args, **more):
        self.features = features
        super().__init__(*args, **more)

    def look(self, source, ref, where):
        key = self.features.key(ref, TASKS[source.task].pad)
        if found := self.features.get(key): return Kept(key, found[1], values=found[0]), found[1]
        image, size = peek(ref, where)
        image.key, image.upright = key, size
        return image, size

    def sample(self, source, number, step):
        tokens, targets, views = self.text(source, number, step)
        return tokens, targets, [
            view if isinstance(view, Kept) else
            Kept(view.key, view.upright, square=to_square(upright(view, self.image_size), self.image_size, region))
            for view, region in views]

    def micro_batch(self, key, room=None):
        step, rank, world, micro, accum = key
        size, bad, S = self.batch // (world * accum), [], self.image_size
        rows = self.rows(step)[rank::world][micro * size:(micro + 1) * size].tolist()
        try: samples = [self.readable(self.sources[s], number, step, bad) for s, number in rows]
        except BadInput as e: return e
        pictures = [picture for _, _, row in samples for picture in row]
        fresh = [n for n, picture in enumerate(pictures) if picture.values is None]
        if room is None or len(fresh) > len(room): room = np.empty((len(fresh), S, S, 3), np.uint8)
        for n, place in enumerate(fresh): room[n] = pictures[place].square
        counts = np.empty((len(pictures), 0, 0, 3), np.uint8)          # collate only counts them
        batch = collate(samples, self.tokenizer.pad, self.visual, S, self.bucket, bad, counts)
        values = np.zeros((max(1, len(pictures)), *self.features.shape), np.int16)     # text alone: zeros go nowhere
        for n, picture in enumerate(pictures):
            if picture.values is not None: values[n] = picture.values
        named = np.array([(pictures[n].key, *pictures[n].size) for n in fresh], np.int64).reshape(-1, 3)
        return replace(batch, images=torch.from_numpy(room[:len(fresh)]).permute(0, 3, 1, 2),
                       features=torch.from_numpy(values), fresh=torch.tensor(fresh, dtype=torch.int64),
                       pictures=torch.from_numpy(named))


def remembering(run, sources, **more):
    """The Data of a run with --cache-features, or a sentence that says why it cannot be."""
    model, s = run.model, run.s
    if trains("vit.cls", s["stage"], s["tune"], s["branch"]):
        raise BadInput("--cache-features: stage 2 trains the ViT, so what it makes of a picture changes; leave it out")
    if cropped := [source.name for source in sources if source.crop]:
        raise BadInput(f"--cache-features: source '{cropped[0]}' is cropped at random, so its pictures never look the "
                       "same; set `crop = false` for it, or leave the flag out")
    if model.config.adapter == "resampler":
        raise BadInput("--cache-features: a resampler looks at all patches through weights that train, so nothing of "
                       "its work can be kept; leave the flag out, or take --adapter pool")
    pictures = sum(int(len(s) if s.marks is None else np.sum(s.marks)) for s in sources)
    shape = model.config.visual_tokens, model.config.vit.width
    name = fingerprint(model, s["dtype"])
    features = Features(run.args.cache_features, name, 2 * pictures + 64, shape)
    if run.rank == 0: print(f"features are kept in {features.path}.bin, of {features.used} pictures so far")
    return Remembering(features, sources, run.tokenizer, **more)
