"""A million records opened and read at random, 200,000 rows of parquet too, and the loader against a bare Pillow loop."""

import io
import json
import multiprocessing
import os
import random
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from data import Data
from formats import load_mixture
from text import Tokenizer
from tools.measure import cpu_seconds, seconds

READS = 20_000


def million(folder, records=1_000_000, tars=200, images=1000):
    """A JSONL of a million LLaVA-like records, 200 tars of 1,000 images, 20 parquet files of 10,000 rows in
    groups of 100, as the hub has them, and the mixture that names them."""
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 40).convert("RGB").save(picture, "JPEG")
    with open(folder / "talk.jsonl", "w") as file:
        for i in range(records):
            said = [
                {"from": "human", "value": f"question {i} " * (1 + i % 7)},
                {"from": "gpt", "value": "an answer of some words " * (1 + i % 11)},
            ]
            file.write(json.dumps({"id": str(i), "conversations": said}) + "\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(images):
            for ending, content in (("jpg", picture.getvalue()), ("txt", f"caption {i}".encode())):
                member = tarfile.TarInfo(f"{i:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for i in range(1, tars):
        shutil.copy(folder / "0.tar", folder / f"{i}.tar")
    import pyarrow
    from pyarrow import parquet

    image = {"bytes": picture.getvalue(), "path": None}
    texts = [{"user": "question " * (1 + i % 7), "assistant": "words " * 9} for i in range(10_000)]
    rows = {"images": [[image]] * 10_000, "texts": [[text] for text in texts]}
    parquet.write_table(pyarrow.table(rows), folder / "0.parquet", row_group_size=100)
    for i in range(1, 20):
        shutil.copy(folder / "0.parquet", folder / f"{i}.parquet")
    (folder / "mix.toml").write_text("""[[source]]
name = "talk"
format = "conversations"
annotations = "talk.jsonl"
[[source]]
name = "tars"
format = "caption-shards"
shards = "*.tar"
[[source]]
name = "parquet"
format = "parquet"
files = "*.parquet"
""")
    return folder / "mix.toml"


def own_memory():
    """MB that this process shares with no other: what reading has copied of its parent's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def read_many(source, seed, out):
    """A worker's life: random reads; its memory after 200 of them, and at the end."""
    rng = random.Random(seed)
    for _ in range(200):
        source.read(rng.randrange(len(source)))
    before = own_memory()
    for _ in range(READS):
        source.read(rng.randrange(len(source)))
    out.put((before, own_memory()))


def records(folder):
    """Open twice, read at random, watch the memory of four workers."""
    toml = million(folder)
    found = {}
    for name in ("first open", "second open"):
        start, cpu = time.perf_counter(), time.process_time()
        sources = load_mixture(toml)
        found[f"{name}, s"] = time.perf_counter() - start
        found[f"{name}, CPU s"] = time.process_time() - cpu
    fork = multiprocessing.get_context("fork")
    for source in sources:
        rng = random.Random(0)
        numbers = [rng.randrange(len(source)) for _ in range(READS)]
        times = sorted(seconds(lambda n=n, source=source: source.read(n)) for n in numbers)
        found[f"{source.name}, records"] = len(source)
        found[f"{source.name}, read ms"] = 1e3 * sum(times) / READS
        found[f"{source.name}, read ms, p99"] = 1e3 * times[-READS // 100]
        out = fork.SimpleQueue()
        workers = [fork.Process(target=read_many, args=(source, i, out)) for i in range(4)]
        for worker in workers:
            worker.start()
        before, after = map(sum, zip(*(out.get() for _ in workers)))
        for worker in workers:
            worker.join()
        found[f"{source.name}, 4 workers' own MB, 200 reads"] = before
        found[f"{source.name}, 4 workers' own MB, {READS} more"] = after
    return found


def photographs(folder, count):
    """Smooth shapes and some grain, about COCO's 100 KB, with captions. -> their paths, the mixture"""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images, captions = [], []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC))
        grainy = (smooth + rng.normal(0, 6, (480, 640, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"images/{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg"})
        captions.append({"image_id": i, "caption": f"a picture with number {i} on it"})
    notes = {"images": images, "annotations": captions}
    (folder / "captions.json").write_text(json.dumps(notes))
    (folder / "mix.toml").write_text("""[[source]]
name = "captions"
format = "coco-caption"
annotations = "captions.json"
images = "images"
""")
    return [folder / f"images/{i}.jpg" for i in range(count)], folder / "mix.toml"


def bare(path, side):
    """What anyone writes first: open, decode, resize; nothing else."""
    with Image.open(path) as image:
        image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def rates(data, paths, workers, repeat=5):
    """Images per second of the bare loop and of the loader, medians, taken in turns.

    Without workers by CPU seconds, which do not mind other processes; with them by wall seconds, which do."""
    clock = seconds if workers else cpu_seconds
    jobs = [(path, data.image_size) for path in paths]
    stream = data.batches(workers=workers)
    with multiprocessing.get_context("fork").Pool(max(1, workers)) as pool:

        def bare_loop():
            if workers:
                pool.starmap(bare, jobs, chunksize=16)
            else:
                for job in jobs:
                    bare(*job)

        def loader_loop():
            for _ in range(len(paths) // data.batch):
                next(stream)

        bare_times, loader_times = [], []
        for _ in range(repeat):
            bare_times.append(clock(bare_loop))
            for _ in range(4):
                next(stream)  # what the workers have loaded meanwhile
            loader_times.append(clock(loader_loop))
    stream.close()
    return len(paths) / median(bare_times), len(paths) / median(loader_times)


def against_pillow(folder):
    """Decode + transform + encode + collate against the bare loop: same pictures, same cores."""
    paths, toml = photographs(folder, count=256)
    tokenizer = Tokenizer("assets/toy")
    found = {"jpeg KB": paths[0].stat().st_size / 1024}
    for side in (224, 448):
        data = Data(toml, tokenizer, side, visual=256, context=2048, batch=16, train=False)
        for workers in (0, 2):
            alone, ours = rates(data, paths, workers)
            name = f"{side} px, {workers} workers"
            found[f"{name}: bare, images/s"] = alone
            found[f"{name}: loader, images/s"] = ours
            found[f"{name}: share"] = ours / alone
    return found


def measure(*parts):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder + "/cache"  # so that the first open is a first one
        for part in parts:
            home = Path(folder) / part.__name__
            home.mkdir()
            found |= part(home)
    for name, value in found.items():
        print(f"{name:45}{value:14.4g}")
    return found


def data(args):
    return measure(records, against_pillow)


def loader(args):
    return measure(against_pillow)
