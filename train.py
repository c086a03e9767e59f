"""The three stages of InfMLLM, one loop; the same update on one process and on many.

    python train.py --stage 1                     # nothing named: draws the toy world and trains its adapter
    python train.py --stage all                   # the three stages in a row, each from the one before
    python train.py --stage 2 --resume            # the run in out/stage2 goes on, exactly
    python train.py --stage 3 --preset infmllm-7b --gpus 8x80 --shard --plan        # what it would take; trains nothing
    torchrun --nproc_per_node 8 train.py --stage 1 --preset infmllm-7b --vit eva_vit_g.pth --llm vicuna-7b-v1.5/ \
        --data recipes/stage1.toml
    python train.py --stage 2 --tune inner --branch mm --out out/mm      # inner adaptors; the LLM stays as it is
    python train.py --plot out/stage1             # the loss curve

What trains in which stage says model.trains(); with what, the table below. A run writes to out/stageN: checkpoints
step-00000100/, log.jsonl (a record a logged step) and loss.png.
"""

import argparse
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import model as models
import weights
from adapter import pool_path
from data import BUCKET, Data, collate
from formats.mixture import load_mixture
from support import metrics
from support.errors import BadInput, complain
from support.log import Log, measured_time, peak_memory, plot, stage_table
from support.plan import GIB, PARTS, arithmetic, counted, describe, peak_flops, total_memory, tuning
from support.processes import at_once, end_loaders, on_signals
from support.ranks import Ranks, setup_ranks
from support.start import (
    base_of,
    build,
    described,
    find_tokenizer,
    inner_layers,
    out_folder,
    start_from,
)
from text.boxes import parse_box
from text.templates import TASKS
from text.tokenizer import Tokenizer

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import


# ---------------------------------------------------------------------------------------------------------------------
# The stages. [published] stands in the paper or the released code, [LLaVA-1.5] in theirs; the rest is our choice.
@dataclass(frozen=True)
class Stage:
    steps: int  # updates
    batch: int  # rows per update, over all ranks
    rows: int  # rows a rank takes at once, at most: --accum follows from it
    lr: dict  # peak learning rate of each part that trains
    image_size: int | None  # pixels per side; None: the preset's own
    grid: int | None  # P, visual tokens per side; None: the preset's own
    warmup: float = (
        0.03  # share of the steps; a cosine to zero follows                            [LLaVA-1.5]
    )
    weight_decay: float = (
        0.0  # of matrices; never of norms, biases, positions, queries                 [LLaVA-1.5]
    )
    recompute: bool = (
        False  # keep no activations inside a layer, compute them again: a third more work
    )
    text: int = 64  # text tokens of a typical row and ...
    answer: int = 16  # ... how many of them are supervised: for --plan, where no data is named


TOY = {
    1: Stage(300, 64, 64, {"adapter": 5e-3}, None, None),
    2: Stage(
        1000, 64, 64, {"vit": 3e-4, "adapter": 5e-3, "llm": 1e-3}, None, None, weight_decay=0.01
    ),
    3: Stage(
        400,
        64,
        64,
        {"adapter": 3e-4, "llm": 3e-4},
        None,
        None,
        weight_decay=0.01,
        text=160,
        answer=48,
    ),
}

PAPER = {
    # batch 1024, 224 px, alignment on web-scale pairs [published]; a projector's 1e-3 [LLaVA-1.5]
    1: Stage(60000, 1024, 8, {"adapter": 1e-3}, 224, 16, text=32, answer=24),
    # 448 px, ViT + adapter + Q and V [published]
    2: Stage(
        30000,
        256,
        32,
        {"vit": 1e-5, "adapter": 5e-5, "llm": 2e-5},
        448,
        16,
        weight_decay=0.05,
        recompute=True,
    ),
    # 448 px, 256 visual tokens, LLaVA's 665k conversations [published]; batch 128, 2e-5, one epoch [LLaVA-1.5]
    3: Stage(
        5197, 128, 16, {"adapter": 2e-5, "llm": 2e-5}, 448, 16, recompute=True, text=448, answer=192
    ),
}

STAGES = {"toy": TOY, "infmllm-7b": PAPER, "infmllm-13b": PAPER}

OTHERS = {
    n: replace(s, image_size=None, grid=None) for n, s in PAPER.items()
}  # small, llava-7b: their own sizes

BETAS, EPS = (0.9, 0.95), 1e-8  # AdamW's; 0.95 forgets a bad batch sooner than torch's 0.999

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter

CLIP = 1.0  # the gradient's global norm is cut to this

PATIENCE = 3  # updates in a row without a finite gradient, after which the run stops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


# ---------------------------------------------------------------------------------------------------------------------
# Flags
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: {message}; python train.py --help lists the flags\n")


def rates(text):
    """'1e-3' for every part, or 'adapter=1e-3,llm=2e-5' for those named."""
    pairs = [pair.rpartition("=") for pair in text.split(",")]
    lr = {part: float(value) for part, _, value in pairs}
    if set(lr) - {"", *PARTS} or "" in lr and len(lr) > 1:
        raise ValueError
    if not all(0 <= x < math.inf for x in lr.values()):
        raise ValueError
    return lr


def between(kind, low, high=math.inf):
    def number(text):
        if not low <= (value := kind(text)) <= high:
            raise ValueError
        return value

    number.__name__ = f"number from {low}" + (f" to {high}" if high < math.inf else "")
    return number


def numbers(text):
    return sorted({int(n) for n in text.split(",")})


def word(text):
    if not text.isidentifier():
        raise ValueError
    return text


def gpus(text):
    count, _, size = text.lower().partition("x")
    return between(int, 1)(count), between(float, 1)(size)


rates.__name__, gpus.__name__ = (
    "learning rate (1e-3, or adapter=1e-3,llm=2e-5)",
    "number x GiB (8x80)",
)

numbers.__name__ = "list of layers (0,1,5,6)"


def flags():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add(
        "--stage",
        choices=("1", "2", "3", "all"),
        help="which row of the table; all: the three in a row",
    )
    add(
        "--preset",
        choices=sorted(models.PRESETS),
        help="architecture and table; default: --init's own, or toy",
    )
    add("--data", help="mixture of training data, a TOML file; default: the toy world in out/toy")
    add(
        "--eval-data",
        help="mixture held out; default: heldout.toml beside --data, where there is one",
    )
    add(
        "--init",
        help="start from this checkpoint, whole; default: the stage before (toy stage 1: assets/toy)",
    )
    add("--vit", help="take the ViT from here: eva_vit_g.pth, a CLIP or a BLIP-2 folder")
    add("--llm", help="take the LLM from here: a LLaMA or Vicuna folder")
    add("--tokenizer", help="sentencepiece model; default: the one beside --llm or --init")
    add(
        "--out",
        help="folder of the run; default: out/stageN (with --stage all: the folder of the three)",
    )
    add("--resume", action="store_true", help="go on with the run in --out; its own settings hold")
    add("--steps", type=between(int, 1), help="updates")
    add("--batch", type=between(int, 1), help="rows per update over all ranks")
    add("--accum", type=between(int, 1), help="micro-batches per rank and update")
    add(
        "--lr",
        type=rates,
        help="peak learning rate, for all parts (1e-3) or by part (adapter=1e-3,llm=2e-5)",
    )
    add(
        "--warmup",
        type=between(float, 0, 1),
        help="share of the steps in which the learning rate rises",
    )
    add("--weight-decay", type=between(float, 0), help="AdamW's, of matrices only")
    add("--image-size", type=between(int, 1), help="pixels per side")
    add("--grid", type=between(int, 1), help="P: an image becomes P x P visual tokens")
    add(
        "--tune",
        choices=("none", "qv", "full", "inner"),
        help="what of the LLM trains; default: none, qv, full in "
        "stages 1, 2, 3; inner: the layers, ends and adapter of a branch, and nothing of the model it is added to",
    )
    add("--branch", type=word, help="with --tune inner: the branch's name; default mm")
    add(
        "--inner-layers",
        type=numbers,
        help="with --tune inner: after which layers one of its own runs (0,1,5,6); "
        "default: all, of 32 those of IAA",
    )
    add(
        "--adapter",
        choices=("pool", "resampler", "mlp"),
        help="kind of adapter; another than --init's starts fresh",
    )
    add(
        "--recompute",
        action=on_off,
        help="activation checkpointing: less memory, a third more work",
    )
    add("--seed", type=between(int, 0), help="of the batches and of fresh weights; default 0")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add(
        "--dtype",
        choices=list(DTYPES),
        help="of the arithmetic; default: bf16 on cuda, fp32 on cpu; fp64 is for tests",
    )
    add(
        "--workers",
        type=between(int, 0),
        help="loader processes per rank; default 8 on cuda, 1 on cpu",
    )
    add(
        "--shard",
        action="store_true",
        help="spread weights, gradients and optimizer over the ranks (fully_shard)",
    )
    add("--compile", action="store_true", help="torch.compile each layer")
    add("--log-every", type=between(int, 1), default=10, help="steps between records of log.jsonl")
    add(
        "--eval-every",
        type=between(int, 0),
        help="steps between held-out evaluations; 0: never; default: 4 a run",
    )
    add("--eval-rows", type=between(int, 1), default=128, help="held-out rows of each evaluation")
    add(
        "--score-rows",
        type=between(int, 0),
        default=100,
        help="held-out rows of each source that are answered and "
        "scored at the end, where one process trains; 0: none",
    )
    add(
        "--save-every",
        type=between(int, 0),
        help="steps between checkpoints; 0: the last alone; default: 4 a run",
    )
    add(
        "--save-minutes",
        type=between(float, 0),
        default=30,
        help="a checkpoint also after so many minutes; 0: never",
    )
    add("--keep", type=between(int, 1), default=2, help="so many of the newest checkpoints stay")
    add(
        "--max-bad",
        type=between(float, 0, 1),
        default=0.01,
        help="share of unreadable samples that is put up with",
    )
    add(
        "--timeout",
        type=between(float, 1),
        default=1800,
        help="seconds that ranks wait for one another, the longest "
        "while rank 0 saves; after that the job ends",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write the records of log.jsonl for tensorboard too",
    )
    add(
        "--plan",
        action="store_true",
        help="print what would happen and what it would take; train nothing",
    )
    add("--gpus", type=gpus, help="for --plan: how many GPUs of how many GiB, such as 8x80")
    add("--plot", metavar="DIR", help="draw DIR/loss.png from DIR/log.jsonl, and do nothing else")
    return p


LASTING = (
    "preset",
    "data",
    "steps",
    "batch",
    "lr",
    "warmup",
    "weight_decay",
    "image_size",
    "grid",
    "adapter",
    "seed",
    "dtype",
    "tune",
    "branch",
    "inner_layers",
)  # what makes a run this run: resuming takes no others


def settle(args, stage, world, stored=None, preset=None):
    """Flags over stored settings over the stage's row of the table, as one flat dictionary, checked."""
    stored = stored or {}
    if stored.get("stage", stage) != stage:
        raise BadInput(
            f"--stage {stage}: {out_folder(args, stage)} is of stage {stored['stage']}; resume that"
        )
    preset = args.preset or stored.get("preset") or preset or "toy"
    table = STAGES.get(preset, OTHERS)
    tune = args.tune or stored.get("tune") or models.TUNE[stage]
    row = asdict(table[stage]) | {
        "lr": peaks(table, stage, tune),
        "seed": 0,
        "adapter": None,
        "dtype": None,
        "preset": preset,
        "tune": tune,
        "branch": "mm",
        "inner_layers": None,
    }
    given = {k: v for k, v in vars(args).items() if v is not None and (k in row or k in LASTING)}
    if tune != "inner" and {"branch", "inner_layers"} & set(given):
        raise BadInput("--branch and --inner-layers describe what --tune inner trains; add it")
    if "lr" in given:
        given["lr"] = merged_rates(given["lr"], row["lr"], stage)
    if "data" in given:
        given["data"] = str(Path(given["data"]))
    for key in LASTING if stored else ():
        if key in given and given[key] != stored.get(key):
            raise BadInput(
                f"--{key.replace('_', '-')}: the run in {out_folder(args, stage)} has {stored.get(key)} and "
                f"not {given[key]}; leave it out to resume, or name another --out"
            )
    s = row | {k: stored[k] for k in LASTING if k in stored} | given
    s["stage"] = stage
    s["data"] = s.get("data") or (f"out/toy/stage{stage}.toml" if preset == "toy" else None)
    if not s["data"] and not args.plan:
        raise BadInput(
            f"--data: {preset} has no data of its own; name a mixture, such as recipes/stage{stage}.toml"
        )
    few = max(1, math.ceil(s["batch"] / (world * s["rows"])))
    s["accum"] = args.accum or next(
        (n for n in range(few, 8 * few) if s["batch"] % (world * n) == 0), few
    )
    if s["batch"] % (world * s["accum"]):
        raise BadInput(
            f"--batch {s['batch']} is not divisible by {world} ranks x {s['accum']} micro-batches; "
            f"the nearest that is: {max(1, round(s['batch'] / world / s['accum'])) * world * s['accum']}"
        )
    s["rows"] = s["batch"] // (world * s["accum"])
    return s


def peaks(table, stage, tune):
    """The table's learning rates for what trains; where its own stage leaves the LLM alone, stage 3's for that."""
    lr = {"llm": table[3].lr["llm"]} | table[stage].lr
    frozen = {"none": ("llm",), "inner": ("vit",)}.get(tune, ())
    return {part: lr[part] for part in PARTS if part in lr and part not in frozen}


def merged_rates(given, row, stage):
    if "" in given:
        return dict.fromkeys(row, given[""])
    for part in given:
        if part not in row:
            raise BadInput(f"--lr {part}=...: stage {stage} keeps the {part} frozen; leave it out")
    return row | given


def contradictions(args):
    """Flags that cannot both be meant."""
    if args.shard and "RANK" not in os.environ and not args.plan:
        raise BadInput(
            "--shard spreads the state over several ranks: start with torchrun --nproc_per_node N train.py"
        )
    if args.gpus and not args.plan:
        raise BadInput("--gpus describes machines to --plan alone; add --plan")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            "--device cuda: this machine shows torch no GPU; leave it out to train on the CPU"
        )
    if args.stage == "all" and args.data:
        raise BadInput("--data is one stage's; run --stage 1, 2 and 3 one by one")


@dataclass
class Run:
    """All that the loop needs."""

    s: dict  # settings: settle()
    args: argparse.Namespace
    out: Path
    ranks: "Ranks"
    model: models.InfMLLM
    net: torch.nn.Module = None  # the model, or DDP around it: what a forward pass calls
    tokenizer: Tokenizer = None
    data: Data = None
    held_out: Data = None
    optimizer: torch.optim.AdamW = None
    base: Path = None  # the checkpoint that a branch in training belongs to
    originals: dict = (
        None  # frozen tensors as they were before they were rounded for speed: what is saved
    )
    meters: dict = None  # 0-d float64 tensors on the device, read when something is logged
    step: int = 0  # updates done
    bad: int = 0  # samples that could not be read, over all ranks

    def __post_init__(self):
        self.rank, self.world, self.device, self.agree = (
            self.ranks.rank,
            self.ranks.world,
            self.ranks.device,
            self.ranks.agree,
        )

    @property
    def dtype(self):
        return DTYPES[self.s["dtype"]]

    def autocast(self):
        # no cache: it would keep a bf16 copy of every trained weight until the forward pass ends
        return torch.autocast(
            self.device.type, torch.bfloat16, self.dtype == torch.bfloat16, cache_enabled=False
        )


def cast(module, dtype, keep, device="cpu", prefix=""):
    """Masters of what trains in fp32, what is frozen in the dtype of the arithmetic. What loses bits goes to `keep`."""
    master, finite = torch.promote_types(dtype, torch.float32), {}
    for name, p in module.named_parameters(prefix):
        if hasattr(p, "full_tensor"):
            continue  # sharded, and cast before that
        to = master if p.requires_grad else dtype
        if not p.requires_grad and p.dtype != to and keep is not None:
            keep[name] = p.data
        p.data = p.data.to(device, to)
        finite[name] = torch.isfinite(p).all()
    for name, ok in finite.items():
        if not ok:
            raise BadInput(f"{name}: the weights to start from are not finite; take others")


def place(run):
    """Cast, move, and set up DDP or sharding."""
    m, args = run.model, run.args
    run.originals = {} if run.rank == 0 and not run.base else None
    m.vit.recompute = m.llm.recompute = run.s["recompute"]
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one a bucket of shapes
        for layer in models.every_layer(m):
            layer.compile(dynamic=False)
    run.net = m
    if args.shard:
        return shard(run)
    cast(m, run.dtype, run.originals, run.device)
    if run.world > 1:
        run.net = torch.nn.parallel.DistributedDataParallel(m, gradient_as_bucket_view=True)


def shard(run):
    """A group per ViT block and LLM layer, and one for the rest. Moves a layer at a time: no device holds them all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(run.device.type, (run.world,))
    half = run.dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32 if half else None)
    names = {module: name for name, module in run.model.named_modules()}
    for module in (*models.every_layer(run.model), run.model):
        cast(module, run.dtype, run.originals, prefix=names[module])
        fully_shard(module, mesh=mesh, mp_policy=policy)


def whole(p):
    """A tensor in one piece on the CPU; of a sharded one every rank must ask for it."""
    p = p.detach()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).cpu()


def same_everywhere(run):
    """A rank that was started with other flags or sees other data would train something that nobody asked for."""
    mine = json.dumps([run.s, run.data.counts, run.data.digest], sort_keys=True, default=str)
    digest = zlib.crc32(mine.encode())
    if run.agree(digest)[0] != digest * run.world:
        raise BadInput(
            f"rank {run.rank} of {run.world}: the ranks differ in flags or data; start all with the same"
        )


# ---------------------------------------------------------------------------------------------------------------------
# One update
def learning_rate(s, step):
    """Share of the peak: a linear rise, then a cosine to zero."""
    rise = max(1, round(s["warmup"] * s["steps"]))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, s["steps"] - rise)))


def make_optimizer(run):
    """A group per part, matrices apart from what must not decay."""
    groups = {}
    for name, p in run.model.named_parameters():
        if not p.requires_grad:
            continue
        matrix = p.ndim >= 2 and name.rpartition(".")[2] not in ("positions", "queries")
        groups.setdefault((models.part_of(name), matrix), []).append(p)
    run.optimizer = torch.optim.AdamW(
        [
            {
                "params": params,
                "peak": run.s["lr"][part],
                "weight_decay": run.s["weight_decay"] * matrix,
            }
            for (part, matrix), params in groups.items()
        ],
        betas=BETAS,
        eps=EPS,
        fused=True,
    )
    for p in (
        p for params in groups.values() for p in params
    ):  # torch would wait for the first step, and a
        run.optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),  # checkpoint is read before it
            **{key: torch.zeros_like(p) for key in MOMENTS},
        }
    run.meters = {
        name: torch.zeros((), dtype=torch.float64, device=run.device)
        for name in ("loss", "tokens", "norm", "skipped", "row", "worst")
    }


def gradients(run, batches, supervised):
    """Those of sum(loss) / sum(supervised tokens), sums over all ranks and micro-batches. -> this rank's sum(loss)"""
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for i, batch in enumerate(batches):
        batch = batch.to(run.device, non_blocking=True)
        # DDP sends gradients with the last micro-batch alone; a sharded run has no room to hold back whole ones
        hold = run.net is not run.model and i + 1 < len(batches)
        with run.net.no_sync() if hold else nullcontext():
            with run.autocast():
                loss = run.net(
                    batch.images, batch.tokens, batch.targets, batch.image_at, batch.target_at
                )
            (
                loss * (run.world / supervised)
            ).backward()  # both DDP and fully_shard average over ranks
        total += loss.detach()
    return total


def update(run, batches, supervised):
    """One step of the optimizer. Nothing in here waits for the device."""
    loss = gradients(run, batches, supervised)
    if run.world > 1:
        dist.all_reduce(loss)
    norm = torch.nn.utils.get_total_norm(
        [p.grad for group in run.optimizer.param_groups for p in group["params"]]
    )
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    bad, m = ~(torch.isfinite(norm) & torch.isfinite(loss)), run.meters
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rate(run.s, run.step)
    # torch's GradScaler tells the fused kernel so: it divides gradients by grad_scale, which is all that clipping
    # takes, and where found_inf is 1 it leaves parameters and moments as they were
    run.optimizer.grad_scale, run.optimizer.found_inf = (
        (norm / CLIP).clamp(min=1).float(),
        bad.float(),
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    m["loss"] += torch.where(bad, 0.0, loss)
    m["tokens"] += torch.where(bad, 0.0, supervised)
    m["norm"] = norm.double()
    m["skipped"] += bad
    m["row"] = (m["row"] + 1) * bad
    m["worst"] = torch.maximum(m["worst"], m["row"])
    run.step += 1


def read_meters(run):
    """The device's counters as numbers: waits for it. Loss and tokens begin anew."""
    values = dict(zip(run.meters, torch.stack(list(run.meters.values())).tolist()))
    run.meters["loss"].zero_(), run.meters["tokens"].zero_()
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
def save(run):
    """Write out/stageN/step-K and drop what is older than the last --keep. Every rank takes part, rank 0 writes."""
    path = run.out / f"step-{run.step:08d}"
    tensors, optimizer = {}, {}
    for name, p in run.model.named_parameters():
        if run.base and not p.requires_grad:
            continue  # a branch is saved without its base
        if run.rank and not hasattr(p, "full_tensor"):
            continue  # every rank has it in one piece
        tensors[name] = whole(p)
        if p.requires_grad:
            optimizer |= {f"{name}.{key}": whole(run.optimizer.state[p][key]) for key in MOMENTS}
        if run.rank:
            tensors, optimizer = {}, {}  # it has helped to gather, and keeps none of it
    if run.rank:
        return path
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise BadInput(
                f"step {run.step}: {name} is no longer finite and is not saved; {whole_one(run.out)}; "
                "lower --lr"
            )
    tensors |= run.originals or {}
    meters = {k: v.item() for k, v in run.meters.items() if k not in ("norm", "worst")}
    state = {
        "step": run.step,
        "settings": run.s,
        "meters": meters,
        "counts": run.data.counts,
        "digest": run.data.digest,
        "bad": run.bad,
    }
    training = {k: run.s[k] for k in ("stage", *LASTING)} | {"step": run.step}
    try:
        weights.save(
            path,
            (run.model.config, tensors),
            run.tokenizer,
            training,
            optimizer | {"steps": next(iter(run.optimizer.state.values()))["step"]},
            state,
            run.base,
        )
        prune(run.out, run.args.keep)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(path.with_name(path.name + ".new"), ignore_errors=True)
        raise BadInput(
            f"{path}: the checkpoint cannot be written ({e}); {whole_one(run.out)}; "
            "make room and --resume"
        ) from None
    return path


def whole_one(out):
    steps = sorted(p.name for p in out.glob("step-*") if p.name[5:].isdigit())
    return f"the last whole one is {out / steps[-1]}" if steps else "there is none before it"


def prune(out, keep):
    steps = sorted(p for p in out.glob("step-*") if p.name[5:].isdigit())
    for old in [*steps[:-keep], *out.glob("step-*.new")]:
        shutil.rmtree(old, True)  # .new: a save that was killed


def restore(run, path, state):
    """Optimizer, counters and place in the data, so that the run goes on as if it had not stopped."""
    run.bad = state["bad"]
    if run.rank == 0:
        run.data.bad = run.bad  # the ranks' counts are summed
    run.meters = {k: v + state["meters"].get(k, 0.0) for k, v in run.meters.items()}
    if (state["counts"], state.get("digest", run.data.digest)) != (
        run.data.counts,
        run.data.digest,
    ):
        raise BadInput(
            f"{run.s['data']}: the data have changed since {path} ({state['counts']}, now {run.data.counts} "
            f"or other texts); bring the old ones back, or start a new run with --init {path}"
        )
    stored = weights.load_tensors(path / "optimizer.safetensors")
    slots = {
        f"{name}.{key}": run.optimizer.state[p][key]
        for name, p in run.model.named_parameters()
        if p.requires_grad
        for key in MOMENTS
    }
    if odd := sorted(set(stored) ^ {"steps", *slots}):
        raise BadInput(
            f"{path}: its optimizer state is another model's ({', '.join(odd[:5])}); take another"
        )
    for key, slot in slots.items():
        slot.copy_(like(slot, stored[key]))
    for state in run.optimizer.state.values():
        state["step"].copy_(stored["steps"])


def like(p, full):
    """A whole tensor, placed and sharded as p is."""
    if not hasattr(p, "full_tensor"):
        return full.to(p.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(p.device), p.device_mesh, p.placements)


# ---------------------------------------------------------------------------------------------------------------------
# The loop, and what a person sees of it
def train(run, asked):
    """Updates until --steps, or until one of the ranks is asked to leave. -> whether all were done"""
    s, args = run.s, run.args
    log, peak = (
        Log(run.out, run.step, s["steps"], run.rank, args.tensorboard),
        peak_flops(run.device),
    )
    quarter = math.ceil(s["steps"] / 4)
    save_every, eval_every = (
        quarter if n is None else n or math.inf for n in (args.save_every, args.eval_every)
    )
    saved, saved_at = time.monotonic(), run.step
    if run.step == 0 and eval_every < math.inf:
        show(run, log)
    stream = run.data.batches(
        run.step,
        s["steps"] - run.step,
        run.rank,
        run.world,
        s["accum"],
        args.workers,
        pin=run.device.type == "cuda",
    )
    while run.step < s["steps"]:
        start = time.perf_counter()
        batches = next(stream)
        loaded = time.perf_counter()
        due = run.rank == 0 and 0 < args.save_minutes * 60 < time.monotonic() - saved
        supervised, bad, due, leave = run.agree(
            sum(b.supervised for b in batches), run.data.bad, due, len(asked)
        )
        if leave:
            break
        check(run, batches, supervised, bad)
        if peak:
            log.flops += sum(arithmetic(run.model.config, s, b) for b in batches) * run.world
        update(run, batches, supervised)
        log.seconds["load"] += loaded - start
        log.seconds["update"] += time.perf_counter() - loaded
        log.bar.update()
        last = run.step == s["steps"]
        if run.step % args.log_every == 0 or last:
            progress(run, log, peak)
        if run.step % save_every == 0 or due or last:
            start = time.perf_counter()
            log.say(f"saved {save(run)}")
            log.seconds["save"] += time.perf_counter() - start
            saved, saved_at = time.monotonic(), run.step
        if eval_every < math.inf and (run.step % eval_every == 0 or last):
            show(run, log)
    stream.close()
    if saved_at != run.step:
        log.say(f"saved {save(run)}")
    log.bar.close()
    if run.rank == 0:
        print(f"memory of a rank at its peak, measured: {peak_memory(run.device) / GIB:.2f} GiB")
    return run.step == s["steps"]


def check(run, batches, supervised, bad):
    """Name what could not be read, and stop where there is too much of it or nothing to learn."""
    s, seen, run.bad = run.s, run.s["batch"] * (run.step + 1), bad
    news = [" ".join(sentence.split()) for batch in batches for sentence in batch.bad]
    if news:
        with open(run.out / "unreadable.txt", "a") as f:
            f.writelines(f"step {run.step}: {text}\n" for text in news)
    if bad > run.args.max_bad * max(seen, 1000):  # no verdict from the first few samples
        raise BadInput(
            f"{s['data']}: {bad} of {seen} samples were unreadable, more than --max-bad {run.args.max_bad}; "
            f"mend or remove those in {run.out / 'unreadable.txt'}"
        )
    if not supervised:
        raise BadInput(
            f"{s['data']}: no token of step {run.step}'s batch is supervised, so there is nothing to learn; "
            "look at its answers, or shorten its prompts"
        )


def progress(run, log, peak):
    """The only place of the loop that waits for the device."""
    meters = read_meters(run)
    lr = {part: rate * learning_rate(run.s, run.step - 1) for part, rate in run.s["lr"].items()}
    log.progress(run.step, run.s["batch"], lr, meters, run.bad, peak and peak * run.world)
    if meters["worst"] >= PATIENCE:
        raise BadInput(
            f"step {run.step}: {PATIENCE} updates in a row had no finite gradient and were skipped; "
            f"lower --lr or look at the data; the last good checkpoint is in {run.out}"
        )


def show(run, log):
    """Held-out loss of every source, and one example of each, written by the model as it is now."""
    if run.held_out is None:
        return
    began = time.perf_counter()
    with torch.compiler.set_stance("force_eager") if run.args.compile else nullcontext():
        losses, lines = evaluate(run), examples(run)
    log.write({"step": run.step, "held_out": losses})
    log.say(
        f"step {run.step}  held-out loss: "
        + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    )
    for line in lines:
        log.say(line)
    log.since += time.perf_counter() - began  # this is not training's time


# ---------------------------------------------------------------------------------------------------------------------
# Start to end
def open_data(run):
    """The mixtures of a run; the toy world is drawn where it is wanted and not there."""
    s, args, c = run.s, run.args, run.model.config
    if not Path(s["data"]).exists() and s["preset"] == "toy" and s["data"].startswith("out/toy/"):
        if run.rank == 0:
            import toy

            print("drawing the toy world in out/toy")
            toy.write("out/toy")
        run.agree(0)  # the others wait until it is drawn
    common = dict(
        image_size=c.vit.image_size,
        visual=c.visual_tokens,
        context=c.llm.context,
        seed=s["seed"],
        image_mark=c.image_mark,
    )
    few_shapes = (
        run.device.type == "cuda" or args.compile
    )  # eager on a CPU, rounding T up only costs
    run.data = Data(
        s["data"], run.tokenizer, batch=s["batch"], bucket=BUCKET if few_shapes else 1, **common
    )
    held = args.eval_data or Path(s["data"]).with_name("heldout.toml")
    if args.eval_data or Path(held).exists():
        run.held_out = Data(held, run.tokenizer, train=False, **common)


def prepare(args, stage, ranks):
    """A Run that is ready to train, or None where it is finished already."""
    out, path, state = out_folder(args, stage), None, {}
    try:
        path = weights.find(out)
    except BadInput:
        if args.resume and ranks.rank == 0:
            print(f"{out}: no checkpoint yet, so the run starts from the beginning")
    if path and not args.resume:
        raise BadInput(
            f"{out}: holds a run ({path.name}); --resume goes on with it, --out names another folder"
        )
    if path:
        state = weights.read_checked(path, "state.json")
    start, why = (
        (path, "resumed; --init, --vit and --llm are for new runs")
        if path
        else start_from(args, stage)
    )
    before = weights.read_checked(start, "config.json").get("training") or {} if start else {}
    s = settle(args, stage, ranks.world, state.get("settings"), before.get("preset"))
    s["dtype"] = s["dtype"] or ("bf16" if ranks.device.type == "cuda" else "fp32")
    if state and state["step"] >= s["steps"]:
        if ranks.rank == 0:
            print(f"{out}: all {s['steps']} steps are done")
        return None
    if start and ranks.rank == 0:
        print(f"stage {stage} starts from {start} ({why})")
    model, names = (
        (weights.load(path), dict.fromkeys(PARTS, path)) if path else build(args, s, start)
    )
    run = Run(s, args, out, ranks, model, step=state.get("step", 0))
    run.tokenizer = Tokenizer(path) if path else find_tokenizer(args, start)
    if run.tokenizer.size > model.config.llm.vocab:
        raise BadInput(
            f"--tokenizer: has {run.tokenizer.size} pieces and the LLM {model.config.llm.vocab} embeddings; "
            "take the one that belongs to it"
        )
    torch.manual_seed(s["seed"])
    open_data(run)
    model.freeze(stage, s["tune"])
    same_everywhere(run)
    if ranks.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise BadInput(f"--out {out}: cannot be made ({e.strerror}); name another") from None
        describe(model, s, ranks.world, names, args.shard, total_memory(ranks.device))
        print(
            f"pooling by {pool_path(ranks.device.type)}; samples: {counted(run.data.counts)}; held out: "
            + (counted(run.held_out.counts) if run.held_out else "none (--eval-data names one)")
        )
    if s["tune"] == "inner":
        run.base = base_of(run, path, start, names)
    place(run)
    make_optimizer(run)
    if path:
        restore(run, path, state)
    return run


def plan(args):
    """Everything that would happen, from the architecture alone: no weights, no GPU, no training."""
    world, room = args.gpus or (int(os.environ.get("WORLD_SIZE", 1)), None)
    cuda = args.gpus or torch.cuda.is_available()
    for stage in (1, 2, 3) if args.stage == "all" else (int(args.stage),):
        try:
            start = start_from(args, stage)[0]
        except BadInput:
            start = None  # not there yet: the preset says what it would be
        described_by = weights.read_checked(start, "config.json") if start else {}
        s = settle(args, stage, world, preset=described_by.get("training", {}).get("preset"))
        s["dtype"] = s["dtype"] or ("bf16" if cuda else "fp32")
        like = (
            models.Config(**described_by["model"])
            if described_by
            else models.PRESETS[s["preset"]]()
        )
        s["inner_layers"] = inner_layers(s, like.llm) if s["tune"] == "inner" else None
        c = described(
            like,
            like.vit,
            replace(
                like.llm, branches={s["branch"]: s["inner_layers"]} if s["inner_layers"] else {}
            ),
            s,
        )
        with torch.device("meta"):
            model = models.InfMLLM(c)
        model.use(s["branch"] if s["inner_layers"] else None).freeze(stage, s["tune"])
        names = {"vit": args.vit, "adapter": None, "llm": args.llm}
        names = {part: name or start or "the preset" for part, name in names.items()}
        describe(model, s, world, names, args.shard, room and room * GIB)
        rows = s["steps"] * s["batch"]
        print(
            f"{s['steps']} steps = {rows:,} rows, {rows * c.visual_tokens:,} visual tokens; assumed: {s['text']} "
            f"text tokens a row, {s['answer']} of them supervised"
        )
        if s["data"] and Path(s["data"]).exists():
            sources = load_mixture(s["data"])
            total = sum(map(len, sources))
            print(
                f"samples: {counted({x.name: len(x) for x in sources})}; {rows / total:.1f} epochs of {total:,}"
            )
        else:
            print(
                f"samples: not counted ({s['data']} is not there)"
                if s["data"]
                else "samples: no --data to count"
            )
        flops = s["batch"] * sum(models.flops(c, s["text"], s["answer"], *tuning(s)).values())
        print(
            f"arithmetic: {flops / 1e12:,.2f} TFLOP a step; "
            + measured_time(out_folder(args, stage), s["steps"])
        )


def command(argv):
    args = flags().parse_args(argv)
    if args.plot:
        return plot(args.plot)
    if not args.stage:
        raise BadInput("--stage: name 1, 2, 3 or all")
    contradictions(args)
    if args.plan:
        return plan(args)
    rank, world, device = setup_ranks(args.device, args.timeout)
    many = world > 1 and device.type == "cuda"
    host = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout)) if many else None
    if args.workers is None:
        args.workers = 8 if device.type == "cuda" else 1
    for stage in (1, 2, 3) if args.stage == "all" else (int(args.stage),):
        run = prepare(args, stage, Ranks(rank, world, device, host))
        args.init = args.vit = args.llm = None  # with --stage all: where the first one starts
        if run is None:
            continue
        asked = []  # signals that want us to save and leave
        with on_signals(asked.append):
            done = train(run, asked)
        if rank == 0:
            farewell(run, done)
        exam = run.out, run.held_out and run.held_out.sources[0].toml, args.score_rows
        run = None  # makes room for the model that is examined
        if done and world == 1 and all(exam) and args.eval_every != 0:
            final_scores(*exam)
        if not done:
            break
    if world > 1:
        gc.collect()  # DDP goes first: were it the last to hold the group, freeing it could wait for gloo for ever
        dist.destroy_process_group()


def main(argv=None):
    try:
        try:
            with on_signals(at_once):
                command(argv)
            sys.stdout.flush()
        except (BadInput, OSError, RuntimeError) as e:
            return complain(e, "train.py")
    except BaseException:  # a bug: its traceback would keep the loaders alive
        end_loaders()
        raise
    return 0


def farewell(run, done):
    """The loss curve, and the next command to type."""
    stage, out = run.s["stage"], run.out
    named = f" --out {out}" if run.args.out and run.args.stage != "all" else ""
    tuned = f" --tune inner --branch {run.s['branch']}" if run.base else ""
    if not done:
        return print(
            f"stopped at step {run.step}; python train.py --stage {run.args.stage}{named} --resume goes on"
        )
    plot(out)
    if stage == 3:
        print(f"next: python sample.py --ckpt {out} --image PICTURE")
    elif run.args.stage != "all":
        named = f" --init {out} --out {out.with_name(f'stage{stage + 1}')}" if named else ""
        print(
            f"next: python train.py --stage {stage + 1}{tuned}{named}"
            + " --data MIXTURE.toml" * bool(run.args.data)
        )


def ordered(data, source, limit, run):
    """The first `limit` samples of a source as this rank's batches: as many on every rank, which sharding needs."""
    count, step = min(limit, len(source)), run.s["rows"] * run.world
    for start in range(0, count, step):
        numbers = range(start + run.rank, min(start + step, count), run.world)
        samples = [data.sample(source, n, 0) for n in numbers or [0]]
        batch = collate(samples, data.tokenizer.pad, data.visual, data.image_size)
        if numbers:
            yield batch
        else:
            yield replace(batch, target_at=torch.full_like(batch.target_at, -1), supervised=0)


@torch.no_grad()
def evaluate(run):
    """{source: held-out loss per supervised token}, summed over the ranks before it is divided."""
    sources = run.held_out.sources
    sums = torch.zeros(2, len(sources), dtype=torch.float64, device=run.device)
    for i, source in enumerate(sources):
        for batch in ordered(run.held_out, source, run.args.eval_rows, run):
            batch = batch.to(run.device, non_blocking=True)
            with run.autocast():
                sums[0, i] += run.model(
                    batch.images, batch.tokens, batch.targets, batch.image_at, batch.target_at
                )
            sums[1, i] += batch.supervised
    if run.world > 1:
        dist.all_reduce(sums)
    return {
        source.name: loss / max(tokens, 1) for source, loss, tokens in zip(sources, *sums.tolist())
    }


@torch.no_grad()
def examples(run):
    """A held-out sample of each source with the model's own answer. A sharded model needs every rank to take part."""
    from sample import generate

    if run.args.shard:
        run.model.unshard()
    elif run.rank:
        return []
    lines = []
    for source in run.held_out.sources:
        item = next(run.held_out.samples(source.name))
        with run.autocast():
            said = generate(
                run.model,
                run.tokenizer,
                [item.images],
                [item.prompt],
                TASKS[item.task].pad,
                max_new_tokens=48,
            )[0]
        wanted = item.turns[0][1]
        asked = item.prompt.split(run.model.config.image_mark)[-1].strip()[-60:]
        line = f"  {source.name}: {asked!r} -> {said!r}" + f", not {wanted!r}" * (said != wanted)
        box = parse_box(wanted)
        lines.append(line + (f" (IoU {metrics.iou(parse_box(said), box):.2f})" if box else ""))
    if run.args.shard:
        run.model.reshard()
    return lines


def final_scores(out, mixture, rows):
    """What evaluate.py says of a finished run, with its contact sheet, and a column for every stage beside it."""
    import evaluate as evaluation

    shutil.rmtree(out / "evaluation", ignore_errors=True)
    argv = [
        "--ckpt",
        str(out),
        "--data",
        str(mixture),
        "--limit",
        str(rows),
        "--beams",
        "1",
        "--min-new-tokens",
        "0",
        "--batch",
        "50",
        "--out",
        str(out / "evaluation"),
        "--sheet",
        str(out / "sheet.png"),
    ]
    print("python evaluate.py", *argv)
    try:
        evaluation.examine(evaluation.parse(argv))
    except BadInput as e:
        return print(f"not scored: {e}")  # the run is done and saved all the same
    stage_table(
        [p for p in sorted(out.parent.glob("stage[123]")) if p <= out]
        if out.name[:-1] == "stage"
        else [out]
    )
    print(f"right and wrong answers: {out / 'sheet.png'}")


if __name__ == "__main__":
    sys.exit(main())
