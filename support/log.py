"""While a run goes on and afterwards: log.jsonl, the progress line, the loss curve, the table of stages."""

import json
import math
import re
import resource
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import BadInput
from support.plan import peak_flops


class Log:
    """log.jsonl, the progress bar and tensorboard, on rank 0; on the others nothing."""

    def __init__(self, run):
        s = run.s
        self.run = run
        self.file = s.out / "log.jsonl"
        self.quiet = run.ranks.rank > 0
        self.peak = peak_flops(run.ranks.device)
        self.board = None
        self.began = time.perf_counter()
        self.first = run.step
        hidden = self.quiet or None  # None: where the output is no terminal
        self.bar = tqdm(total=s.steps, initial=run.step, unit="step", disable=hidden)
        self.begin()
        if self.quiet:
            return
        for file in (self.file, s.out / "unreadable.txt"):
            forget_later_steps(file, run.step)
        if s.tensorboard:
            self.board = open_tensorboard(s.out)

    def begin(self):
        """What is said of some steps starts here."""
        self.step = self.run.step
        self.since = time.perf_counter()
        self.flops = 0
        self.tokens = self.run.meters["tokens"].item()  # of steps before it, whose loss comes again
        self.seconds = Counter()  # of what is timed

    @contextmanager
    def timed(self, what):
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def step_done(self, flops):
        self.flops += flops
        self.bar.update()

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
                if isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, record["step"])
            self.board.flush()

    def say(self, text):
        if not self.quiet:
            tqdm.write(text)

    def progress(self, meters):
        """One record of the steps since the last, and the progress line."""
        run = self.run
        lr = {group["part"]: group["lr"] for group in run.optimizer.param_groups}
        steps = run.step - self.step
        took = time.perf_counter() - self.since - self.seconds["held_out"]
        record = {
            "step": run.step,
            "loss": meters["loss"] / max(meters["tokens"], 1),
            "grad_norm": meters["norm"] if math.isfinite(meters["norm"]) else None,
            "lr": lr,
            "samples_per_s": run.s.batch * steps / took,
            "tokens_per_s": (meters["tokens"] - self.tokens) / took,
            "mfu": self.flops / took / self.peak if self.peak else None,
            "skipped": int(meters["skipped"]),
            "bad": run.bad,
            "seconds": {k: v / steps for k, v in self.seconds.items()} | {"step": took / steps},
        }
        self.write(record)
        line = f"loss {record['loss']:.3f}  lr {max(lr.values()):.1e}  "
        line += f"samples/s {record['samples_per_s']:.0f}  tokens/s {record['tokens_per_s']:.0f}"
        if self.peak:
            line += f"  MFU {record['mfu']:.0%}"
        for key in ("skipped", "bad"):
            if record[key]:
                line += f"  {key} {record[key]}"
        self.bar.set_postfix_str(line)
        if self.bar.disable:
            gone = time.perf_counter() - self.began
            when = times(gone, run.step - self.first, run.s.steps - run.step)
            self.say(f"step {run.step}/{run.s.steps}  {when}  {line}")
        self.begin()


def times(seconds, done, left):
    """How long it has taken and will take, where no progress bar says it."""
    rest = tqdm.format_interval(seconds / max(done, 1) * left)
    return f"{tqdm.format_interval(seconds)} gone, {rest} to go"


def open_tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard: it is not installed; pip install tensorboard") from None
    return SummaryWriter(str(out))


def forget_later_steps(file, step):
    """A run that was killed may have written of steps that its checkpoint does not know: they come again.

    The first number of a line is its step; half a line at the end goes, too."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if int(re.search(r"\d+", line)[0]) <= step]
    part = file.with_suffix(".new")
    part.write_text("".join(kept))
    part.replace(file)


def records(folder):
    file = Path(folder) / "log.jsonl"
    if not file.is_file():
        return []
    whole, _, _ = file.read_text().rpartition("\n")  # a run that was killed may leave half a line
    return [json.loads(line) for line in whole.splitlines()]


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
    held = {}  # a curve for each source
    for r in log:
        for name, loss in r.get("held_out", {}).items():
            held.setdefault(name, []).append((r["step"], loss))
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
    for name, points in held.items():
        axes.plot(*zip(*points), "o-", label=f"held out, {name}", markersize=3)
    axes.set(
        xlabel="step",
        ylabel="loss per supervised token",
        title=str(folder).encode(errors="replace").decode(),
    )
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    print(f"drew {folder / 'loss.png'}")


def asked_of(scores):
    """How many records the scores in scores.json are of."""
    texts = []
    for source, entries in scores.items():
        r = entries["records"]
        bad = f" ({r['unreadable']} could not be read)" if r["unreadable"] else ""
        texts.append(f"{source} {r['asked']:,} of {r['of']:,}{bad}")
    return f"records asked, where not all a random sample: {', '.join(texts)}"


def stage_table(out):
    """The scores that evaluation has left in this run's folder and in those of the stages before it."""
    folders = [folder for folder in sorted(out.parent.glob("stage[123]")) if folder <= out]
    if out not in folders:
        folders = [out]
    columns = {folder.name: summary(folder / "evaluation/scores.json") for folder in folders}
    heads = "".join(f"{name:<22}" for name in columns)
    print(f"\n{'held out, answers generated':<42}{heads}")
    for score in columns[out.name]:
        cells = "".join(f"{column.get(score, ''):<22}" for column in columns.values())
        print(f"{score:<42}{cells}")


def summary(file):
    """{source and metric: score as text}; of a score by types the lowest."""
    table = {}
    if not file.is_file():
        return table
    for source, scores in json.loads(file.read_text()).items():
        types = []
        for name, entry in scores.items():
            if name == "records":
                continue
            if name.startswith("type "):
                types.append((entry["score"], name.removeprefix("type ")))
            else:
                table[f"{source}  {name}"] = f"{entry['score']:.3f}"
        if types:
            score, name = min(types)
            table[f"{source}  lowest type"] = f"{score:.3f} {name}"
    return table


FOREIGN = 0.1  # share of a text without words above which something is said


def say_foreign(data):
    """A model learns little from a text that it has hardly any words for."""
    for name, share in data.foreign.items():
        if share > FOREIGN:
            print(
                f"source '{name}': {share:.0%} of its text is read letter by letter, as the LLM has no words "
                "for it (the toy's knows those of its own world alone), so it will learn little of that"
            )
