"""What a person sees of training: what it will take, held-out losses and examples, the progress line, the loss curve.

Names of dimensions as in model.py; `run` is a train.Run and `s` its settings (train.settle).
"""
import json
import math
import re
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import metrics
import model as models
from data import TASKS, BadInput, collate, parse_box

PARTS = ("vit", "adapter", "llm")
GIB = 2 ** 30
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
        "L40S": 362e12, "4090": 165e12, "3090": 71e12}       # dense bf16 FLOP/s by the data sheets, for MFU


# ---------------------------------------------------------------------------------------------------------------------
# What it takes: parameters, memory, arithmetic

def sizes(model):
    """{part: (parameters that train, parameters that do not)}"""
    sums = {part: [0, 0] for part in PARTS}
    for name, p in model.named_parameters(): sums[models.part_of(name)][not p.requires_grad] += p.numel()
    return sums


def kept(c, s):
    """Bytes that the layers keep for the backward pass. In a layer without recomputation, per token:

        LLM   attention's norm: its input; q, k, v, the attention's output; the MLP's norm: its input; gate, silu, up
              where Q and V train, or all: the first norm's output; where all train: the second's, silu(gate) * up
        ViT   (if it trains) two norms' inputs and outputs, q, k, v, the attention's output; the MLP's before and after
    A matrix keeps its input only if it trains, so frozen layers keep less, and a frozen ViT keeps nothing.
    A branch's layers keep what layers keep where all train; those that they follow, what frozen ones do.
    """
    D, Dv, b, tune = c.llm.width, c.vit.width, number_bytes(s), tuned(s)
    tokens, patches = s["rows"] * (c.visual_tokens + s["text"]), s["rows"] * (1 + c.vit.side ** 2)
    kv = D // c.llm.heads * c.llm.kv_heads

    def layer(tune):                                               # bytes per token
        attention = 3 * D + 2 * kv + D * (tune in ("qv", "full"))
        return b * (attention + D + 3 * c.llm.mlp + (D + c.llm.mlp) * (tune == "full"))
    base, inner = layer(tune), c.llm.branches[s["branch"]] if tune == "inner" else []
    added = layer("full") if inner else 0
    block = b * patches * (8 * Dv + 2 * c.vit.mlp) if s["stage"] == 2 and not inner else 0
    if not s["recompute"]:
        return tokens * (c.llm.layers * base + len(inner) * added) + c.vit.layers * block
    inputs = (c.llm.layers + len(inner)) * b * tokens * D + (c.vit.layers * b * patches * Dv if block else 0)
    return inputs + max(tokens * max(base, added), block)        # and the one layer that is computed again


def tuning(s): return s["stage"], tuned(s), s["branch"] if tuned(s) == "inner" else None


def tuned(s): return s.get("tune") or models.TUNE[s["stage"]]


def number_bytes(s): return {"bf16": 2, "fp64": 8}.get(s["dtype"], 4)


def memory(model, s, world=1, sharded=False):
    """Bytes on one GPU at the worst moment of a step, by what they are for: arithmetic, not measurement."""
    c, b = model.config, number_bytes(s)
    master, split = max(b, 4), world if sharded else 1
    trained, frozen = (sum(n) for n in zip(*sizes(model).values()))
    D, Dv, V = c.llm.width, c.vit.width, c.llm.vocab
    tokens, patches = s["rows"] * (c.visual_tokens + s["text"]), s["rows"] * (1 + c.vit.side ** 2)
    work = 3 * b * max(c.llm.mlp * tokens, c.vit.mlp * patches)    # gradients on their way through one layer
    adapter = s["rows"] * c.visual_tokens * (8 * Dv + 3 * D * b) + 4 * D * b * tokens      # its own, and the splice
    own = V * D * 3 * master if tuned(s) in ("full", "inner") else 0       # the head trains, and the embedding
    head = V * D * b + own + 12 * 2 ** 23 + 4 * s["rows"] * s["answer"] * D * b
    copies = b * trained if b < master and not s["recompute"] else 0       # masters in bf16, kept for the backward pass
    groups = [sum(p.numel() for p in layer.parameters()) for layer in models.every_layer(model)]
    rest = trained + frozen - sum(groups)
    return {"weights": (b * frozen + master * trained) // split,
            "gradients": master * trained // split,
            "optimizer": 2 * master * trained // split,
            "activations": kept(c, s) + work + adapter + head + copies,
            "gathered": b * (3 * max(groups) + rest) if sharded else 0,    # a layer, the next, its gradients; the rest
            "CUDA": GIB if s["dtype"] == "bf16" else 0}            # context and libraries, about


def arithmetic(c, s, batch):
    """FLOPs that a micro-batch needs: its forward pass and the gradients of this run."""
    B, T = batch.tokens.shape
    cost = models.flops(c, max(0, T - c.visual_tokens), batch.supervised / B, *tuning(s))
    return len(batch.images) * (cost["vit"] + cost["adapter"]) + B * (cost["llm"] + cost["head"])


def peak_flops(device):
    if device.type != "cuda": return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK.items() if key in name), None)


def short(n): return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M" if n >= 1e5 else str(n)


def gib(n): return f"{n / GIB:.1f}" if n >= GIB / 10 else f"{n / GIB:.3f}"


def total_memory(device):
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_memory(device):
    """The most bytes that this rank has held: on its GPU, or of RAM since the process began."""
    if device.type == "cuda": return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def counted(counts): return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def describe(model, s, world, names, sharded, room=None):
    """What will train, from where, in which precision, and the memory that takes: the table that a run opens with."""
    c, compute = model.config, s["dtype"]
    print(f"\nstage {s['stage']} of {s['preset']}: {c.visual_tokens} visual tokens an image of {c.vit.image_size} px "
          f"({c.adapter}); batch {s['batch']} = {world} ranks x {s['accum']} micro-batches x {s['rows']} rows; "
          f"{s['steps']} steps")
    if c.llm.branches:
        print("".join(f"branch {name}: layers of its own after {', '.join(map(str, inner))} of the LLM's {c.llm.layers}"
                      for name, inner in c.llm.branches.items()))
    print(f"{'part':<9}{'trained':>10}{'frozen':>10}  {'dtype':<19}{'lr':>8}  from")
    for part, (trained, frozen) in sizes(model).items():
        master = "fp32" if compute == "bf16" else compute
        dtype = ", ".join([f"{master} master"] * bool(trained) + [f"{compute} frozen"] * bool(frozen))
        lr = f"{s['lr'][part]:.0e}" if trained else "-"
        print(f"{part:<9}{short(trained):>10}{short(frozen):>10}  {dtype:<19}{lr:>8}  {names[part]}")
    parts = memory(model, s, world, sharded)
    total = sum(parts.values())
    print(f"memory of a rank, GiB, calculated and not measured: {gib(total)} = "
          + " + ".join(f"{name} {gib(n)}" for name, n in parts.items() if n))
    if room and total > room:
        print(f"  more than the {gib(room)} GiB that are there: " + "--recompute, " * (not s["recompute"])
              + "--shard or more --accum make it less")


# ---------------------------------------------------------------------------------------------------------------------
# Held-out data

def ordered(data, source, limit, run):
    """The first `limit` samples of a source as this rank's batches: as many on every rank, which sharding needs."""
    count, step = min(limit, len(source)), run.s["rows"] * run.world
    for start in range(0, count, step):
        numbers = range(start + run.rank, min(start + step, count), run.world)
        samples = [data.sample(source, n, 0) for n in numbers or [0]]
        batch = collate(samples, data.tokenizer.pad, data.visual, data.image_size)
        if numbers: yield batch
        else: yield replace(batch, target_at=torch.full_like(batch.target_at, -1), supervised=0)


@torch.no_grad()
def evaluate(run):
    """{source: held-out loss per supervised token}, summed over the ranks before it is divided."""
    sources = run.held_out.sources
    sums = torch.zeros(2, len(sources), dtype=torch.float64, device=run.device)
    for i, source in enumerate(sources):
        for batch in ordered(run.held_out, source, run.args.eval_rows, run):
            batch = batch.to(run.device, non_blocking=True)
            with run.autocast():
                sums[0, i] += run.model(batch.images, batch.tokens, batch.targets, batch.image_at, batch.target_at)
            sums[1, i] += batch.supervised
    if run.world > 1: dist.all_reduce(sums)
    return {source.name: loss / max(tokens, 1) for source, loss, tokens in zip(sources, *sums.tolist())}


@torch.no_grad()
def examples(run):
    """A held-out sample of each source with the model's own answer. A sharded model needs every rank to take part."""
    from sample import generate
    if run.args.shard: run.model.unshard()
    elif run.rank: return []
    lines = []
    for source in run.held_out.sources:
        item = next(run.held_out.samples(source.name))
        with run.autocast():
            said = generate(run.model, run.tokenizer, [item.images], [item.prompt], TASKS[item.task].pad,
                            max_new_tokens=48)[0]
        wanted = item.turns[0][1]
        asked = item.prompt.split(run.model.config.image_mark)[-1].strip()[-60:]
        line = f"  {source.name}: {asked!r} -> {said!r}" + f", not {wanted!r}" * (said != wanted)
        box = parse_box(wanted)
        lines.append(line + (f" (IoU {metrics.iou(parse_box(said), box):.2f})" if box else ""))
    if run.args.shard: run.model.reshard()
    return lines


def final_scores(out, mixture, rows):
    """What evaluate.py says of a finished run, with its contact sheet, and a column for every stage beside it."""
    import evaluate as evaluation
    shutil.rmtree(out / "evaluation", ignore_errors=True)
    argv = ["--ckpt", str(out), "--data", str(mixture), "--limit", str(rows), "--beams", "1", "--min-new-tokens", "0",
            "--batch", "50", "--out", str(out / "evaluation"), "--sheet", str(out / "sheet.png")]
    print("python evaluate.py", *argv)
    try: evaluation.examine(evaluation.parse(argv))
    except BadInput as e: return print(f"not scored: {e}")         # the run is done and saved all the same
    stage_table([p for p in sorted(out.parent.glob("stage[123]")) if p <= out] if out.name[:-1] == "stage" else [out])
    print(f"right and wrong answers: {out / 'sheet.png'}")


def stage_table(folders):
    """A column a run: the scores that its evaluation left. Of a score by types, the lowest type."""
    columns = {}
    for folder in (f for f in folders if (f / "evaluation/scores.json").is_file()):
        for source, scores in json.loads((folder / "evaluation/scores.json").read_text()).items():
            typed = {name: s["score"] for name, s in scores.items() if name.startswith("type ")}
            found = {name: f"{s['score']:.3f}" for name, s in scores.items() if name not in typed}
            lowest = min(typed, key=typed.get, default=None)
            if lowest: found["lowest type"] = f"{typed[lowest]:.3f} {lowest.removeprefix('type ')}"
            for name, text in found.items(): columns.setdefault((source, name), {})[folder] = text
    print(f"\n{'held out, answers generated':<42}" + "".join(f"{folder.name:<22}" for folder in folders))
    for (source, name), texts in columns.items():
        print(f"{source + '  ' + name:<42}" + "".join(f"{texts.get(folder, ''):<22}" for folder in folders))


# ---------------------------------------------------------------------------------------------------------------------
# While it runs

class Log:
    """log.jsonl, the progress bar and tensorboard, on rank 0; on the others nothing."""

    def __init__(self, out, step, steps, rank, tensorboard=False):
        self.file, self.step, self.steps, self.quiet, self.board = out / "log.jsonl", step, steps, rank > 0, None
        self.since, self.flops, self.seconds = time.perf_counter(), 0, {"load": 0.0, "update": 0.0, "save": 0.0}
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=True if self.quiet else None)
        if self.quiet: return
        # a run that was killed may have logged steps that its checkpoint does not know: they come again
        keep(self.file, lambda line: logged_step(line) <= step)
        keep(out / "unreadable.txt", lambda line: int((re.match(r"step (\d+):", line) or (0, step))[1]) < step)
        if tensorboard:
            try: from torch.utils.tensorboard import SummaryWriter
            except ImportError: raise BadInput("--tensorboard: it is not installed; pip install tensorboard") from None
            self.board = SummaryWriter(str(out))

    def write(self, record):
        if self.quiet: return
        try:
            with open(self.file, "a") as f: f.write(json.dumps(record) + "\n")
        except OSError as e: raise BadInput(f"{self.file}: cannot be written ({e}); make room and --resume") from None
        if not self.board: return
        for key, value in (record | record.get("held_out", {})).items():
            if isinstance(value, (int, float)) and key != "step": self.board.add_scalar(key, value, record["step"])
        self.board.flush()

    def say(self, text):
        if not self.quiet: tqdm.write(text)

    def progress(self, step, batch, lr, meters, bad, peak):
        """One record of the steps since the last."""
        now, steps = time.perf_counter(), step - self.step
        took, loss = now - self.since, meters["loss"] / max(meters["tokens"], 1)
        norm = meters["norm"] if math.isfinite(meters["norm"]) else None
        record = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "samples_per_s": batch * steps / took,
                  "tokens_per_s": meters["tokens"] / took, "mfu": self.flops / took / peak if peak else None,
                  "skipped": int(meters["skipped"]), "bad": bad,
                  "seconds": {k: v / steps for k, v in self.seconds.items()} | {"step": took / steps}}
        self.write(record)
        shown = {"loss": f"{loss:.3f}", "lr": f"{max(lr.values()):.1e}", "samples/s": f"{record['samples_per_s']:.0f}",
                 "tokens/s": f"{record['tokens_per_s']:.0f}"}
        if peak: shown["MFU"] = f"{record['mfu']:.0%}"
        if meters["skipped"]: shown["skipped"] = record["skipped"]
        if bad: shown["bad"] = bad
        self.bar.set_postfix(shown)
        if self.bar.disable: self.say(f"step {step}/{self.steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
        self.step, self.since, self.flops, self.seconds = step, now, 0, dict.fromkeys(self.seconds, 0.0)


def keep(file, wanted):
    """The lines of a file that are wanted; half a line at its end is not."""
    if not file.exists(): return
    part = file.with_suffix(".new")
    part.write_text("".join(line for line in file.read_text().splitlines(True) if line.endswith("\n") and wanted(line)))
    part.replace(file)


def logged_step(line):
    try: return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError): return math.inf      # the half line of a run that was killed


def records(folder):
    file = Path(folder) / "log.jsonl"
    if not file.is_file(): return []
    return [json.loads(line) for line in file.read_text().splitlines() if logged_step(line) < math.inf]


def measured_time(out, steps):
    timed = [r for r in records(out) if "seconds" in r]
    if not timed: return f"time per step: not measured (no run in {out})"
    seconds = timed[-1]["seconds"]["step"]
    return f"measured in {out}: {seconds:.3f} s a step, so {seconds * steps / 3600:.2f} h"


def plot(folder):
    """DIR/loss.png where matplotlib is installed, and a curve of characters where it is not."""
    log = records(folder)
    curve = [(r["step"], r["loss"]) for r in log if "loss" in r]
    held = [(r["step"], sum(r["held_out"].values()) / len(r["held_out"])) for r in log if "held_out" in r]
    if not curve: raise BadInput(f"{Path(folder) / 'log.jsonl'}: no record of a step; name the folder of a run")
    try: from matplotlib.figure import Figure                      # pyplot would take a second more to import
    except ImportError: return text_curve(curve)
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(*zip(*curve), label="training", linewidth=1)
    if held: axes.plot(*zip(*held), "o-", label="held out, mean of the sources")
    axes.set(xlabel="step", ylabel="loss per supervised token", title=str(folder))
    axes.legend()
    figure.savefig(Path(folder) / "loss.png", dpi=120, bbox_inches="tight")
    print(f"drew {Path(folder) / 'loss.png'}")


def text_curve(curve, width=60):
    top = max(loss for _, loss in curve)
    for step, loss in curve[::max(1, len(curve) // 20)]:
        print(f"{step:>8} {loss:>8.3f} " + "#" * round(width * loss / top))
