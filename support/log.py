"""While a run goes on: log.jsonl, the progress line, the loss curve, the table of stages."""

import json
import math
import re
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import BadInput


def stage_table(folders):
    """A column a run: the scores that its evaluation left. Of a score by types, the lowest type."""
    columns = {}
    for folder in (f for f in folders if (f / "evaluation/scores.json").is_file()):
        for source, scores in json.loads((folder / "evaluation/scores.json").read_text()).items():
            typed = {name: s["score"] for name, s in scores.items() if name.startswith("type ")}
            found = {name: f"{s['score']:.3f}" for name, s in scores.items() if name not in typed}
            lowest = min(typed, key=typed.get, default=None)
            if lowest:
                found["lowest type"] = f"{typed[lowest]:.3f} {lowest.removeprefix('type ')}"
            for name, text in found.items():
                columns.setdefault((source, name), {})[folder] = text
    print(
        f"\n{'held out, answers generated':<42}"
        + "".join(f"{folder.name:<22}" for folder in folders)
    )
    for (source, name), texts in columns.items():
        print(
            f"{source + '  ' + name:<42}"
            + "".join(f"{texts.get(folder, ''):<22}" for folder in folders)
        )


class Log:
    """log.jsonl, the progress bar and tensorboard, on rank 0; on the others nothing."""

    def __init__(self, out, step, steps, rank, tensorboard=False):
        self.file, self.step, self.steps, self.quiet, self.board = (
            out / "log.jsonl",
            step,
            steps,
            rank > 0,
            None,
        )
        self.since, self.flops, self.seconds = (
            time.perf_counter(),
            0,
            {"load": 0.0, "update": 0.0, "save": 0.0},
        )
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=True if self.quiet else None
        )
        if self.quiet:
            return
        # a run that was killed may have logged steps that its checkpoint does not know: they come again
        keep(self.file, lambda line: logged_step(line) <= step)
        keep(
            out / "unreadable.txt",
            lambda line: int((re.match(r"step (\d+):", line) or (0, step))[1]) < step,
        )
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput(
                    "--tensorboard: it is not installed; pip install tensorboard"
                ) from None
            self.board = SummaryWriter(str(out))

    def write(self, record):
        if self.quiet:
            return
        try:
            with open(self.file, "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            raise BadInput(
                f"{self.file}: cannot be written ({e}); make room and --resume"
            ) from None
        if not self.board:
            return
        for key, value in (record | record.get("held_out", {})).items():
            if isinstance(value, (int, float)) and key != "step":
                self.board.add_scalar(key, value, record["step"])
        self.board.flush()

    def say(self, text):
        if not self.quiet:
            tqdm.write(text)

    def progress(self, step, batch, lr, meters, bad, peak):
        """One record of the steps since the last."""
        now, steps = time.perf_counter(), step - self.step
        took, loss = now - self.since, meters["loss"] / max(meters["tokens"], 1)
        norm = meters["norm"] if math.isfinite(meters["norm"]) else None
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
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
            "loss": f"{loss:.3f}",
            "lr": f"{max(lr.values()):.1e}",
            "samples/s": f"{record['samples_per_s']:.0f}",
            "tokens/s": f"{record['tokens_per_s']:.0f}",
        }
        if peak:
            shown["MFU"] = f"{record['mfu']:.0%}"
        if meters["skipped"]:
            shown["skipped"] = record["skipped"]
        if bad:
            shown["bad"] = bad
        self.bar.set_postfix(shown)
        if self.bar.disable:
            self.say(
                f"step {step}/{self.steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items())
            )
        self.step, self.since, self.flops, self.seconds = (
            step,
            now,
            0,
            dict.fromkeys(self.seconds, 0.0),
        )


def keep(file, wanted):
    """The lines of a file that are wanted; half a line at its end is not."""
    if not file.exists():
        return
    part = file.with_suffix(".new")
    part.write_text(
        "".join(
            line
            for line in file.read_text().splitlines(True)
            if line.endswith("\n") and wanted(line)
        )
    )
    part.replace(file)


def logged_step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # the half line of a run that was killed


def records(folder):
    file = Path(folder) / "log.jsonl"
    if not file.is_file():
        return []
    return [
        json.loads(line) for line in file.read_text().splitlines() if logged_step(line) < math.inf
    ]


def measured_time(out, steps):
    timed = [r for r in records(out) if "seconds" in r]
    if not timed:
        return f"time per step: not measured (no run in {out})"
    seconds = timed[-1]["seconds"]["step"]
    return f"measured in {out}: {seconds:.3f} s a step, so {seconds * steps / 3600:.2f} h"


def plot(folder):
    """DIR/loss.png where matplotlib is installed, and a curve of characters where it is not."""
    log = records(folder)
    curve = [(r["step"], r["loss"]) for r in log if "loss" in r]
    held = [
        (r["step"], sum(r["held_out"].values()) / len(r["held_out"]))
        for r in log
        if "held_out" in r
    ]
    if not curve:
        raise BadInput(
            f"{Path(folder) / 'log.jsonl'}: no record of a step; name the folder of a run"
        )
    try:
        from matplotlib.figure import Figure  # pyplot would take a second more to import
    except ImportError:
        return text_curve(curve)
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(*zip(*curve), label="training", linewidth=1)
    if held:
        axes.plot(*zip(*held), "o-", label="held out, mean of the sources")
    axes.set(xlabel="step", ylabel="loss per supervised token", title=str(folder))
    axes.legend()
    figure.savefig(Path(folder) / "loss.png", dpi=120, bbox_inches="tight")
    print(f"drew {Path(folder) / 'loss.png'}")


def text_curve(curve, width=60):
    top = max(loss for _, loss in curve)
    for step, loss in curve[:: max(1, len(curve) // 20)]:
        print(f"{step:>8} {loss:>8.3f} " + "#" * round(width * loss / top))


def peak_memory(device):
    """The most bytes that this rank has held: on its GPU, or of RAM since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
