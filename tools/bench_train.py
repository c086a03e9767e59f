"""Training, against transformers' LLaVA with the same weights, batch and frozen parts."""

import ctypes
import gc
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
import weights
from data import collate
from model import (
    CLIP_L,
    IGNORE,
    IMAGE,
    PIXEL_MEAN,
    PIXEL_STD,
    PRESETS,
    TUNE,
    LlamaConfig,
    ViTConfig,
)
from support import plan, start
from support.ranks import Ranks
from tools.measure import Table, in_turns, seconds, update_clock

# ---------------------------------------------------------------------------------------------------
# The two sides


def shape(name, stage):
    """(ViT, LLM, rows, mean text tokens of a row, how many are supervised) of a LLaVA, which pools nothing."""
    if name == "toy":  # 64 visual tokens an image, and in 100M
        toy, row = PRESETS["toy"](), train.TOY[stage]
        return toy.vit, toy.llm, 64, row.text, row.answer
    if name == "100M":
        vit = ViTConfig(112, 14, 512, 8, 8, 2048)
        return vit, LlamaConfig(32000, 512, 12, 8, 8, 1408), 8, 96, 32
    return ViTConfig(**CLIP_L), PRESETS["llava-7b"]().llm, 8, 96, 32


def llava_pair(vit, llm, device):
    """One LLaVA with random weights: transformers', and the same loaded from its saved folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    vision = transformers.CLIPVisionConfig(
        hidden_size=vit.width,
        intermediate_size=vit.mlp,
        num_hidden_layers=vit.layers + 1,
        num_attention_heads=vit.heads,
        image_size=vit.image_size,
        patch_size=vit.patch,
    )
    text = transformers.LlamaConfig(
        vocab_size=llm.vocab,
        hidden_size=llm.width,
        intermediate_size=llm.mlp,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        max_position_embeddings=llm.context,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=llm.vocab - 1
    )
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(20)  # clear winners: rounding decides no token
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs.to(device), weights.load_llava(folder).to(device)


def random_samples(c, rows, text, answer, spread=0.5):
    """Samples with an image in each, of unequal length: half to one and a half times the typical text."""
    rng = np.random.default_rng(0)
    S = c.vit.image_size
    samples = []
    for _ in range(rows):
        length = int(rng.integers((1 - spread) * text, (1 + spread) * text + 1))
        said = length * answer // text
        ids = [1] + [IMAGE] * c.visual_tokens + rng.integers(3, c.llm.vocab - 1, length).tolist()
        picture = rng.integers(0, 256, (S, S, 3), dtype=np.uint8)
        samples.append((ids[:-1], [IGNORE] * (len(ids) - 1 - said) + ids[-said:], [picture]))
    return sorted(samples, key=lambda sample: len(sample[0]))


def batch_of(samples, c, device):
    bucket = 16 if device == "cuda" else 1  # as train.py
    return collate(samples, 0, c.visual_tokens, c.vit.image_size, bucket)


def make_run(model, s, ranks):
    """A train.Run that is ready for updates, without data."""
    run = train.Run(s, ranks, model, tokenizer=None, data=None, held_out=None)
    train.place(run)
    run.optimizer = train.make_optimizer(model, s)
    run.meters = train.new_meters(ranks.device)
    return run


def update_run(run, batches, supervised):
    train.update(run, train.gradients(run, batches, supervised), supervised)


def our_side(model, stage, samples, device, micro=1, row=None, **settings):
    """An update as train.py makes it, in `micro` micro-batches of like length; and its gradients alone, which
    return the loss per token."""
    row = asdict(row or train.TOY[stage])
    row |= dict(stage=stage, preset="", tune=TUNE[stage], accum=micro, out=Path())
    s = train.Settings(**row | {"dtype": dtype_of(device)} | settings)
    run = make_run(model.freeze(stage), s, Ranks(0, 1, torch.device(device)))
    size = len(samples) // micro
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    batches = [batch_of(part, model.config, device) for part in parts]
    supervised = sum(batch.supervised for batch in batches)

    def gradients():
        return train.gradients(run, batches, supervised) / supervised

    return partial(update_run, run, batches, supervised), gradients


def their_side(model, stage, samples, c, device):
    """The same with transformers' LLaVA and torch's fused AdamW, as its Trainer would."""
    for name, p in model.train().named_parameters():
        vit = "vision_tower" in name
        qv = name.endswith(("q_proj.weight", "v_proj.weight"))
        adapter = "multi_modal_projector" in name
        p.requires_grad_(adapter or (stage == 2 and (vit or qv)) or (stage == 3 and not vit))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=train.BETAS, fused=True)
    batch = collate(samples, 0, c.visual_tokens, c.vit.image_size, bucket=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    tokens = torch.where(batch.tokens == IMAGE, model.config.image_token_id, batch.tokens)
    inputs = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "pixel_values": ((batch.images / 255 - mean) / std).contiguous(),
        "labels": batch.targets,
        "shift_labels": batch.targets,
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

    def gradients():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    def update():
        gradients()
        torch.nn.utils.clip_grad_norm_(params, train.CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return update, gradients


def dtype_of(device):
    return "bf16" if device == "cuda" else "fp32"


def shapes_and_stages(args):
    return [(name, stage) for name in args.shapes.split(",") for stage in (1, 2, 3)]


def one_side(side, pair, name, stage, args):
    """(update, gradients) of "ours" or "transformers"."""
    theirs, ours = pair
    _, _, rows, text, answer = shape(name, stage)
    samples = random_samples(ours.config, rows, text, answer)
    if side == "ours":
        return our_side(ours.to(args.device), stage, samples, args.device, args.micro)
    return their_side(theirs.to(args.device), stage, samples, ours.config, args.device)


# ---------------------------------------------------------------------------------------------------
# step


def counted(gradients):
    """-> FLOPs by torch's counter, causal attention counted whole; and the loss"""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = gradients()
    return counter.get_total_flops(), float(loss)


def step(args):
    """Rows per second against transformers' LLaVA, in turns, the best of --repeat."""
    table = Table(
        *("shape", "stage", "ours rows/s", "transformers", "x", "FLOPs allow"),
        *("our loss", "their loss"),
    )
    for name, stage in shapes_and_stages(args):
        vit, llm, rows, *_ = shape(name, stage)
        pair = llava_pair(vit, llm, args.device)
        ours, our_gradients = one_side("ours", pair, name, stage, args)
        theirs, their_gradients = one_side("transformers", pair, name, stage, args)
        our_flops, our_loss = counted(our_gradients)
        their_flops, their_loss = counted(their_gradients)
        clock = update_clock(args.device)
        took = in_turns({"ours": ours, "transformers": theirs}, args.repeat, clock)
        rates = [rows / t for t in took.values()]
        x, allowed = rates[0] / rates[1], their_flops / our_flops
        table.add(name, stage, *rates, x, allowed, our_loss, their_loss)
    return {"rows": table.rows}


# ---------------------------------------------------------------------------------------------------
# memory


def process_memory(key):
    """VmRSS, what this process holds, or VmHWM, the most that it has held; bytes."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024


def peak_memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_memory("VmHWM")


def peak_of(side, name, stage, args, out):
    """A process: one update to warm up; then the next one's peak above what stays and gradients, and its time."""
    vit, llm, *_ = shape(name, stage)
    pair = llava_pair(vit, llm, "cpu")
    model = pair[side == "ours"]
    update, _ = one_side(side, pair, name, stage, args)
    del pair
    update()
    gc.collect()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed shall count as free
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        before = process_memory("VmRSS")
    took = update_clock(args.device)(update)
    out.put((peak_memory(args.device) - before - gradients, took))


def memory(args):
    """Peak of an update above weights, gradients, optimizer state and libraries, against transformers'."""
    spawn = multiprocessing.get_context("spawn")
    table = Table("shape", "stage", "our MB", "their MB", "share", "our s", "their s")
    for name, stage in shapes_and_stages(args):
        found = []
        for side in ("ours", "transformers"):
            out = spawn.SimpleQueue()
            child = spawn.Process(target=peak_of, args=(side, name, stage, args, out))
            child.start()
            found.append(out.get())
            child.join()
        (ours, our_time), (theirs, their_time) = found
        table.add(name, stage, ours / 1e6, theirs / 1e6, ours / theirs, our_time, their_time)
    return {"rows": table.rows, "micro": args.micro}


# ---------------------------------------------------------------------------------------------------
# loop


def loop(args, steps=40):
    """What the training loop costs beside its work: a step's time less loading, gradients and optimizer."""
    clock = {}

    def timed(name, function):
        def call(*inputs):
            start = time.perf_counter()
            result = function(*inputs)
            clock[name] = clock.get(name, 0) + 1e3 * (time.perf_counter() - start) / steps
            return result

        return call

    train.gradients = timed("gradients", train.gradients)
    torch.optim.AdamW.step = timed("optimizer", torch.optim.AdamW.step)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        init = "assets/toy"
        for stage in (1, 2, 3):
            out = f"{folder}/stage{stage}"
            argv = f"--stage {stage} --init {init} --out {out} --steps {steps} --log-every {steps}"
            argv += f" --eval-every 0 --save-every 0 --device {args.device}"
            clock.clear()
            assert train.main(argv.split()) == 0, "the run failed; see above"
            *_, last = open(f"{out}/log.jsonl")
            took = json.loads(last)["seconds"]
            runs.append((stage, 1e3 * took["step"], 1e3 * took["load"], *clock.values()))
            init = out
    table = Table("stage", "step ms", "loading", "gradients", "optimizer", "loop", "share")
    for stage, whole, *parts in runs:
        rest = whole - sum(parts)
        table.add(stage, whole, *parts, rest, rest / whole)
    return {"rows": table.rows}


# ---------------------------------------------------------------------------------------------------
# tune


def tune(args, steps=12):
    """Four ways to train an LLM, stage 2's mixture, the toy's sizes: what trains, what is held as --plan
    calculates it, how long a step takes."""
    ranks = Ranks(0, 1, torch.device(args.device))
    runs = {}
    for name in ("inner", "lora", "qv", "full"):
        argv = f"--stage 3 --init assets/toy --data out/toy/stage2.toml --tune {name}"
        with tempfile.TemporaryDirectory() as folder:
            s = train.resolve(train.flags().parse_args([*argv.split(), "--out", folder]), 3, 1)
        model, _ = start.build(s, say=False)
        runs[name] = make_run(model.freeze(3, s.tune), s, ranks)
    tokenizer = start.find_tokenizer(s, model.config)
    data, _ = train.open_data(s, model.config, tokenizer, ranks)
    times = {name: [] for name in runs}
    for batches in data.batches(steps=steps, accum=s.accum):
        supervised = sum(batch.supervised for batch in batches)
        for name, run in runs.items():  # in turns, on the same batches
            update = partial(update_run, run, batches, supervised)
            times[name].append(1e3 * seconds(update))
    held = ("weights", "gradients", "optimizer", "activations")
    table = Table("LLM trains", "trained", "frozen", *(f"{part} MB" for part in held), "step ms")
    for name, run in runs.items():
        counts = [sum(n) for n in zip(*plan.sizes(run.model).values())]
        parts = plan.memory(run.model, run.s)
        table.add(name, *counts, *(parts[part] / 1e6 for part in held), median(times[name]))
    return {"steps": steps, "rows": table.rows}
