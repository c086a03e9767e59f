"""The adapters on one bench: each at a learning rate of its own, all with the same training FLOPs.

For every arm three pairs of peak rate and warm-up (HOW) are tried with one seed, and scored on a validation set, which
is another world's; the best of them trains with three seeds and is scored on the held-out set. An arm that costs more
FLOPs a row than `pool 4x4` takes as many fewer steps. What is finished is a line of docs/adapters.jsonl and is not
run again: to add an arm, add it here.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from threading import Lock

import torch

import toy
from model import PRESETS, InfMLLM
from support.plan import flops
from support.start import adapter_kind
from tools.bench_train import our_side, random_samples
from tools.measure import device_name, in_turns, update_clock
from tools.runs import OUT, ROWS, scores, show, train, value
from train import TOY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECORDS = Path("docs/adapters.jsonl")
FIGURE = Path("assets/pictures/adapters.png")
ARMS = {  # --adapter and --grid
    "pool 4x4": ("pool", 4),
    "pool 4x4, no norm": ("tools/plain.py:PlainPool", 4),
    "resampler": ("resampler", 4),
    "resampler, no norm": ("tools/plain.py:PlainResampler", 4),
    "pixel shuffle": ("examples/shuffle.py:Shuffle", 4),
    "pixel shuffle, no norm": ("tools/plain.py:PlainShuffle", 4),
    "low frequencies": ("examples/fourier.py:Fourier", 4),
    "low frequencies, no norm": ("tools/plain.py:PlainFourier", 4),
    "convolutions": ("examples/abstractor.py:Abstractor", 4),
    "convolutions, no norm": ("tools/plain.py:PlainAbstractor", 4),
    "pool 2x2": ("pool", 2),
    "pool 2x2, no norm": ("tools/plain.py:PlainPool", 2),
    "pool 8x8": ("pool", 8),  # of 8x8 patches: mlp with a norm
    "mlp": ("mlp", 8),
}
# the adapter's peak rate in stages 1 and 2, and warm-up in all three
HOW = [(1.5e-3, 0.1), (5e-3, 0.03), (1e-2, 0.1)]
# a fourth chance for those that learned to point at none of the three
MORE = {"resampler": [(2e-2, 0.1)], "resampler, no norm": [(2e-2, 0.1)]}
STEPS = {1: 150, 2: 600, 3: 200}  # of pool 4x4, 32 rows each
LONGER = 4  # times as many of each, for the resampler and the pool
CHOSEN_BY = ("captions, any order", "VQA", "boxes, Acc@0.5")  # by their mean
PLACES = ("above", "below", "half", "left", "right")  # types of questions; the others ask what
SHARE = TOY[3].lr["adapter"] / TOY[1].lr["adapter"]  # the rate of stage 3 in that of stage 1


@dataclass(frozen=True)
class Run:
    """A line of the records is this and what came of it."""

    arm: str
    rate: float
    warmup: float
    seed: int
    on: str  # validation or held out
    times: int = 1  # as many steps

    @property
    def steps(self):
        """Of the three stages."""
        return [self.times * steps(self.arm, stage) for stage in STEPS]

    @property
    def home(self):
        """Its folder; the seed that chose a rate goes on from its own stages 1 and 2 where they are there."""
        name = "-".join(map(str, (self.arm, self.rate, self.warmup, self.seed, *self.steps)))
        return OUT / "adapters" / name.replace(", ", "-").replace(" ", "-")


def config(arm):
    adapter, grid = ARMS[arm]
    c = PRESETS["toy"]()
    return replace(c, adapter=adapter_kind(adapter), grid=grid, ln_vision=adapter != "mlp")


def steps(arm, stage):
    """As many as cost what pool 4x4 costs, rows being as long as --plan assumes."""
    row = TOY[stage]
    budget, own = (
        sum(flops(config(name), row.text, row.answer, stage).values()) for name in ("pool 4x4", arm)
    )
    return round(STEPS[stage] * budget / own)


def picture_flops(arm):
    """Forward: the ViT, the adapter, and what the visual tokens add to a question's in the LLM."""
    c = config(arm)
    parts = flops(c, TOY[2].text, 1)
    text = flops(c, TOY[2].text - c.visual_tokens, 1)["llm"]
    return parts["vit"] + parts["adapter"] + parts["llm"] - text


def trained(run, stage, start=()):
    adapter, grid = ARMS[run.arm]
    rate = run.rate * SHARE if stage == 3 else run.rate
    how = ["--adapter", adapter, "--grid", grid, "--lr", f"adapter={rate:g}"]
    budget = ["--batch", 32, "--eval-every", 0, "--save-every", 0]
    budget += ["--warmup", run.warmup, "--steps", run.steps[stage - 1]]
    train(stage, run.seed, run.home / f"stage{stage}", *start, *how, *budget)


def result(run):
    """What a run came to: trains and scores it."""
    began = time.monotonic()
    adapter = ("--adapter", ARMS[run.arm][0])
    trained(run, 1, ["--init", "assets/toy"])
    trained(run, 2)
    if run.on == "validation":
        asked = ("out/validation/asked.toml", run.home / "validation", "--limit", 200)
        found = scores(run.home / "stage2", *asked, *adapter)
    else:
        trained(run, 3)
        asked = ("out/toy/asked4.toml", run.home / "heldout", "--limit", 500)
        found = scores(run.home / "stage3", *asked, *adapter)
    kept = {name: value(found, name) for name, (source, _) in ROWS.items() if source in found}
    types = {
        f"{source}, {name}": metrics["score"]
        for source in ("vqa", "chat")
        for name, metrics in found.get(source, {}).items()
        if name.startswith("type ")
    }
    took = {"minutes": (time.monotonic() - began) / 60, "machine": device_name(DEVICE)}
    return kept | types | took


class Records:
    """docs/adapters.jsonl: a run that stands in it is not run again."""

    def __init__(self):
        self.lock = Lock()
        self.known = {}
        for record in map(json.loads, RECORDS.read_text().splitlines()):
            run = Run(**{name: record[name] for name in Run.__dataclass_fields__})
            if run.arm in ARMS and run.steps == record["steps"]:  # else of another budget
                self.known[run] = record

    def of(self, run):
        if run not in self.known:
            record = asdict(run) | {"steps": run.steps} | result(run)
            with self.lock, open(RECORDS, "a") as file:
                file.write(json.dumps(record) + "\n")
            self.known[run] = record
            print(f"{run}: {record['minutes']:.1f} minutes", flush=True)
        return self.known[run]

    def best(self, arm):
        """(rate, warm-up) of an arm, by the validation set."""
        tried = [run for run in self.known if run.arm == arm and run.on == "validation"]
        run = max(tried, key=lambda run: mean(self.known[run][name] for name in CHOSEN_BY))
        return run.rate, run.warmup

    def rows(self):
        """{name in the table: the records of its seeds} of all arms that are scored"""
        found = {}
        for times in (1, LONGER):
            for arm in ARMS:
                runs = [run for run in self.known if (run.arm, run.times) == (arm, times)]
                runs = [run for run in runs if run.on == "held out"]
                name = arm if times == 1 else f"{arm}, {times} x the steps"
                if own := [run for run in runs if (run.rate, run.warmup) == self.best(arm)]:
                    found[name] = [self.known[run] for run in own]
        return found


def adapters(pool, runs, arms=None):
    toy.write("out/validation", seed=1, scenes=500)
    asked = dict.fromkeys(("captions", "vqa", "refs"))
    toy.write_mixture(Path("out/validation/asked.toml"), "heldout", asked)
    toy.write_mixture(Path("out/toy/asked4.toml"), "heldout", asked | {"chat": None})
    records = Records()
    arms = arms or list(ARMS)
    for arm in arms:  # names the classes of all files before threads do
        config(arm)
    tries = [Run(arm, *how, 0, "validation") for arm in arms for how in HOW + MORE.get(arm, [])]
    list(pool.map(records.of, tries))
    final = [Run(arm, *records.best(arm), seed, "held out") for seed in range(runs) for arm in arms]
    for arm in arms:
        if arm in ("resampler", "pool 4x4"):
            final.append(Run(arm, *records.best(arm), 0, "held out", LONGER))
    list(pool.map(records.of, final))
    rows = records.rows()
    print_table(rows)
    plot({name: found for name, found in rows.items() if name in ARMS})
    return {name: [record["boxes, Acc@0.5"] for record in found] for name, found in rows.items()}


def speeds(arms):
    """{arm: rows/s of an update of stage 2 on random rows}, all arms in turns."""
    torch.set_num_threads(1)
    row = replace(TOY[2], batch=32, rows=32)
    sides = {}
    for arm in arms:
        c = config(arm)
        samples = random_samples(c, row.rows, row.text, row.answer)
        sides[arm], _ = our_side(InfMLLM(c), 2, samples, DEVICE, row=row)
    took = in_turns(sides, repeat=5, clock=update_clock(DEVICE))
    return {arm: row.rows / took[arm] for arm in arms}


def print_table(rows):
    columns = ("captions, any order", "VQA", "VQA, places", "boxes, Acc@0.5", "chat turns")
    named = ("adapter", "tokens", "MFLOP a picture", "rows/s", "steps", "rate, warm-up", *columns)
    print(f"| {' | '.join(named)} |")
    print("|---" * len(named) + "|")
    rate = speeds(dict.fromkeys(found[0]["arm"] for found in rows.values()))
    for name, found in rows.items():
        record = found[0]
        arm = record["arm"]
        every = ", ".join(map(str, record["steps"]))
        cost = f"{picture_flops(arm) / 1e6:.0f}"
        how = f"{record['rate']:g}, {record['warmup']:g}"
        cells = [name, config(arm).visual_tokens, cost, f"{rate[arm]:.0f}", every, how]
        for seed in found:
            seed["VQA, places"] = mean(seed[f"vqa, type {kind}"] for kind in PLACES)
        cells += [show([seed[column] for seed in found], 3) for column in columns]
        print(f"| {' | '.join(map(str, cells))} |")


def plot(rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    near = axes.inset_axes([0.42, 0.2, 0.4, 0.5], xlim=(142, 147), ylim=(0.8, 1))  # 16 tokens
    for number, (name, found) in enumerate(rows.items()):
        boxes = [record["boxes, Acc@0.5"] for record in found]
        middle = mean(boxes)
        reach = [[middle - min(boxes)], [max(boxes) - middle]]
        bare = "no norm" in name or name == "mlp"
        how = dict(fmt="x" if bare else "o", color=f"C{number // 2}", capsize=2, label=name)
        for shown in (axes, near):
            shown.errorbar(picture_flops(name) / 1e6, middle, reach, **how)
    axes.indicate_inset_zoom(near)
    axes.set(xlabel="MFLOP a picture, forward", ylabel="held-out boxes, Acc@0.5", ylim=(0, 1))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(FIGURE, dpi=110, bbox_inches="tight")
    print(f"\ndrew {FIGURE}: mean and range over the seeds")
