"""While a run goes on and afterwards: log.jsonl, the progress line, the loss curve, the table of stages."""

import json
import math
import re
import resource
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from support.errors import BadInput


class Log:
    """log.jsonl, the progress bar and tensorboard, on rank 0; on the others nothing."""

    def __init__(self, out, step, steps, rank, tensorboard=False):
        self.file = out / "log.jsonl"
        self.step, self.steps = step, steps
        self.quiet = rank > 0
        self.board = None
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=True if self.quiet else None
        )
        self.begin()
        if self.quiet:
            return
        # a run that was killed may have logged steps that its checkpoint does not know: they come again
        keep_lines(self.file, lambda line: logged_step(line) <= step)
        keep_lines(out / "unreadable.txt", lambda line: unreadable_step(line) < step)
        if tensorboard:
            self.board = open_tensorboard(out)

    def begin(self):
        self.since = time.perf_counter()
        self.flops = 0
        self.seconds = {"load": 0.0, "update": 0.0, "save": 0.0}

    def step_done(self, load, update):
        self.seconds["load"] += load
        self.seconds["update"] += update
        self.bar.update()

    @contextmanager
    def timed(self, what):
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    @contextmanager
    def paused(self):
        """The time of the block is not training's."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def write(self, record):
        if self.quiet:
            return
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:
            raise BadInput(
                f"{self.file}: cannot be written ({e}); make room and --resume"
            ) from None
        if self.board:
            for key, value in (record | record.get("held_out", {})).items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(key, value, record["step"])
            self.board.flush()

    def say(self, text):
        if not self.quiet:
            tqdm.write(text)

    def progress(self, step, batch, lr, meters, bad, peak):
        """One record of the steps since the last, and the progress line."""
        steps = step - self.step
        took = time.perf_counter() - self.since
        record = {
            "step": step,
            "loss": meters["loss"] / max(meters["tokens"], 1),
            "grad_norm": meters["norm"] if math.isfinite(meters["norm"]) else None,
            "lr": lr,
            "samples_per_s": batch * steps / took,
            "tokens_per_s": meters["tokens"] / took,
            "mfu": self.flops / took / peak if peak else None,
            "skipped": int(meters["skipped"]),
            "bad": bad,
            "seconds": {k: v / steps for k, v in self.seconds.items()} | {"step": took / steps},
        }
        self.write(record)
        shown = {
            "loss": f"{record['loss']:.3f}",
            "lr": f"{max(lr.values()):.1e}",
            "samples/s": f"{record['samples_per_s']:.0f}",
            "tokens/s": f"{record['tokens_per_s']:.0f}",
        }
        if peak:
            shown["MFU"] = f"{record['mfu']:.0%}"
        shown |= {key: record[key] for key in ("skipped", "bad") if record[key]}
        self.bar.set_postfix(shown)
        if self.bar.disable:
            line = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"step {step}/{self.steps}  {line}")
        self.step = step
        self.begin()

    def close(self):
        self.bar.close()


def open_tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard: it is not installed; pip install tensorboard") from None
    return SummaryWriter(str(out))


def keep_lines(file, wanted):
    """Keep the lines of a file that are wanted; half a line at its end is not."""
    if file.exists():
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and wanted(line)]
        part = file.with_suffix(".new")
        part.write_text("".join(kept))
        part.replace(file)


def unreadable_step(line):
    found = re.match(r"step (\d+):", line)
    return int(found[1]) if found else -1


def logged_step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # the half line of a run that was killed


def records(folder):
    file = Path(folder) / "log.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if logged_step(line) < math.inf]


def peak_memory(device):
    """The most memory that this process has held, on its GPU or else in RAM."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{held / 2**30:.2f} GiB"


def measured_time(out, steps):
    timed = [record for record in records(out) if "seconds" in record]
    if not timed:
        return f"time per step: not measured (no run in {out})"
    seconds = timed[-1]["seconds"]["step"]
    return f"measured in {out}: {seconds:.3f} s a step, so {seconds * steps / 3600:.2f} h"


def plot(folder):
    """Draw DIR/loss.png."""
    folder = Path(folder)
    log = records(folder)
    curve = [(r["step"], r["loss"]) for r in log if "loss" in r]
    held = [(r["step"], mean(r["held_out"].values())) for r in log if "held_out" in r]
    if not curve:
        raise BadInput(f"{folder / 'log.jsonl'}: no record of a step; name the folder of a run")
    try:
        from matplotlib.figure import Figure  # pyplot would take a second more to import
    except ImportError:
        print(f"no {folder / 'loss.png'}: matplotlib is not installed; pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(*zip(*curve), label="training", linewidth=1)
    if held:
        axes.plot(*zip(*held), "o-", label="held out, mean of the sources")
    axes.set(xlabel="step", ylabel="loss per supervised token", title=str(folder))
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    print(f"drew {folder / 'loss.png'}")


def stage_table(out):
    """The scores that evaluation has left in this run's folder and in those of the stages before it."""
    folders = [out]
    if re.fullmatch(r"stage[123]", out.name):
        folders = [folder for folder in sorted(out.parent.glob("stage[123]")) if folder <= out]
    columns = {}
    for folder in folders:
        file = folder / "evaluation/scores.json"
        if not file.is_file():
            continue
        for source, scores in json.loads(file.read_text()).items():
            for name, text in summary(scores).items():
                columns.setdefault((source, name), {})[folder] = text
    heads = "".join(f"{folder.name:<22}" for folder in folders)
    print(f"\n{'held out, answers generated':<42}{heads}")
    for (source, name), texts in columns.items():
        cells = "".join(f"{texts.get(folder, ''):<22}" for folder in folders)
        print(f"{source + '  ' + name:<42}{cells}")


def summary(scores):
    """{metric: score as text}; of a score by types the lowest."""
    types = {name: s["score"] for name, s in scores.items() if name.startswith("type ")}
    texts = {name: f"{s['score']:.3f}" for name, s in scores.items() if name not in types}
    if types:
        lowest = min(types, key=types.get)
        texts["lowest type"] = f"{types[lowest]:.3f} {lowest.removeprefix('type ')}"
    return texts
