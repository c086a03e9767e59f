"""The three stages of InfMLLM, one loop; the same update on one process and on many.

    python train.py --stage 1                     # nothing named: draws the toy world and trains its adapter
    python train.py --stage all                   # the three stages in a row, each from the one before
    python train.py --stage 2 --resume            # the run in out/stage2 goes on, exactly
    python train.py --stage 3 --preset infmllm-7b --gpus 8x80 --shard --plan     # what it would take; trains nothing
    torchrun --nproc_per_node 8 train.py --stage 1 --preset infmllm-7b --vit eva_vit_g.pth --llm vicuna-7b-v1.5/ \\
        --data recipes/stage1.toml
    python train.py --stage 2 --tune inner --branch mm --out out/mm      # inner adaptors; the LLM stays as it is
    python train.py --plot out/stage1             # the loss curve

InfMLLM.freeze says what trains in each stage, and the table below how. A run writes to out/stageN: checkpoints
step-00000100/, log.jsonl (a record a logged step) and loss.png.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from support.threads import wait_briefly

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import
    wait_briefly()

import torch
from safetensors import SafetensorError

import evaluate
import model as models
import sample
import toy
import weights
from adapter import pool_path
from data import BUCKET, Data, collate, some
from formats import load_mixture
from model import PARTS, TUNE
from support import start
from support.commands import (
    Parser,
    amount,
    few,
    gpus,
    layers,
    natural,
    number,
    positive,
    share,
    spell_out,
    word,
)
from support.errors import BadInput, complain
from support.files import read_json
from support.lock import hold
from support.log import Log, asked_of, measured_time, peak_memory, plot, say_foreign, stage_table
from support.metrics import iou
from support.plan import arithmetic, counted, describe, glance, gpu_memory, show_stages
from support.processes import end_loaders, on_signals, stop_at_once
from support.ranks import Ranks, setup_ranks
from text.boxes import parse_box
from text.templates import TASKS, TEMPLATES

# ---------------------------------------------------------------------------------------------------
# The stages. [published] stands in the paper or the released code, [LLaVA-1.5] in theirs; the rest is our choice.


@dataclass(kw_only=True)
class Stage:
    steps: int  # updates
    batch: int = 64  # rows per update, over all ranks
    rows: int = 64  # rows of a rank's micro-batch, at most; split_batch sets the number
    lr: dict  # peak learning rate of each part that trains
    image_size: int | None = None  # pixels per side; None: the preset's own
    grid: int | None = None  # P, visual tokens per side; None: the preset's own
    warmup: float = 0.03  # share of the steps; a cosine to zero follows [LLaVA-1.5]
    weight_decay: float = 0.0  # of matrices; never of norms, biases, positions, queries [LLaVA-1.5]
    recompute: bool = False  # compute a layer's activations again instead of keeping them
    text: int = 64  # what --plan assumes of a row: text tokens ...
    answer: int = 16  # ... and how many of them are supervised


TOY = {
    1: Stage(steps=300, lr={"adapter": 5e-3}),
    2: Stage(steps=1000, lr={"vit": 3e-4, "adapter": 5e-3, "llm": 1e-3}, weight_decay=0.01),
    3: Stage(steps=400, lr={"adapter": 3e-4, "llm": 3e-4}, weight_decay=0.01, text=160, answer=48),
}
PAPER = {
    1: Stage(
        steps=60000,
        batch=1024,  # [published]; so are 224 px and web-scale pairs
        rows=8,
        lr={"adapter": 1e-3},  # a projector's [LLaVA-1.5]
        image_size=224,
        text=32,
        answer=24,
    ),
    2: Stage(
        steps=30000,
        batch=256,
        rows=32,
        lr={"vit": 1e-5, "adapter": 5e-5, "llm": 2e-5},
        image_size=448,  # [published]; so is what trains: ViT, adapter, Q and V
        weight_decay=0.05,
        recompute=True,
    ),
    3: Stage(
        steps=5197,  # one epoch of LLaVA's 665k conversations [LLaVA-1.5], which are [published]
        batch=128,  # [LLaVA-1.5]
        rows=16,
        lr={"adapter": 2e-5, "llm": 2e-5},  # [LLaVA-1.5]
        image_size=448,  # [published]; so are 256 visual tokens
        recompute=True,
        text=448,
        answer=192,
    ),
}
# llava-7b: as many pixels as its tower was trained on
OTHERS = {n: replace(row, image_size=None) for n, row in PAPER.items()}
NANO = {  # [nanoVLM]: such backbones in huggingface/nanoVLM, models/config.py; these rates in all its stages
    1: Stage(steps=10000, batch=256, rows=32, lr={"adapter": 5e-3}),
    2: Stage(
        steps=20000,  # [nanoVLM]; so are the 10000 before it, and 256 rows with SmolLM2-135M
        batch=256,
        rows=32,
        lr={"vit": 5e-5, "adapter": 5e-3, "llm": 5e-5},
        weight_decay=0.01,  # [nanoVLM], torch's default
        recompute=True,
    ),
    3: replace(PAPER[3], batch=256, image_size=None, lr={"adapter": 5e-3, "llm": 5e-5}),
}
STAGES = {"toy": TOY, "nano": NANO, "small": NANO, "infmllm-7b": PAPER, "infmllm-13b": PAPER}

BETAS = (0.9, 0.95)  # AdamW's; 0.95 forgets a bad batch sooner than torch's 0.999
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter
CLIP = 1.0  # the gradient's global norm is cut to this
GLANCE = 16  # records of a source that --plan reads
SKIPS = 3  # updates in a row without a finite gradient, after which the run stops
DTYPES = start.DTYPES | {"fp64": torch.float64}


# ---------------------------------------------------------------------------------------------------
# Settings and flags


@dataclass(kw_only=True)
class Settings(Stage):
    """What a run is. Flags win over what this run's checkpoint has stored, that over the stage's row."""

    stage: int
    preset: str
    tune: str  # none, qv, full, inner or lora
    dtype: str
    out: Path
    start: Path | None = None  # the checkpoint that the weights come from
    resumed: bool = False  # the run in `out` goes on
    planned: int | None = None  # its steps before it was lengthened
    data: str | None = None
    eval_data: str | None = None
    vit: str | None = None
    llm: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    adapter: str | None = None
    accum: int = 0  # micro-batches per rank and update; 0: as many as `rows` asks for
    branch: str | None = None
    inner_layers: list | None = None
    rank: int | None = None
    lora_on: list | None = None
    seed: int = 0
    workers: int = 1
    shard: bool = False
    compile: bool = False
    log_every: int = 10
    eval_every: int | None = None
    eval_rows: int = 128
    score_rows: int = 100
    save_every: int | None = None
    save_minutes: float = 30
    keep: int = 2
    max_bad: float = 0.01
    tensorboard: bool = False


# the settings that a checkpoint stores: a resumed run keeps them, and refuses other values
LASTING = tuple(
    "preset data steps batch lr warmup weight_decay image_size grid "
    "adapter template seed dtype tune branch inner_layers rank lora_on".split()
)


def resolve(args, stage, world):
    """The Settings of a run; after this nobody looks at the flags."""
    out = start.stage_folder(args, stage)
    path = None if args.plan else start.saved(out)
    if path and not args.resume:
        raise BadInput(
            f"{out}: holds a run ({path.name}); --resume goes on with it, --out names another folder"
        )
    origin = path or start.start_from(args, stage)
    trained = weights.read_checked(origin, "config.json").get("training", {}) if origin else {}
    stored = trained if path else {}
    if stored.get("stage", stage) != stage:
        raise BadInput(f"--stage {stage}: {out} is of stage {stored['stage']}; resume that")
    preset = args.preset or trained.get("preset", "toy")
    if args.preset and origin and trained.get("preset") != preset:
        start.same_architecture(args, origin)
    tune = args.tune or stored.get("tune") or TUNE[stage]
    table = STAGES.get(preset, OTHERS)
    row = asdict(table[stage])
    row["lr"] = peak_rates(table, stage, tune, args.lr or {})

    known = {knob.name for knob in fields(Settings)}
    given = {k: v for k, v in vars(args).items() if v is not None and k in known}
    start.flags_of_another(tune, given)
    if args.lr:
        given["lr"] = row["lr"]
    lasting = {key: stored[key] for key in LASTING if key in stored}
    for key, value in lasting.items():
        if key == "steps" and given.get(key, value) > value:
            given["planned"] = value
            continue  # the run is lengthened
        if given.get(key, value) != value:
            hint = "; only more steps are possible" if key == "steps" else ""
            raise BadInput(
                f"--{key.replace('_', '-')}: the run in {out} has {value} and not {given[key]}{hint}; "
                "leave it out to resume, or name another --out"
            )
    cuda = args.device != "cpu" and (torch.cuda.is_available() or bool(args.gpus))
    own = {"dtype": "bf16" if cuda else "fp32", "workers": 8 if cuda else 1}
    if preset == "toy":
        own["data"] = f"out/toy/stage{stage}.toml"
    given |= dict(stage=stage, preset=preset, tune=tune, out=out, start=origin, resumed=bool(path))
    s = Settings(**row | own | lasting | given)
    if not s.data and not args.plan:
        raise BadInput(
            f"--data: {preset} has no data of its own; name a mixture, such as recipes/stage{stage}.toml"
        )
    quarter = math.ceil(s.steps / 4)
    if s.save_every is None:
        s.save_every = quarter
    if s.eval_every is None:
        s.eval_every = quarter
    split_batch(s, world)
    return s


def split_batch(s, world):
    """How many micro-batches a rank takes, of how many rows each."""
    if not s.accum:
        least = max(1, math.ceil(s.batch / (world * s.rows)))
        even = (n for n in range(least, 8 * least) if s.batch % (world * n) == 0)
        s.accum = next(even, least)
    at_once = world * s.accum
    if s.batch % at_once:
        raise BadInput(
            f"--batch {s.batch} is not divisible by {world} ranks x {s.accum} micro-batches; "
            f"the nearest that is: {max(1, round(s.batch / at_once)) * at_once}"
        )
    s.rows = s.batch // at_once


def peak_rates(table, stage, tune, given):
    """{part that trains: peak learning rate}: the one given, or the row's; an LLM that the row leaves frozen
    has stage 3's, and low-rank matrices ten times that."""
    rates = {"llm": table[3].lr["llm"]} | table[stage].lr
    if tune == "lora":
        rates["llm"] = 10 * table[3].lr["llm"]
    frozen = {"none": "llm", "inner": "vit", "lora": "vit"}.get(tune)
    trained = [part for part in PARTS if part in rates and part != frozen]
    for part in given:
        if part not in ("", *trained):
            raise BadInput(f"--lr {part}=...: stage {stage} keeps the {part} frozen; leave it out")
    return {part: given.get(part, given.get("", rates[part])) for part in trained}


def by_stage(name):
    """The defaults of a setting in the stages' rows, for --help."""
    texts = [
        f"{', '.join(str(getattr(row, name)) for row in table.values())} ({preset})"
        for preset, table in (("toy", TOY), ("InfMLLM", PAPER))
    ]
    return f"; default in stages 1, 2, 3: {'; '.join(texts)}"


def rates(text):
    """'1e-3' for every part, or 'adapter=1e-3,llm=2e-5' for those named: {part, "" for every one: rate}"""
    pairs = [pair.rpartition("=") for pair in text.split(",")]
    lr = {part: amount(value) for part, _, value in pairs}
    if not set(lr) <= {"", *PARTS}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1e-3 nor adapter=1e-3,llm=2e-5")
    return lr


def flags():
    p = Parser(__doc__)
    flag = p.flag
    flag("--stage", ("1", "2", "3", "all"), "which row of the table; all: the three in a row")
    flag("--preset", models.PRESETS, "architecture and table; default: --init's, or toy")
    flag("--data", str, "mixture of training data, a TOML file; default: the toy world in out/toy")
    flag("--eval-data", str, "mixture held out; default: heldout.toml beside --data, if there")
    flag("--init", str, "start from this checkpoint; default: the stage before (toy: assets/toy)")
    flag("--vit", str, "take the ViT from here: eva_vit_g.pth, a CLIP, SigLIP or BLIP-2 folder")
    flag(
        "--llm",
        str,
        "take the LLM from here: a folder of LLaMA, Vicuna, SmolLM2, Mistral, Qwen2 or Qwen3",
    )
    flag("--tokenizer", str, "its file or folder; default: the one beside --llm or --init")
    flag(
        "--template",
        TEMPLATES,
        "turns of a chat; default: as --init has, or --llm's tokenizer tells",
    )
    flag("--out", str, "folder of the run; default: out/stageN (--stage all: that of the three)")
    flag(
        "--resume",
        bool,
        "go on with the run in --out, as it learns: its data, rates and steps hold",
    )
    flag("--steps", positive, f"updates; with --resume more than before{by_stage('steps')}")
    flag("--batch", number(int, 1, 2**20), f"rows per update over all ranks{by_stage('batch')}")
    flag("--accum", positive, "micro-batches per rank and update; default: as memory asks for")
    flag("--lr", rates, "peak learning rate: 1e-3, or adapter=1e-3,llm=2e-5; default: see --stages")
    flag("--warmup", share, "share of the steps in which the rate rises; default 0.03")
    flag("--weight-decay", amount, f"AdamW's, of matrices only{by_stage('weight_decay')}")
    flag("--image-size", few, "pixels per side; default: see --stages")
    flag("--grid", positive, "P: an image becomes P x P visual tokens; default: the preset's")
    flag(
        "--tune",
        (*TUNE.values(), "inner", "lora"),
        "what of the LLM trains; default: none, qv, full in stages 1, 2, 3; inner: the layers, ends "
        "and adapter of a branch, and nothing of the model it is added to; lora: low-rank matrices "
        "beside the LLM's own, and the adapter",
    )
    flag("--branch", word, "with --tune inner: the branch's name; default: --init's, or mm")
    flag(
        "--inner-layers",
        layers,
        "with --tune inner: after which layers one of its own runs (0,1,5,6); default: all, "
        "of 32 those of IAA",
    )
    flag("--rank", positive, "with --tune lora: of its matrices; default 16")
    flag(
        "--lora-on",
        start.lora_matrices,
        "with --tune lora: beside which of q, k, v, o, gate, up, down of every layer; default q,v",
    )
    flag(
        "--adapter",
        start.adapter_kind,
        "pool, mlp, resampler, or FILE.py:CLASS, a class of your own (docs/FORK.md); another than "
        "--init's starts fresh",
    )
    flag("--recompute", bool, f"activation checkpointing: less memory{by_stage('recompute')}")
    flag("--seed", natural, "of the batches and of fresh weights; default 0")
    flag("--device", ("cpu", "cuda"), "default: cuda where there is one")
    flag("--dtype", DTYPES, "of the arithmetic; default: bf16 on cuda, fp32 on cpu")
    flag("--workers", natural, "loader processes per rank; default 8 on cuda, 1 on cpu")
    flag("--shard", bool, "spread weights, gradients and optimizer over the ranks (fully_shard)")
    flag("--compile", bool, "torch.compile each layer")
    flag("--log-every", positive, "steps between records of log.jsonl; default 10")
    flag(
        "--eval-every",
        natural,
        "steps between held-out losses; 0: never, and no scores at the end; default: 4 a run",
    )
    flag("--eval-rows", positive, "held-out rows, a random sample, of each source; default 128")
    flag(
        "--score-rows",
        natural,
        "held-out rows of each source that are answered and scored at the end, where one process "
        "trains; default 100; 0: none",
    )
    flag("--save-every", natural, "steps between checkpoints; 0: the last; default: 4 a run")
    flag("--save-minutes", amount, "a checkpoint also after so many; 0: never; default 30")
    flag("--keep", positive, "so many of the newest checkpoints stay; default 2")
    flag("--max-bad", share, "share of unreadable samples put up with; default 0.01")
    flag(
        "--timeout",
        positive,
        "seconds that ranks wait for one another, the longest while rank 0 saves; after that the job "
        "ends; default 1800",
    )
    flag("--tensorboard", bool, "write the records of log.jsonl for tensorboard too")
    flag("--plan", bool, "print what would happen and what it would take; train nothing")
    flag("--gpus", gpus, "for --plan: how many GPUs of how many GiB, such as 8x80")
    flag("--stages", bool, "print the table of stages, and do nothing else")
    flag("--plot", str, "draw loss.png from the log.jsonl of this folder, and do nothing else")
    return p


def contradictions(args):
    """Flags that cannot both be meant."""
    if not args.stage:
        raise BadInput("--stage: name 1, 2, 3 or all")
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


# ---------------------------------------------------------------------------------------------------
# One stage, from its settings to its report


@dataclass
class Run:
    """All that the loop and a checkpoint need."""

    s: Settings
    ranks: Ranks
    model: models.InfMLLM
    tokenizer: object
    data: Data
    held_out: Data | None
    net: torch.nn.Module = None  # the model, or DDP around it: what a forward pass calls
    optimizer: torch.optim.Optimizer = None
    base: Path | None = None  # the checkpoint that a branch in training belongs to
    originals: dict = field(default_factory=dict)  # frozen tensors before they were rounded
    meters: dict | None = None  # 0-d float64 tensors on the device, read when something is logged
    step: int = 0  # updates done
    bad: int = 0  # samples that could not be read, over all ranks

    def autocast(self):
        # no cache: it would keep a bf16 copy of every trained weight until the forward pass ends
        half = self.s.dtype == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, half, cache_enabled=False)

    def loss(self, batch):
        """The batch's loss, summed over its targets."""
        batch = batch.to(self.ranks.device, non_blocking=True)
        with self.autocast():
            return self.net(
                batch.images,
                batch.tokens,
                batch.targets,
                batch.image_positions,
                batch.target_positions,
            )


def train(args, stage, ranks):
    """-> whether all steps of the stage are done"""
    # ---- settings ------------------------------------------------------------------------------
    device, first = ranks.device, ranks.rank == 0
    out = start.stage_folder(args, stage)
    lock = hold(out) if first and out.exists() else None
    s = resolve(args, stage, ranks.world)
    if first and not lock:
        lock = hold(out)
    if args.resume and not s.resumed and first:
        print(f"{s.out}: no checkpoint yet, so the run starts from the beginning")
    state = weights.read_checked(s.start, "state.json") if s.resumed else {"step": 0}
    if state["step"] >= s.steps:
        if first:
            print(f"{s.out}: all {s.steps} steps are done; --steps MORE lengthens the run")
        return True
    if s.planned and first:
        print(
            f"the run is lengthened from {s.planned} to {s.steps} steps: from step {state['step']} on the "
            f"learning rate is that of a run of {s.steps} steps, "
            f"at first {share_of_peak(s, state['step']):.0%} of its peak"
        )
    torch.manual_seed(s.seed)

    # ---- model ---------------------------------------------------------------------------------
    model, origins = start.build(s, say=first)
    tokenizer = start.find_tokenizer(s, model.config)
    model.freeze(stage, s.tune)

    # ---- data ----------------------------------------------------------------------------------
    data, held_out = open_data(s, model.config, tokenizer, ranks)
    same_everywhere(s, data, ranks)
    if first:
        s.out.mkdir(parents=True, exist_ok=True)
        describe(model, s, ranks.world, origins, gpu_memory(device))
        held = counted(held_out.counts) if held_out else "none (--eval-data names one)"
        say_foreign(data)
        print(f"turns: {tokenizer.template}; pooling by {pool_path(device.type)}")
        print(f"samples: {counted(data.counts)}; held out: {held}")

    # ---- onto the device, optimizer --------------------------------------------------------------
    run = Run(s, ranks, model, tokenizer, data, held_out)
    if s.tune in start.TUNED:
        run.base = start.branch_base(s, model, tokenizer, origins, say=first)
    place(run)
    run.optimizer = make_optimizer(model, s)
    run.meters = new_meters(device)
    if s.resumed:
        restore(run, state)

    # ---- the loop --------------------------------------------------------------------------------
    log = Log(run)
    begun = run.step
    saved_at = time.monotonic()
    signals = []  # those that ask us to save and leave
    if run.step == 0 and s.eval_every:
        show_held_out(run, log)
    stream = data.batches(
        run.step,
        s.steps - run.step,
        ranks.rank,
        ranks.world,
        s.accum,
        s.workers,
        pin=device.type == "cuda",
    )
    with on_signals(signals.append):
        while run.step < s.steps:
            with log.timed("load"):
                batches = next(stream)
            if run.step == begun:
                log.begin()  # what had to start for the first batch is no part of a step
            due = first and 0 < s.save_minutes * 60 < time.monotonic() - saved_at
            # what one rank knows, all of them act on
            supervised, bad, due, leave = ranks.sum(
                sum(batch.supervised for batch in batches), data.bad, due, len(signals)
            )
            if leave:
                break
            run.bad = bad  # only now: what is not trained on is read again, and counted then
            check_batches(run, batches, supervised)
            with log.timed("update"):
                loss = gradients(run, batches, supervised)
                update(run, loss, supervised)
            run.step += 1
            log.step_done(sum(arithmetic(model.config, s, batch) for batch in batches))

            last = run.step == s.steps
            if run.step % s.log_every == 0 or last:
                log_progress(run, log)
            if last or due or (s.save_every and run.step % s.save_every == 0):
                with log.timed("save"):
                    log.say(f"saved {save(run)}")
                saved_at = time.monotonic()
            if s.eval_every and (run.step % s.eval_every == 0 or last):
                show_held_out(run, log)
        stream.close()
        if leave:
            log.say(f"saved {save(run)}")
    log.bar.close()

    # ---- report ------------------------------------------------------------------------------------
    done = run.step == s.steps
    if first:
        print(f"memory of a rank at its peak, measured: {peak_memory(device)}")
        if run.bad:
            print(f"{run.bad} samples could not be read: {s.out / 'unreadable.txt'}")
        next_command(args, s, run.step)
    if done and ranks.world == 1 and s.score_rows and held_out and s.eval_every:
        final_scores(run)
    if lock:
        lock.close()
    return done


def open_data(s, c, tokenizer, ranks):
    """The run's mixture and the held-out one. The toy world is drawn if it is asked for and missing."""
    if s.data.startswith("out/toy/"):
        if ranks.rank == 0 and not Path(s.data).exists():
            print("drawing the toy world in out/toy")
            toy.write("out/toy")
        ranks.sum(0)  # the others wait until it is drawn
    sizes = (c.vit.image_size, c.visual_tokens, c.llm.context)
    # rounding T up makes few shapes, for the GPU's and the compiler's sake; on a CPU it only costs
    bucket = BUCKET if ranks.device.type == "cuda" or s.compile else 1
    data = Data(s.data, tokenizer, *sizes, s.batch, s.seed, image_mark=c.image_mark, bucket=bucket)
    held_out = s.eval_data or Path(s.data).with_name("heldout.toml")
    if not s.eval_data and not held_out.exists():
        return data, None
    return data, Data(held_out, tokenizer, *sizes, train=False, image_mark=c.image_mark)


def same_everywhere(s, data, ranks):
    """A rank with other flags or other data would train something that nobody asked for."""
    digest = zlib.crc32(repr((s, data.counts, data.digest)).encode())
    if ranks.sum(digest)[0] != digest * ranks.world:
        raise BadInput(
            f"rank {ranks.rank} of {ranks.world}: the ranks differ in flags or data; "
            "start all with the same"
        )


# ---------------------------------------------------------------------------------------------------
# Precision and parallelism


def place(run):
    """Cast, move, and set up DDP or sharding."""
    s, model = run.s, run.model
    model.vit.recompute = model.llm.recompute = s.recompute
    if s.compile:
        torch._dynamo.config.recompile_limit = 64  # one a bucket of shapes
        for layer in models.every_layer(model):
            layer.compile(dynamic=False)
    run.net = model
    if s.shard:
        shard(run)
        return
    cast(run, model, run.ranks.device)
    if run.ranks.world > 1:
        run.net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def cast(run, module, device="cpu", prefix=""):
    """Move to the device. What trains becomes fp32, what is frozen takes the dtype of the arithmetic.

    A frozen tensor that loses bits is kept for the checkpoints, on the rank that writes them."""
    dtype = DTYPES[run.s.dtype]
    master = torch.promote_types(dtype, torch.float32)
    saves = run.ranks.rank == 0 and not run.base
    for name, p in module.named_parameters(prefix):
        if hasattr(p, "full_tensor"):
            continue  # sharded, and cast before that
        to = master if p.requires_grad else dtype
        if saves and not p.requires_grad and p.dtype != to:
            run.originals[name] = p.data
        p.data = p.data.to(device, to)
        if not torch.isfinite(p).all():
            raise BadInput(f"{name}: the weights to start from are not finite; take others")


def shard(run):
    """fully_shard: a group per ViT block and LLM layer, and last one for the rest.

    It moves one group at a time to the devices, so that none of them ever holds the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(run.ranks.device.type, (run.ranks.world,))
    policy = MixedPrecisionPolicy()
    if run.s.dtype == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    names = {module: name for name, module in run.model.named_modules()}
    for module in (*models.every_layer(run.model), run.model):
        cast(run, module, prefix=names[module])
        fully_shard(module, mesh=mesh, mp_policy=policy)


def in_one_piece(p):
    """A tensor on the CPU; of a sharded one every rank must ask for it."""
    p = p.detach()
    if hasattr(p, "full_tensor"):
        p = p.full_tensor()
    return p.cpu()


def placed_like(p, full):
    """A whole tensor, placed and sharded as p is."""
    full = full.to(p.device)
    if not hasattr(p, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements)


# ---------------------------------------------------------------------------------------------------
# One update


def share_of_peak(s, step):
    """What every peak learning rate is multiplied by: a linear rise, then a cosine to zero."""
    rise = max(1, round(s.warmup * s.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, s.steps - rise)))


def make_optimizer(model, s):
    """AdamW with a group per part, matrices apart from what must not decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and name.split(".")[-1] not in ("positions", "queries")
            groups.setdefault((models.part_of(name), decays), []).append(p)
    optimizer = torch.optim.AdamW(
        [
            {"params": params, "part": part, "weight_decay": s.weight_decay * decays}
            for (part, decays), params in groups.items()
        ],
        betas=BETAS,
        fused=True,
    )
    for params in groups.values():
        for p in params:  # filled now, so that a run can be saved before its first step
            moments = {key: torch.zeros_like(p) for key in MOMENTS}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def gradients(run, batches, supervised):
    """Add up the gradients of sum(loss) / supervised, both sums over all ranks and micro-batches.

    The divisor is known before the first micro-batch runs, so that none is weighed by how it was cut.
    Returns sum(loss)."""
    total = torch.zeros((), dtype=torch.float64, device=run.ranks.device)
    for i, batch in enumerate(batches):
        # what a fork draws at random follows from the step as the batch does: a resumed run stays exact
        torch.manual_seed(zlib.crc32(repr((run.s.seed, run.step, run.ranks.rank, i)).encode()))
        # DDP sends gradients with the last micro-batch; a sharded run has no room to keep whole ones till then
        hold_back = run.net is not run.model and i + 1 < len(batches)
        with run.net.no_sync() if hold_back else nullcontext():
            loss = run.loss(batch)
            # DDP and fully_shard average over the ranks, and we want the sum: hence x world
            (loss * (run.ranks.world / supervised)).backward()
        total += loss.detach()
    run.ranks.reduce(total)
    return total


def update(run, loss, supervised):
    """Clip and step, or skip where loss or gradient is not finite. Nothing here waits for the device.

    The fused kernel divides gradients by grad_scale, and where found_inf is 1 it leaves parameters and
    moments as they were: this is how torch's GradScaler talks to it."""
    optimizer, m = run.optimizer, run.meters
    norm = torch.nn.utils.get_total_norm([p.grad for p in optimizer.state])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    skip = ~(torch.isfinite(norm) & torch.isfinite(loss))
    for group in optimizer.param_groups:
        group["lr"] = run.s.lr[group["part"]] * share_of_peak(run.s, run.step)
    optimizer.grad_scale = (norm / CLIP).clamp(min=1).float()  # this clips
    optimizer.found_inf = skip.float()
    optimizer.step()
    optimizer.zero_grad()
    m["loss"] += torch.where(skip, 0.0, loss)
    m["tokens"] += torch.where(skip, 0.0, supervised)
    m["norm"] = norm.double()
    m["skipped"] += skip
    m["in_a_row"] = torch.where(m["in_a_row"] < SKIPS, (m["in_a_row"] + 1) * skip, SKIPS)


def new_meters(device):
    names = ("loss", "tokens", "norm", "skipped", "in_a_row")
    return {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def save(run):
    """Write out/stageN/step-K and drop all but the newest --keep. Every rank takes part, rank 0 writes."""
    s, first = run.s, run.ranks.rank == 0
    path = s.out / f"step-{run.step:08d}"
    if not first and not s.shard:
        return path  # rank 0 has everything in one piece
    tensors, optimizer = {}, {}
    for name, p in run.model.named_parameters():
        if run.base and not p.requires_grad:
            continue  # a branch is saved without its base
        value = in_one_piece(p)
        moments = {}
        if p.requires_grad:
            state = run.optimizer.state[p]
            moments = {f"{name}.{key}": in_one_piece(state[key]) for key in MOMENTS}
            optimizer["steps"] = state["step"]  # the same for all: skipped updates do not count
        if first:
            tensors[name] = value
            optimizer |= moments
    if not first:
        return path
    before = start.saved(s.out)
    newest = f"the last whole one is {before}" if before else "there is none before it"
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise BadInput(
                f"step {run.step}: {name} is no longer finite and is not saved; {newest}; lower --lr"
            )
    tensors |= run.originals
    training = {key: getattr(s, key) for key in ("stage", *LASTING)}
    state = {
        "step": run.step,
        "meters": {name: meter.item() for name, meter in run.meters.items()},
        "counts": run.data.counts,
        "digest": run.data.digest,
        "bad": run.bad,
    }
    try:
        weights.save(
            path, (run.model, tensors), run.tokenizer, training, optimizer, state, run.base
        )
        old = sorted(s.out.glob("step-*[0-9]"))[: -s.keep]
        # and what a kill has left half written or half removed
        for folder in (*old, *sorted(s.out.glob("step-*.*"))):
            # whoever reads it finds it whole or not at all
            gone = folder.rename(folder.with_suffix(".gone"))
            shutil.rmtree(gone, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(f"{path}.new", ignore_errors=True)
        raise BadInput(
            f"{path}: the checkpoint cannot be written ({e}); {newest}; make room and --resume"
        ) from None
    return path


def restore(run, state):
    """Optimizer, counters and place in the data: the run goes on as if it had not stopped."""
    path, data = run.s.start, run.data
    if (state["counts"], state["digest"]) != (data.counts, data.digest):
        raise BadInput(
            f"{run.s.data}: the data have changed since {path} ({state['counts']}, now {data.counts} or "
            f"other texts); bring the old ones back, or start a new run with --init {path}"
        )
    run.step = state["step"]
    run.bad = state["bad"]
    if run.ranks.rank == 0:
        data.bad = run.bad  # the ranks' counts are summed
    for name, value in state["meters"].items():
        run.meters[name].fill_(value)
    stored = weights.load_checked(path, "optimizer.safetensors")
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    expected = {f"{name}.{key}" for name in trained for key in MOMENTS} | {"steps"}
    if expected != set(stored):
        odd = ", ".join(sorted(expected ^ set(stored))[:5])
        raise BadInput(
            f"{path}: its optimizer state is another model's ({odd}); take another, or start a new run with --init {path}"
        )
    for name, p in trained.items():
        slots = run.optimizer.state[p]
        slots["step"].copy_(stored["steps"])
        for key in MOMENTS:
            slots[key].copy_(placed_like(p, stored[f"{name}.{key}"]))


# ---------------------------------------------------------------------------------------------------
# What a person sees


def check_batches(run, batches, supervised):
    """Name what could not be read; stop where there is too much of it, or nothing to learn."""
    s = run.s
    sentences = [sentence for batch in batches for sentence in batch.bad]
    if sentences:
        with open(s.out / "unreadable.txt", "a") as file:
            file.writelines(f"step {run.step + 1}: {sentence}\n" for sentence in sentences)
    seen = s.batch * (run.step + 1)
    if run.bad > s.max_bad * max(seen, 1000):  # no verdict from the first few samples
        raise BadInput(
            f"{s.data}: {run.bad} of {seen} samples were unreadable, more than --max-bad {s.max_bad}; "
            f"mend or remove those in {s.out / 'unreadable.txt'}"
        )
    if not supervised:
        raise BadInput(
            f"{s.data}: no token of step {run.step}'s batch is supervised, so there is nothing to learn; "
            "look at its answers, or shorten its prompts"
        )


def log_progress(run, log):
    """Between saves and evaluations the only place of the loop that waits for the device."""
    meters = {name: meter.item() for name, meter in run.meters.items()}
    run.meters["loss"].zero_()
    run.meters["tokens"].zero_()
    log.progress(meters)
    if meters["in_a_row"] >= SKIPS:
        raise BadInput(
            f"step {run.step}: {SKIPS} updates in a row had no finite gradient and were skipped; lower "
            f"--lr or look at the data; the last good checkpoint is in {run.s.out}"
        )


def show_held_out(run, log):
    """Held-out loss of every source, and one answer for each by the model as it is now."""
    if run.held_out is None:
        return
    with (
        log.timed("held_out"),
        torch.compiler.set_stance("force_eager") if run.s.compile else nullcontext(),
    ):
        run.model.eval()
        losses = held_out_loss(run)
        log.write({"step": run.step, "held_out": losses})
        said = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        log.say(f"step {run.step}  held-out loss: {said}")
        for line in examples(run):
            log.say(line)
        run.model.train()


@torch.no_grad()
def held_out_loss(run):
    """{source: loss per supervised token} of --eval-rows samples, over all ranks."""
    data, ranks = run.held_out, run.ranks
    together = run.s.rows * ranks.world
    losses = {}
    for source in data.sources:
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        numbers = some(len(source), run.s.eval_rows)
        for begin in range(0, len(numbers), together):
            mine = numbers[begin : begin + together][ranks.rank :: ranks.world]
            # sharding needs as many forward passes on every rank: without a row left, one that does not count
            samples = [data.readable_sample(source, n, 0, []) for n in mine or [0]]
            batch = collate(samples, data.tokenizer.pad, data.visual, data.image_size)
            loss = run.loss(batch)
            if mine:
                sums[0] += loss
                sums[1] += batch.supervised
        ranks.reduce(sums)
        loss, tokens = sums.tolist()
        losses[source.name] = loss / max(tokens, 1)
    return losses


@torch.no_grad()
def examples(run):
    """A held-out sample of each source with the model's own answer."""
    if run.s.shard:
        run.model.unshard()  # every rank takes part
    elif run.ranks.rank:
        return []
    lines = []
    for source in run.held_out.sources:
        try:
            item = run.held_out.record(source, 0)
        except BadInput:
            continue
        with run.autocast():
            said = sample.generate(
                run.model,
                run.tokenizer,
                [item.images],
                [item.prompt],
                TASKS[item.task].pad,
                max_new_tokens=48,
            )[0]
        truth = item.turns[0][1]
        asked = item.prompt.split(run.model.config.image_mark)[-1].strip()[-60:]
        line = f"  {source.name}: {asked!r} -> {said!r}"
        if said != truth:
            line += f", not {truth!r}"
        if box := parse_box(truth):
            line += f" (IoU {iou(parse_box(said), box):.2f})"
        lines.append(line)
    if run.s.shard:
        run.model.reshard()
    return lines


def final_scores(run):
    """What evaluate.py says of the finished model, with its contact sheet, and a column for each stage."""
    out = run.s.out
    shutil.rmtree(out / "evaluation", ignore_errors=True)
    (out / "sheet.png").unlink(missing_ok=True)
    try:
        run.model.eval()
        with run.autocast():
            evaluate.evaluate(
                run.model,
                run.tokenizer,
                run.held_out.sources[0].toml,
                out / "evaluation",
                limit=run.s.score_rows,
                batch=50,
                sheet=out / "sheet.png",
                beams=1,
            )
    except BadInput as e:
        print(f"not scored: {e}")  # the run is done and saved all the same
        return
    stage_table(out)
    print(asked_of(read_json(out / "evaluation/scores.json")))
    print(f"right and wrong answers: {out / 'sheet.png'}")


def next_command(args, s, step):
    """The loss curve, and the next command to type."""
    named = f" --out {args.out}" if args.out else ""
    if step < s.steps:
        print(
            f"stopped at step {step}; python train.py --stage {args.stage}{named} --resume goes on"
        )
        return
    plot(s.out)
    if s.stage == 3:
        print(f"next: python sample.py --ckpt {s.out} --image PICTURE")
    elif args.stage != "all":
        branch = f" --branch {s.branch}" if s.branch else ""
        tuned = f" --tune {s.tune}{branch}" if s.tune in start.TUNED else ""
        if named:
            named = f" --init {s.out} --out {s.out.with_name(f'stage{s.stage + 1}')}"
        data = "" if s.data.startswith("out/toy/") else " --data MIXTURE.toml"
        print(f"next: python train.py --stage {s.stage + 1}{tuned}{named}{data}")


# ---------------------------------------------------------------------------------------------------
# Commands


def plan(args, stage):
    """Everything that would happen, from the architecture alone: no weights, no GPU, no training."""
    world, room = args.gpus or (int(os.environ.get("WORLD_SIZE", 1)), None)
    s = resolve(args, stage, world)
    model, origins = start.build(s, say=False, plan=True)
    model.freeze(stage, s.tune)
    describe(model, s, world, origins, room)
    rows = s.steps * s.batch
    visual = model.config.visual_tokens
    print(
        f"{s.steps} steps = {rows:,} rows, {rows * visual:,} visual tokens; assumed: {s.text} text tokens "
        f"a row, {s.answer} of them supervised"
    )
    if s.data and Path(s.data).exists():
        sources = load_mixture(s.data)
        counts = {source.name: len(source) for source in sources}
        total = sum(counts.values())
        print(f"samples: {counted(counts)}; {rows / total:.1f} epochs of {total:,}")
        for source in sources:
            glance(source, some(len(source), GLANCE))
    else:
        print(f"samples: not counted, as there is no {s.data or '--data'}")
    flops = s.batch * arithmetic(model.config, s)
    ran = start.saved(s.out)
    alike = ran and weights.read_checked(ran, "config.json")["training"].get("preset") == s.preset
    time = measured_time(s.out, s.steps) if alike else "time per step: not measured"
    print(f"arithmetic: {flops / 1e12:,.2f} TFLOP a step; {time}")


def command(argv):
    args = flags().parse_args(argv)
    if args.plot:
        plot(args.plot)
        return
    if args.stages:
        show_stages({preset: STAGES.get(preset, OTHERS) for preset in models.PRESETS})
        return
    contradictions(args)
    stages = (1, 2, 3) if args.stage == "all" else (int(args.stage),)
    if args.plan:
        for stage in stages:
            plan(args, stage)
        return
    ranks = setup_ranks(args.device, args.timeout or 1800)
    for stage in stages:
        if not train(args, stage, ranks):
            break
        args.init = args.vit = args.llm = None  # with --stage all: where the first one starts
    ranks.close()


def main(argv=None):
    spell_out()
    try:
        with on_signals(stop_at_once):
            command(argv)
        sys.stdout.flush()
    except (BadInput, OSError, RuntimeError) as e:
        return complain(e, "train.py")
    except (
        BaseException
    ):  # a bug: the process would print its traceback and wait for the loaders for ever
        end_loaders()
        raise
    return 0


def fork():
    """The last line of a fork's own file: `python -m examples.gain train FLAGS`, or sample, or evaluate."""
    name, *argv = sys.argv[1:] or [""]
    if name == "train":
        code = main(argv)
    elif name in ("sample", "evaluate"):
        script = sample if name == "sample" else evaluate
        code = sample.run(lambda: script.main(argv))
    else:
        code = complain(BadInput("name train, sample or evaluate, then its flags"))
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
