"""The limits of a device: how near training, decoding and sharding come to them. Random weights of a preset's size."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import pool_triton
import toy
import train
from model import IMAGE, PRESETS, InfMLLM
from sample import generate_ids
from support import plan
from support.plan import GIB, flops
from tools.bench_pool import times
from tools.bench_train import dtype_of, our_side, peak_memory, random_samples
from tools.measure import Table, copy_bandwidth, typical


def random_model(c, device):
    """In the dtype of the arithmetic; frozen parts stay in it."""
    with torch.device("meta"):
        model = InfMLLM(c).to(train.DTYPES[dtype_of(device)])
    model = model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    return model


def stage_of(args, stage):
    """(a stage's row, a random model, an update of it) of --preset."""
    row = train.STAGES.get(args.preset, train.OTHERS)[stage]
    c = PRESETS[args.preset]()
    c.vit.image_size = row.image_size or c.vit.image_size
    c.grid = row.grid or c.grid
    model = random_model(c, args.device)
    samples = random_samples(c, row.rows, row.text, row.answer, spread=0)
    how = dict(row=row, compile=args.compile)
    update, _ = our_side(model, stage, samples, args.device, **how)
    return row, model, update


# ---------------------------------------------------------------------------------------------------
# limit, profile


def limit(args):
    """Model FLOPs utilisation of each stage, against a measured product and the data sheet; and memory, beside --plan's."""
    cuda = args.device == "cuda"
    dtype, n = train.DTYPES[dtype_of(args.device)], 8192 if cuda else 1024
    a = torch.randn(n, n, device=args.device, dtype=dtype)
    rate = 2 * n**3 / typical(partial(torch.mm, a, a), repeat=20)
    del a
    sheet = plan.peak_flops(torch.device(args.device))
    print(f"{args.preset}, {dtype}; FLOP/s: a matmul {rate:.3g} measured, {sheet} by data sheet")
    columns = ("stage", "rows", "ms", "tokens/s", "MFU", "of sheet", "peak GiB", "plan GiB")
    table = Table(*columns)
    for stage in (args.stage,) if args.stage else (1, 2, 3):
        row, model, update = stage_of(args, stage)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        took = typical(update, repeat=5, warmup=2)
        c = model.config
        work = row.rows * sum(flops(c, row.text, row.answer, stage).values()) / took
        planned = plan.memory(model, update.args[0].s)
        planned = sum(n for part, n in planned.items() if part != "CUDA")  # torch counts its own
        tokens = row.rows * (c.visual_tokens + row.text) / took
        of_sheet = work / sheet if sheet else None
        peak = peak_memory(args.device) / GIB
        table.add(stage, row.rows, 1e3 * took, tokens, work / rate, of_sheet, peak, planned / GIB)
        del model, update
    return {"preset": args.preset, "matmul": rate, "sheet": sheet, "rows": table.rows}


def profile(args, most=12):
    """Where the time of an update goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity

    cuda = args.device == "cuda"
    _, _, update = stage_of(args, args.stage or 2)
    update()
    kinds = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(2):
            update()
        if cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, key))
    whole = sum(getattr(e, key) for e in events)
    table = Table("share", "ms", "calls", "kernel")
    for event in events[:most]:
        took = getattr(event, key)
        table.add(took / whole, took / 2e3, event.count // 2, event.key[:60])
    return {"preset": args.preset, "rows": table.rows}


# ---------------------------------------------------------------------------------------------------
# decoding


def decoding(args):
    """Bytes of the LLM's weights that decoding reads per second, beside a plain copy's."""
    c = PRESETS[args.preset]()
    model = random_model(c, args.device).eval().requires_grad_(False)
    named = model.llm.named_parameters()
    size = sum(p.nbytes for name, p in named if c.llm.tied or not name.startswith("embed."))
    copy = copy_bandwidth(args.device)
    S, new = c.vit.image_size, 128 if args.device == "cuda" else 8
    image = torch.zeros(1, 3, S, S, device=args.device, dtype=next(model.parameters()).dtype)
    table = Table("batch", "beams", "tokens/s", "GB/s of weights", "of copy")
    for batch, beams in ((1, 1), (8, 1), (1, 5), (8, 5)):
        prompts = [[1] + [IMAGE] * c.visual_tokens + list(range(5, 25))] * batch
        how = dict(image_index=[0] * batch, max_new_tokens=new, min_new_tokens=new, beams=beams)
        took = typical(partial(generate_ids, model, image, prompts, **how), repeat=3)
        read = new * size / took
        table.add(batch, beams, batch * new / took, read / 1e9, read / copy)
    return {"preset": args.preset, "rows": table.rows}


def grouped(args):
    """Attention of padded rows with grouped queries: by SDPA's own grouping, and with K and V repeated."""
    c = PRESETS[args.preset]().llm
    H, K, hd = c.heads, c.kv_heads, c.head_dim
    B, T = (8, 1024) if args.device == "cuda" else (2, 64)
    dtype = train.DTYPES[dtype_of(args.device)]
    q = torch.randn(B, H, T, hd, device=args.device, dtype=dtype)
    k, v = torch.randn(2, B, K, T, hd, device=args.device, dtype=dtype)
    left = (
        torch.arange(B, device=args.device).view(B, 1, 1, 1) * T // (2 * B)
    )  # padding of each row
    places = torch.arange(T, device=args.device)
    mask = (places <= places[:, None]) & (places >= left)
    mask |= torch.eye(T, dtype=torch.bool, device=args.device)  # padding sees itself
    repeated = [t.repeat_interleave(H // K, 1) for t in (k, v)]
    sides = {
        "mask, enable_gqa": lambda: attend(q, k, v, attn_mask=mask, enable_gqa=True),
        "mask, repeated": lambda: attend(q, *repeated, attn_mask=mask),
        "causal, enable_gqa": lambda: attend(q, k, v, is_causal=True, enable_gqa=True),
        "causal, repeated": lambda: attend(q, *repeated, is_causal=True),
    }
    table = Table("attention", "ms")
    for name, run in sides.items():
        table.add(name, 1e3 * typical(run, repeat=10, warmup=2))
    return {"preset": args.preset, "rows": table.rows}


attend = F.scaled_dot_product_attention


# ---------------------------------------------------------------------------------------------------
# search


def search(args):
    """The pooling kernel with other rows, stages and warps than it chooses."""
    cuda = args.device == "cuda"
    shapes = [(256, 32, 16, 1408), (256, 24, 12, 1024)] if cuda else [(1, 4, 2, 8)]
    grids = [(r, s, w) for r in (1, 2, 4) for s in (1, 2, 3, 4) for w in (1, 2, 4, 8)]
    if not cuda:
        grids = grids[:2]
    dtype = torch.bfloat16 if cuda else torch.float32
    own = pool_triton.tiling, pool_triton.forward_rows, pool_triton.backward_rows
    table = Table("shape", "pass", "rows", "stages", "warps", "ms", "of own")
    for shape in shapes:
        base = [
            took["pool"] for took in times({"pool": pool_triton.pool}, *shape, dtype, args.device)
        ]
        found = {0: [], 1: []}
        for rows, stages, warps in grids:
            patch_tiling(own, rows, stages, warps)
            try:
                both = times({"pool": pool_triton.pool}, *shape, dtype, args.device)
            except Exception:  # it asks for more registers or memory than there are
                continue
            for backward, took in enumerate(both):
                found[backward].append((took["pool"], rows, stages, warps))
        pool_triton.tiling, pool_triton.forward_rows, pool_triton.backward_rows = own
        for backward, name in enumerate(("forward", "fwd + bwd")):
            table.add(str(shape), name, "own", "", "", 1e3 * base[backward], 1.0)
            for took, *how in sorted(found[backward])[:3]:
                table.add(str(shape), name, *how, 1e3 * took, took / base[backward])
    return {"rows": table.rows}


def patch_tiling(own, rows, stages, warps):
    tiling, *_ = own
    pool_triton.tiling = lambda D: tiling(D) | {"STAGES": stages, "num_warps": warps}
    pool_triton.forward_rows = lambda windows, device: rows
    pool_triton.backward_rows = lambda K: rows if K * K % rows == 0 else 1


# ---------------------------------------------------------------------------------------------------
# sharded


def sharded(args, steps=3):
    """Steps of the toy on as many ranks as there are devices, by DDP and by --shard, against a single process."""
    ranks = max(1, torch.cuda.device_count()) if args.device == "cuda" else 2
    if not Path("out/toy").exists():
        toy.write("out/toy")
    flags = f"--stage 3 --init assets/toy --batch 16 --steps {steps} --log-every 1 --dtype fp32"
    flags += f" --eval-every 0 --save-every 0 --score-rows 0 --device {args.device} --workers 0"
    several = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}"
    ways = {"alone": "", f"DDP, {ranks}": several, f"--shard, {ranks}": several}
    table = Table("ranks", "loss", "off by")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for n, (name, launcher) in enumerate(ways.items()):
            more = "--shard" if "shard" in name else ""
            line = f"{launcher} train.py {flags} {more} --out {folder}/{n}"
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *line.split()], capture_output=True, text=True, env=env
            )
            assert done.returncode == 0, f"{name} failed: {(done.stdout + done.stderr)[-500:]}"
            records = map(json.loads, open(f"{folder}/{n}/log.jsonl"))
            losses = [record["loss"] for record in records if "loss" in record]
            first = first or losses
            off = max(abs(a - b) / a for a, b in zip(first, losses, strict=True))
            assert off < 1e-4, f"{name}: losses {losses} where a single process has {first}"
            table.add(name, losses[-1], off)
    return {"rows": table.rows}
