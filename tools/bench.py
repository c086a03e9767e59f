"""Every performance claim of this project, measured side by side in one run.

    python -m tools.bench pool         # the pooling kernel against eager, torch.compile and the device's copy bandwidth
    python -m tools.bench decode       # generation against transformers', same weights, at toy size; decode-small: 1.1B
    python -m tools.bench step         # an update against transformers', per stage, at two shapes; loop: the loop's cost
    python -m tools.bench memory       # the peak of an update against transformers', each in a process of its own
    python -m tools.bench profile      # the kernels of an update by time, per stage, ours and transformers'
    python -m tools.bench growth       # time and memory of an update as batch, text, visual tokens and image size double
    python -m tools.bench limit --preset infmllm-7b       # MFU and memory of each stage, bandwidth of decoding: for a GPU
    python -m tools.bench data         # opening and reading a million records; the loader against a bare Pillow loop
    python -m tools.bench loader       # that last part alone

    python -m tools.bench tune         # a branch of inner adaptors, Q and V, the whole LLM: what trains, what is held, a step

Each prints a table with the device it found and ends with one JSON line.
"""

import argparse
import ctypes
import gc
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import weights


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def seconds(run, repeat=5, warmup=1):
    """Median wall time of one call; the device is drained before the clock is read."""
    times = []
    for i in range(warmup + repeat):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


# One function a claim; BENCHES at the end of the file names them.
def naive_pool(x, weight, bias, grid, eps=1e-5, channels_first=False):
    """What one writes first: LayerNorm, drop CLS, bring each window's patches together (a copy), mean over them."""
    (N, tokens, D), P = x.shape, grid
    w = round((tokens - 1) ** 0.5) // P
    y = torch.nn.functional.layer_norm(x, (D,), weight.to(x.dtype), bias.to(x.dtype), eps)[:, 1:]
    if channels_first:
        return y.permute(0, 2, 1).reshape(N, D, P, w, P, w).mean((3, 5)).flatten(2).permute(0, 2, 1)
    return y.reshape(N, P, w, P, w, D).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).mean(3).flatten(1, 2)


def pool_bytes(N, s, P, D, width, backward):
    """What must move: x in, y out; with a backward also x and dy in, dx out, and mean and rstd (fp32) out and in."""
    forward = width * N * D * (s * s + P * P)
    return forward + (
        width * N * D * (s * s + P * P + 1 + s * s) + 16 * N * s * s if backward else 0
    )


def time_pool(functions, N, s, P, D, dtype, device):
    """{name: (seconds of forward, seconds of forward + backward)}, on the same numbers."""
    x = torch.randn(N, 1 + s * s, D, device=device, dtype=dtype)
    weight, bias = torch.rand(D, device=device), torch.rand(D, device=device)
    leaves, dy = (
        [t.clone().requires_grad_() for t in (x, weight, bias)],
        torch.randn_like(x[:, : P * P]),
    )
    if device == "cuda":
        from triton.testing import do_bench  # device events; the L2 cache is flushed between runs

        clock = lambda run: do_bench(run, return_mode="median") / 1e3
    else:
        clock = lambda run: seconds(run, repeat=15, warmup=2)

    def forward(f):
        with torch.no_grad():
            return f(x, weight, bias, P, 1e-5)

    def both(f):
        torch.autograd.grad(f(*leaves, P, 1e-5), leaves, dy)

    return {
        name: [clock(partial(run, f)) for run in (forward, both)] for name, f in functions.items()
    }


def copy_bandwidth(device, size=1 << 30):
    a = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2 * size / seconds(lambda: b.copy_(a), repeat=20, warmup=3)


def bench_pool(args):
    """The fused LayerNorm + window mean. On a GPU the kernel, in bf16; on a CPU the reference, in fp32."""
    from adapter import pool_reference

    cuda = args.device == "cuda"
    dtype, functions = (torch.bfloat16 if cuda else torch.float32), {"eager": naive_pool}
    if cuda:
        import pool_triton

        functions |= {
            "compiled": torch.compile(pool_reference, dynamic=False),
            "ours": pool_triton.pool,
        }
        torch._dynamo.config.recompile_limit = 256  # one graph a shape
        towers = [
            (16, 8, 1408),
            (16, 16, 1408),
            (32, 8, 1408),
            (32, 16, 1408),
            (32, 32, 1408),  # EVA ViT-g/14
            (24, 8, 1024),
            (24, 12, 1024),
            (24, 24, 1024),
        ]  # CLIP ViT-L/14-336
        shapes = [(2**n, *tower) for tower in towers for n in range(3, 11)]
    else:
        functions |= {"D first": partial(naive_pool, channels_first=True), "ours": pool_reference}
        shapes = [
            (64, 8, 4, 128),
            (64, 8, 8, 128),
            (8, 24, 8, 1024),
            (8, 24, 12, 1024),
            (8, 24, 24, 1024),
            (2, 32, 16, 1408),
        ]
    peak = copy_bandwidth(args.device, 1 << 30 if cuda else 1 << 27)
    print(f"copy of this device: {peak / 1e9:.0f} GB/s, read + write. {pool_bytes.__doc__}")
    print(
        "    N  s  P     D  pass            GB    GB/s  % of copy  "
        + "".join(f"{n + ' ms':>12}" for n in functions)
    )
    rows, judged = [], set()  # *: the smallest N of this pair that moves 1 GB
    for N, s, P, D in shapes:
        times = time_pool(functions, N, s, P, D, dtype, args.device)
        for i, name in enumerate(("forward", "fwd + bwd")):
            size, took = (
                pool_bytes(N, s, P, D, dtype.itemsize, i),
                {f: t[i] for f, t in times.items()},
            )
            rate, star = size / took["ours"], size >= 1e9 and (s, P, D, name) not in judged
            if star:
                judged.add((s, P, D, name))
            print(
                f"{N:5} {s:2} {P:2} {D:5}  {name:9} {size / 1e9:8.3f} {rate / 1e9:7.0f} {100 * rate / peak:8.0f}%"
                f"{' *'[star]}  " + "".join(f"{1e3 * t:12.3f}" for t in took.values())
            )
            rows.append(
                {
                    "N": N,
                    "s": s,
                    "P": P,
                    "D": D,
                    "pass": name,
                    "judged": star,
                    "bytes": size,
                    "GB/s": rate / 1e9,
                    "of_copy": rate / peak,
                    **{f"x_{f}": took[f] / took["ours"] for f in functions if f != "ours"},
                }
            )
    return {"dtype": str(dtype), "copy_GB/s": peak / 1e9, "rows": rows}


def llava_pair(vit, llm, device):
    """One LLaVA with random weights: transformers', and the same loaded from its saved folder."""
    import transformers as hf

    clip = hf.CLIPVisionConfig(
        hidden_size=vit.width,
        intermediate_size=vit.mlp,
        num_hidden_layers=vit.layers + 1,
        num_attention_heads=vit.heads,
        image_size=vit.image_size,
        patch_size=vit.patch,
    )
    text = hf.LlamaConfig(
        vocab_size=llm.vocab,
        hidden_size=llm.width,
        intermediate_size=llm.mlp,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        max_position_embeddings=llm.context,
    )
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=clip, text_config=text, image_token_index=llm.vocab - 1)
    ).eval()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(20)  # clear winners: rounding decides no token
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs.to(device), weights.load_llava(folder).to(device)


def bench_decode(args, size="toy", new=64, repeat=5):
    """Tokens per second of a generate() call, picture and prompt included; the best of `repeat`, taken in turns."""
    from model import IMAGE, PRESETS
    from sample import generate_ids

    c, rows = PRESETS[size](), []
    c.vit.image_size = 4 * c.vit.patch  # 4 x 4 patches: the toy's 16 visual tokens, without a pool
    if size != "toy":
        c.vit.layers = 2  # the picture is not what is measured
    theirs, ours = llava_pair(c.vit, c.llm, args.device)
    print(f"{size}: {new} new tokens after a picture and 20 tokens; tokens/s")
    print("batch  beams  transformers      ours      x   same ids")
    for batch, beams in ((1, 1), (8, 1), (1, 5), (8, 5)):
        prompt = [
            [1, 5] + [IMAGE] * 16 + list(range(10 * b, 10 * b + 18)) for b in range(1, batch + 1)
        ]
        images = torch.randn(batch, 3, c.vit.image_size, c.vit.image_size, device=args.device)
        ids = torch.tensor(
            [[c.llm.vocab - 1 if i == IMAGE else i for i in row] for row in prompt],
            device=args.device,
        )
        call = partial(
            theirs.generate,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images,
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        runs = {
            "transformers": lambda call=call, ids=ids: call()[:, ids.shape[1] :].tolist(),
            "ours": partial(
                generate_ids,
                ours,
                images,
                prompt,
                max_new_tokens=new,
                min_new_tokens=new,
                beams=beams,
            ),
        }
        said = {name: run() for name, run in runs.items()}
        took = {name: float("inf") for name in runs}
        for _ in range(repeat):
            for name, run in runs.items():
                took[name] = min(took[name], seconds(run, repeat=1, warmup=0))
        rate = {name: batch * new / t for name, t in took.items()}
        row = {
            "batch": batch,
            "beams": beams,
            **rate,
            "x": rate["ours"] / rate["transformers"],
            "same": said["ours"] == said["transformers"],
        }
        print(
            f"{batch:5}{beams:7}{rate['transformers']:14.1f}{rate['ours']:10.1f}{row['x']:7.2f}   {row['same']}"
        )
        rows.append(row)
    return {"size": size, "new": new, "rows": rows}


def resident():
    """This process's memory: all that it maps, and what it shares with nobody."""
    lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"Rss": kb["Rss"], "Private": kb["Private_Dirty"] + kb["Private_Clean"]}


def read_many(source, seed, count, out):
    """A worker's life: random reads, its memory before (after 200 warm ones) and after."""
    rng = random.Random(seed)
    for _ in range(200):
        source.read(rng.randrange(len(source)))
    before = resident()
    for _ in range(count):
        source.read(rng.randrange(len(source)))
    out.put((before, resident()))


def million(folder, records=1_000_000, tars=200, images=1000):
    """A JSONL of a million LLaVA-like records and 200 tars of 1,000 images, and the mixture that names them."""
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 40).convert("RGB").save(picture, "JPEG")
    with open(folder / "talk.jsonl", "w") as f:
        for i in range(records):
            said = [
                {"from": "human", "value": f"question {i} " * (1 + i % 7)},
                {"from": "gpt", "value": "an answer of some words " * (1 + i % 11)},
            ]
            f.write(json.dumps({"id": str(i), "conversations": said}) + "\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(images):
            for ending, content in (("jpg", picture.getvalue()), ("txt", f"caption {i}".encode())):
                member = tarfile.TarInfo(f"{i:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for i in range(1, tars):
        shutil.copy(folder / "0.tar", folder / f"{i}.tar")
    (folder / "mix.toml").write_text(
        '[[source]]\nname = "talk"\nformat = "conversations"\nannotations = "talk.jsonl"\n'
        '[[source]]\nname = "tars"\nformat = "caption-shards"\nshards = "*.tar"\n'
    )
    return folder / "mix.toml"


def bench_records(folder):
    """Open twice, read at random, watch four workers' memory."""
    from data import load_mixture

    toml, found = million(folder), {}
    for name in ("first open", "second open"):
        start, cpu = time.perf_counter(), time.process_time()
        sources = load_mixture(toml)
        found |= {
            name + " s": time.perf_counter() - start,
            name + " CPU s": time.process_time() - cpu,
        }
    for source in sources:
        rng = random.Random(0)
        times = []
        for _ in range(20_000):
            start, number = time.perf_counter(), rng.randrange(len(source))
            source.read(number)
            times.append(time.perf_counter() - start)
        times.sort()
        found |= {
            f"{source.name} records": len(source),
            f"{source.name} read ms": 1e3 * sum(times) / len(times),
            f"{source.name} read p99 ms": 1e3 * times[-200],
        }
    fork = multiprocessing.get_context("fork")
    for source in sources:
        out = fork.SimpleQueue()
        workers = [fork.Process(target=read_many, args=(source, i, 20_000, out)) for i in range(4)]
        for w in workers:
            w.start()
        pairs = [out.get() for _ in workers]
        for w in workers:
            w.join()
        for kind in ("Rss", "Private"):
            before, after = (sum(pair[i][kind] for pair in pairs) for i in (0, 1))
            found[f"{source.name} 4 workers {kind} MB"] = before / 1024
            found[f"{source.name} 4 workers {kind} growth"] = after / before - 1
    return found


def bare(job):
    """What anyone writes first: open, decode, resize; nothing else."""
    path, side = job
    with Image.open(path) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).tobytes()[:1]


def bench_loader(folder, count=256, repeat=5):
    """Decode + transform + encode + collate against the bare loop: same pictures, same cores, taken in turns.
    Without workers in CPU seconds, which do not mind other processes; with them in wall seconds, which do."""
    from data import Data, Tokenizer

    (folder / "images").mkdir()
    rng, names = np.random.default_rng(0), [f"{i:06d}.jpg" for i in range(count)]
    for name in names:  # smooth shapes and some grain, about COCO's 100 KB
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            (640, 480), Image.BICUBIC
        )
        grain = np.asarray(coarse) + rng.normal(0, 6, (480, 640, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(
            folder / "images" / name, quality=90
        )
    notes = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "caption": f"a picture with number {i} on it"} for i in range(count)
        ],
    }
    (folder / "c.json").write_text(json.dumps(notes))
    (folder / "c.toml").write_text(
        '[[source]]\nname = "c"\nformat = "coco-caption"\nannotations = "c.json"\n'
        'images = "images"\n'
    )
    paths = [folder / "images" / name for name in names]
    found = {"jpeg KB": paths[0].stat().st_size / 1024}
    for side in (224, 448):
        for workers in (0, 2):
            data = Data(
                folder / "c.toml", Tokenizer("assets/toy"), side, 256, 2048, batch=16, train=False
            )
            pool = multiprocessing.get_context("fork").Pool(workers) if workers else None
            times, clock = (
                {"bare": [], "loader": []},
                time.perf_counter if workers else time.process_time,
            )
            for _ in range(repeat):
                start = clock()
                if pool:
                    pool.map(bare, [(p, side) for p in paths], chunksize=16)
                else:
                    [bare((p, side)) for p in paths]
                times["bare"].append(clock() - start)
                stream = data.batches(workers=workers)
                for _ in range(4):
                    next(stream)  # workers are up; what they have begun at the start of the
                start = clock()  # clock is made good by what they have begun at its end
                for _ in range(count // 16):
                    next(stream)
                times["loader"].append(clock() - start)
                stream.close()
            if pool:
                pool.terminate()
            rate = {name: count / sorted(t)[len(t) // 2] for name, t in times.items()}
            key = f"{side} px, {workers or 'no'} workers"
            found |= {
                f"{key}: bare images/s": rate["bare"],
                f"{key}: loader images/s": rate["loader"],
                f"{key}: share": rate["loader"] / rate["bare"],
            }
    return found


def bench_data(args, parts=(bench_records, bench_loader)):
    """A million records, 200 tars, and the loader's own cost."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder + "/cache"  # so that the first open is a first one
        for part in parts:
            (Path(folder) / part.__name__).mkdir()
            found |= part(Path(folder) / part.__name__)
    for name, value in found.items():
        print(f"{name:45}{value:14.4g}")
    return found


# Training beside transformers: one LLaVA, the same weights, batch and frozen parts on both sides
def shape(name):
    """(ViT, LLM, rows, mean text tokens of a row, how many are supervised) of a LLaVA, which pools nothing."""
    from model import CLIP_L, PRESETS, LlamaConfig, ViTConfig

    toy = PRESETS["toy"]()  # 64 visual tokens an image, and in 100M
    return {
        "toy": (toy.vit, toy.llm, 64, 0, 0),  # 0: as train.py's table says for each stage
        "100M": (
            ViTConfig(112, 14, 512, 8, 8, 2048),
            LlamaConfig(32000, 512, 12, 8, 8, 1408),
            8,
            96,
            32,
        ),
        "7b": (ViTConfig(**CLIP_L), PRESETS["llava-7b"]().llm, 8, 96, 32),
    }[name]


def talk(c, stage, rows, text=0, answer=0, unequal=True):
    """Samples with an image in each, of unequal length: half to one and a half times the typical text."""
    from model import IGNORE, IMAGE
    from train import STAGES

    rng, samples, row = np.random.default_rng(stage), [], STAGES["toy"][stage]
    text, answer = (text, answer) if text else (row.text, row.answer)
    for _ in range(rows):
        length = int(rng.integers(text // 2, 3 * text // 2 + 1)) if unequal else text
        said = length * answer // text
        ids = [1] + [IMAGE] * c.visual_tokens + rng.integers(3, c.llm.vocab - 1, length).tolist()
        picture = rng.integers(0, 256, (c.vit.image_size, c.vit.image_size, 3), dtype=np.uint8)
        samples.append((ids[:-1], [IGNORE] * (len(ids) - 1 - said) + ids[-said:], [picture]))
    return samples


def our_update(model, stage, samples, device, dtype, micro=1, preset="toy", recompute=False):
    """(an update as train.py makes it, the gradients alone), in `micro` micro-batches of like length."""
    import train
    from data import BUCKET, collate

    args = train.flags().parse_args(["--stage", str(stage), "--preset", preset, "--data", "none"])
    s = train.settle(args, stage, 1) | {"dtype": dtype, "recompute": recompute}
    run = train.Run(
        s, args, None, train.Ranks(0, 1, torch.device(device), None), model.freeze(stage)
    )
    train.place(run)
    train.make_optimizer(run)
    samples, size = sorted(samples, key=lambda sample: len(sample[0])), len(samples) // micro
    batches = [
        collate(
            samples[i : i + size],
            0,
            model.config.visual_tokens,
            model.config.vit.image_size,
            BUCKET if device == "cuda" else 1,
        )
        for i in range(0, len(samples), size)
    ]
    supervised = sum(b.supervised for b in batches)
    return partial(train.update, run, batches, supervised), partial(
        train.gradients, run, batches, supervised
    )


def their_update(model, stage, samples, device, dtype):
    """The same with transformers' LLaVA and torch's fused AdamW, as its Trainer would."""
    from model import IGNORE, IMAGE, PIXEL_MEAN, PIXEL_STD

    part = {
        "vision_tower": "vit",
        "language_model": "llm",
        "lm_head": "llm",
        "multi_modal_projector": "adapter",
    }
    for name, p in model.train().named_parameters():
        which = next(ours for theirs, ours in part.items() if theirs in name)
        p.requires_grad_(
            {
                1: which == "adapter",
                3: which != "vit",
                2: which != "llm" or name.endswith(("q_proj.weight", "v_proj.weight")),
            }[stage]
        )
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), fused=True)
    T = max(len(ids) for ids, _, _ in samples)
    ids = torch.tensor([row + [0] * (T - len(row)) for row, _, _ in samples])
    targets = torch.tensor([wanted + [IGNORE] * (T - len(wanted)) for _, wanted, _ in samples])
    there = torch.arange(T) < torch.tensor([len(row) for row, _, _ in samples])[:, None]
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (PIXEL_MEAN, PIXEL_STD))
    pixels = (
        torch.from_numpy(np.stack([picture for _, _, (picture,) in samples])).permute(0, 3, 1, 2)
        / 255
    )
    batch = {
        "input_ids": torch.where(ids == IMAGE, model.config.image_token_id, ids),
        "attention_mask": there.long(),
        "pixel_values": ((pixels - mean) / std).contiguous(),
        "labels": targets,
        "shift_labels": targets,
    }
    batch = {key: value.to(device) for key, value in batch.items()}

    def gradients():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def update():
        loss = gradients()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return update, gradients


def counted_flops(run):
    """(what a function really multiplies by torch's counter, its value); causal attention counts whole."""
    from torch.utils import flop_counter as fc

    forward = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )  # the counter knows CUDA's alone
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        forward: lambda q, k, v, *rest, **named: fc.sdpa_flop_count(q, k, v),
        backward: lambda dy, q, k, v, *rest, **named: fc.sdpa_backward_flop_count(dy, q, k, v),
    }
    with fc.FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        loss = run()
    return counter.get_total_flops(), float(loss)


def fast_bf16(device):
    """Whether this processor multiplies in bf16; others do it in software, ten times as slow as fp32."""
    return (
        device == "cuda"
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )


def step_clock(device):
    """Seconds of one call: of wall time, or with one thread of CPU time, which does not mind other processes."""
    if device == "cuda" or torch.get_num_threads() > 1:
        return partial(seconds, repeat=1, warmup=0)

    def clock(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    return clock


def bench_step(args):
    """Updates per second against transformers' LLaVA, in turns, the best of --repeat."""
    clock = step_clock(args.device)
    dtypes, rows = ["fp32"] * (args.device == "cpu") + ["bf16"] * fast_bf16(args.device), []
    if "bf16" not in dtypes:
        print("bf16 is not compared: this processor does not multiply in it")
    print(
        "shape  stage  dtype    samples/s: ours  transformers      x   FLOPs allow   loss: ours  transformers"
    )
    for name in args.shapes.split(","):
        vit, llm, count, *text = shape(name)
        for stage, dtype in ((stage, dtype) for stage in (1, 2, 3) for dtype in dtypes):
            theirs, ours = llava_pair(vit, llm, args.device)
            samples = talk(ours.config, stage, count, *text)
            sides = {
                "ours": our_update(ours, stage, samples, args.device, dtype, args.micro),
                "transformers": their_update(theirs, stage, samples, args.device, dtype),
            }
            found = {side: counted_flops(gradients) for side, (_, gradients) in sides.items()}
            (our_flops, our_loss), (their_flops, their_loss) = found.values()
            our_loss /= sum(t >= 0 for _, wanted, _ in samples for t in wanted)
            for model in (ours, theirs):
                model.zero_grad()
            took = dict.fromkeys(sides, float("inf"))
            for _ in range(args.repeat):
                for side, (update, _) in sides.items():
                    took[side] = min(took[side], clock(update))
            rate = {side: count / t for side, t in took.items()}
            row = {
                "shape": name,
                "stage": stage,
                "dtype": dtype,
                **rate,
                "x": rate["ours"] / rate["transformers"],
                "allowed": their_flops / our_flops,
                "loss": [our_loss, their_loss],
            }
            print(
                f"{name:6}{stage:6}  {dtype}{rate['ours']:20.1f}{rate['transformers']:14.1f}{row['x']:7.2f}"
                f"{row['allowed']:14.2f}{our_loss:13.5f}{their_loss:14.5f}",
                flush=True,
            )
            rows.append(row)
    return {"rows": rows}


def bench_profile(args, steps=3, shown=15):
    """Where an update's time goes, by kernel: torch's profiler, self time, each stage and side. On idle cores only."""
    from torch.profiler import profile

    rows = []
    for name, stage in ((name, stage) for name in args.shapes.split(",") for stage in (1, 2, 3)):
        vit, llm, count, *text = shape(name)
        theirs, ours = llava_pair(vit, llm, args.device)
        samples = talk(ours.config, stage, count, *text)
        for side, (update, _) in {
            "ours": our_update(ours, stage, samples, args.device, "fp32", args.micro),
            "transformers": their_update(theirs, stage, samples, args.device, "fp32"),
        }.items():
            for _ in range(2):
                update()  # memory is in place, and the second one is like the rest
            with profile() as found:
                for _ in range(steps):
                    update()
            cuda = args.device == "cuda"
            took = {
                e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3 / steps
                for e in found.key_averages()
            }
            total = sum(took.values())
            print(f"{name}, stage {stage}, {side}: {total:.1f} ms an update")
            for key in sorted(took, key=took.get, reverse=True)[:shown]:
                print(f"{took[key]:10.1f} ms {100 * took[key] / total:5.1f}%  {key}")
            rows.append({"shape": name, "stage": stage, "side": side, "ms": total})
    return {"rows": rows}


def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024


def peak_of(side, name, stage, device, dtype, micro, out):
    """A process: one update to warm up, and the peak of the next above what stays and gradients, and its time."""
    vit, llm, count, *text = shape(name)
    pair = dict(zip(("transformers", "ours"), llava_pair(vit, llm, "cpu")))
    samples, model = talk(pair["ours"].config, stage, count, *text), pair.pop(side).to(device)
    pair.clear()
    if side == "ours":
        update = our_update(model, stage, samples, device, dtype, micro)[0]
    else:
        update = their_update(model, stage, samples, device, dtype)[0]
    update()
    gc.collect()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed shall count as free
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the high-water mark starts again from what is held now
        before, peak = status("VmRSS"), partial(status, "VmHWM")
    took = step_clock(device)(update)
    out.put((peak() - before - gradients, took))


def bench_memory(args):
    """Peak of an update above weights, gradients, optimizer state and libraries, against transformers'."""
    spawn, rows = multiprocessing.get_context("spawn"), []
    dtype = "bf16" if args.device == "cuda" else "fp32"
    print("shape  stage   MB: ours  transformers   share   seconds: ours  transformers")
    for name in args.shapes.split(","):
        for stage in (1, 2, 3):
            found = {}
            for side in ("ours", "transformers"):
                out = spawn.SimpleQueue()
                child = spawn.Process(
                    target=peak_of, args=(side, name, stage, args.device, dtype, args.micro, out)
                )
                child.start()
                found[side] = out.get()
                child.join()
            (ours, took), (theirs, theirs_took) = found.values()
            print(
                f"{name:6}{stage:6}{ours / 1e6:11.1f}{theirs / 1e6:14.1f}{ours / theirs:8.2f}{took:16.3f}"
                f"{theirs_took:14.3f}",
                flush=True,
            )
            rows.append(
                {
                    "shape": name,
                    "stage": stage,
                    "ours": ours,
                    "transformers": theirs,
                    "share": ours / theirs,
                    "seconds": [took, theirs_took],
                }
            )
    return {"rows": rows, "dtype": dtype, "micro": args.micro}


def bench_growth(args, repeat=3):
    """Time and kept bytes of a stage-2 update at toy width as one size doubles, beside its arithmetic; a plot."""
    from matplotlib.figure import Figure

    from model import PRESETS, InfMLLM, flops, init

    base, rows, clock = (
        {"rows": 16, "text": 64, "grid": 4, "image": 64},
        [],
        step_clock(args.device),
    )
    axes = {
        "rows": (8, 16, 32, 64),
        "text": (32, 64, 128, 256),
        "grid": (2, 4, 8, 16),
        "image": (32, 64, 128, 256),
    }
    figure = Figure(figsize=(10, 2.6))
    print("axis      value     ms    x    MB kept    x   GFLOP    x")
    for plot, (axis, values) in zip(figure.subplots(1, 4), axes.items()):
        points = []
        for value in values:
            at = (
                base | {"image": 128 if axis == "grid" else 64} | {axis: value}
            )  # 16 x 16 patches to pool
            c = PRESETS["toy"]()
            c.vit.image_size, c.grid, c.llm.context = at["image"], at["grid"], 1024
            samples = talk(c, 2, at["rows"], at["text"], at["text"] // 4, unequal=False)
            model = init(InfMLLM(c)).to(args.device)
            update, gradients = our_update(model, 2, samples, args.device, "fp32")
            kept = kept_bytes(model, gradients) / 1e6
            took = 1e3 * min(clock(update) for _ in range(repeat))
            work = at["rows"] * sum(flops(c, at["text"], at["text"] // 4, 2).values()) / 1e9
            points.append((took, kept, work))
            x = (
                [now / before for now, before in zip(points[-1], points[-2])]
                if len(points) > 1
                else [1, 1, 1]
            )
            print(
                f"{axis:8}{value:7}{took:7.1f}{x[0]:5.2f}{kept:11.1f}{x[1]:5.2f}{work:8.2f}{x[2]:5.2f}",
                flush=True,
            )
            rows.append({"axis": axis, "value": value, "ms": took, "kept_MB": kept, "GFLOP": work})
        at = [v * v for v in values] if axis in ("grid", "image") else values
        for name, y in zip(("time", "memory", "arithmetic"), zip(*points)):
            plot.loglog(
                at,
                [v / y[0] for v in y],
                {"arithmetic": "k:"}.get(name, "o-"),
                label=name,
                markersize=3,
            )
        plot.set_title(
            {"grid": "visual tokens P²", "image": "pixels", "rows": "batch"}.get(axis, axis),
            fontsize=9,
        )
        plot.tick_params(labelsize=7)
        plot.set_xticks(at, map(str, at))
        plot.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        plot.minorticks_off()
    figure.axes[0].legend(fontsize=7)
    figure.savefig("assets/pictures/growth.png", dpi=90, bbox_inches="tight")
    return {"rows": rows}


def bench_limit(args, new=128):
    """How far from the device's limit: MFU and peak memory of each stage, and the bandwidth of decoding. Random weights
    at the preset's own size, in bf16 on a GPU."""
    from model import IMAGE, PRESETS, InfMLLM, flops
    from sample import generate_ids
    from support.plan import peak_flops
    from train import DTYPES, PAPER, STAGES

    cuda, rows = args.device == "cuda", []
    dtype, n = ("bf16", 8192) if cuda else ("fp32", 1024)
    a = torch.randn(n, n, device=args.device, dtype=DTYPES[dtype])
    rate, sheet = 2 * n**3 / seconds(lambda: a @ a, 20), peak_flops(torch.device(args.device))
    print(
        f"{args.preset}, {dtype}: matmul {rate / 1e12:.2f} TFLOP/s measured, {sheet and sheet / 1e12} by data sheet"
    )
    print("stage  rows     ms   samples/s   MFU  of data sheet   peak GB")
    for stage in (1, 2, 3):
        row, c = STAGES.get(args.preset, PAPER)[stage], PRESETS[args.preset]()
        c.vit.image_size, c.grid = row.image_size or c.vit.image_size, row.grid or c.grid
        with torch.device("meta"):
            model = InfMLLM(c).to(DTYPES[dtype])
        model = model.to_empty(device=args.device)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.02)
        samples = talk(c, stage, row.rows, row.text, row.answer, unequal=False)
        update = our_update(
            model, stage, samples, args.device, dtype, 1, args.preset, row.recompute
        )[0]
        took, work = (
            seconds(update, 5, warmup=2),
            row.rows * sum(flops(c, row.text, row.answer, stage).values()),
        )
        peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
        rows.append(
            {
                "stage": stage,
                "rows": row.rows,
                "seconds": took,
                "MFU": work / took / rate,
                "peak": peak,
                "MFU_sheet": sheet and work / took / sheet,
            }
        )
        print(
            f"{stage:5}{row.rows:6}{1e3 * took:7.0f}{row.rows / took:12.1f}{100 * rows[-1]['MFU']:5.0f}%"
            f"{100 * (rows[-1]['MFU_sheet'] or 0):13.0f}%{peak / 1e9:11.2f}",
            flush=True,
        )
        del update
        if cuda:
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    model.to(DTYPES[dtype]).eval().requires_grad_(False)
    size = sum(
        p.nbytes for name, p in model.llm.named_parameters() if not name.startswith("embed.")
    )
    copy = copy_bandwidth(args.device, 1 << 30 if cuda else 1 << 27)
    images = torch.zeros(
        1, 3, c.vit.image_size, c.vit.image_size, device=args.device, dtype=DTYPES[dtype]
    )
    for batch in (1, 32):
        prompt = [[1] + [IMAGE] * c.visual_tokens + list(range(5, 25))] * batch
        call = partial(
            generate_ids, model, images, prompt, [0] * batch, max_new_tokens=new, min_new_tokens=new
        )
        took = seconds(call, 3)
        read = new * size / took  # bytes of weights a second
        print(
            f"decode, batch {batch}: {batch * new / took:.1f} tokens/s, {read / 1e9:.1f} GB/s of weights = "
            f"{100 * read / copy:.0f}% of a copy's {copy / 1e9:.0f} GB/s",
            flush=True,
        )
        rows.append({"batch": batch, "tokens/s": batch * new / took, "of_copy": read / copy})
    return {"preset": args.preset, "matmul": rate, "sheet": sheet, "copy": copy, "rows": rows}


def bench_loop(args, steps=40):
    """What the training loop costs beside its work: a step's time less gradients, optimizer and loading."""
    import train

    rows, clock = [], {}

    def timed(name, f):
        def run(*a, **k):
            start = time.perf_counter()
            try:
                return f(*a, **k)
            finally:
                clock[name] = clock.get(name, 0.0) + time.perf_counter() - start

        return run

    train.gradients = timed("gradients", train.gradients)
    torch.optim.AdamW.step = timed("optimizer", torch.optim.AdamW.step)
    with tempfile.TemporaryDirectory() as folder:
        start = "assets/toy"
        for stage in (1, 2, 3):
            clock.clear()
            out = f"{folder}/stage{stage}"
            code = train.main(
                [
                    "--stage",
                    str(stage),
                    "--init",
                    start,
                    "--out",
                    out,
                    "--steps",
                    str(steps),
                    "--log-every",
                    str(steps),
                    "--eval-every",
                    "0",
                    "--save-every",
                    "0",
                    "--device",
                    args.device,
                ]
            )
            assert code == 0, "the run failed; see above"
            record = [json.loads(line) for line in open(f"{out}/log.jsonl")][-1]
            step, load = (steps * record["seconds"][key] for key in ("step", "load"))
            rest = step - load - clock["gradients"] - clock["optimizer"]
            rows.append(
                {
                    "stage": stage,
                    "step_ms": 1e3 * step / steps,
                    "loading_ms": 1e3 * load / steps,
                    **{f"{key}_ms": 1e3 * value / steps for key, value in clock.items()},
                    "loop_share": rest / step,
                }
            )
            start = out
    print("stage    step ms  = loading + gradients + optimizer + loop, of which the loop is")
    for r in rows:
        print(
            f"{r['stage']:5}{r['step_ms']:11.2f}{r['loading_ms']:10.2f}{r['gradients_ms']:12.2f}"
            f"{r['optimizer_ms']:12.2f}{100 * r['loop_share']:12.2f}%"
        )
    return {"rows": rows}


def kept_bytes(model, call):
    """Bytes that autograd keeps of a call for its backward pass, beside the model's own."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def bench_tune(args, steps=12):
    """The three ways to train an LLM, stage 2's mixture, the toy's sizes: what trains, what is held, how long a step
    takes. Bytes are counted: of weights, gradients and moments, and what autograd keeps of a batch for its backward."""
    import train
    from support.plan import sizes

    runs, times, kept, device = {}, {}, {}, torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("inner", "qv", "full"):
            argv = [
                "--stage",
                "3",
                "--init",
                "assets/toy",
                "--data",
                "out/toy/stage2.toml",
                "--tune",
                name,
                "--out",
                f"{folder}/{name}",
                "--steps",
                str(steps),
            ]
            runs[name] = run = train.prepare(
                train.flags().parse_args(argv), 3, train.Ranks(0, 1, device, None)
            )
            run.stream, times[name] = run.data.batches(0, steps, 0, 1, run.s["accum"], 0), []
        for step in range(steps):  # in turns, on the same batches
            for name, run in runs.items():
                batches = next(run.stream)
                call = partial(train.update, run, batches, sum(b.supervised for b in batches))
                if step == 0:
                    kept[name] = kept_bytes(run.model, call) / 1e6
                else:
                    times[name].append(seconds(call, repeat=1, warmup=0))
    print(
        "of the LLM trains   trained     frozen   weights + gradients + moments + kept = MB      step ms"
    )
    rows = []
    for name, run in runs.items():
        trained, frozen = (sum(n) for n in zip(*sizes(run.model).values()))
        size = sum(p.nbytes for p in run.model.parameters()) / 1e6
        moving = sum(p.nbytes for p in run.model.parameters() if p.requires_grad) / 1e6
        row = {
            "tune": name,
            "trained": trained,
            "frozen": frozen,
            "weights_MB": size,
            "gradients_MB": moving,
            "moments_MB": 2 * moving,
            "kept_MB": kept[name],
            "MB": size + 3 * moving + kept[name],
            "step_ms": 1e3 * sorted(times[name])[len(times[name]) // 2],
        }
        print(
            f"{name:<15}{trained:12,}{frozen:11,}{size:10.1f}{moving:12.1f}{2 * moving:10.1f}{kept[name]:7.1f}"
            f"{row['MB']:5.0f}{row['step_ms']:13.1f}"
        )
        rows.append(row)
    return {"steps": steps, "rows": rows}


BENCHES = {
    "tune": bench_tune,
    "pool": bench_pool,
    "step": bench_step,
    "loop": bench_loop,
    "memory": bench_memory,
    "growth": bench_growth,
    "limit": bench_limit,
    "profile": bench_profile,
    "data": bench_data,
    "loader": partial(bench_data, parts=(bench_loader,)),
    "decode": bench_decode,
    "decode-small": partial(bench_decode, size="small", new=8, repeat=2),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", choices=sorted(BENCHES), help="which claim to measure")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--shapes", default="toy,100M", help="of step and memory: toy, 100M, 7b, several"
    )
    parser.add_argument("--repeat", type=int, default=5, help="of step: how often in turns")
    parser.add_argument("--preset", default="toy", help="of limit")
    parser.add_argument(
        "--micro",
        type=int,
        default=4,
        help="of step and memory: our micro-batches of the one batch",
    )
    args = parser.parse_args()
    print(f"{args.bench} on {device_name(args.device)}, torch {torch.__version__}")
    print(
        json.dumps(
            {"bench": args.bench, "device": device_name(args.device), **BENCHES[args.bench](args)}
        )
    )


if __name__ == "__main__":
    main()
