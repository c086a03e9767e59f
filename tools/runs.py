"""What the studies share: runs of train.py and evaluate.py on one thread each, their scores, tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import weights

OUT = Path("out/study")
ROWS = {  # of the tables: source, metric as evaluate.py names it; None: the lowest of its types
    "captions, any order": ("captions", "exact, any order"),
    "VQA": ("vqa", "accuracy (vqav2)"),
    "VQA, lowest type": ("vqa", None),
    "boxes, Acc@0.5": ("refs", "Acc@0.5"),
    "chat turns": ("chat", "right"),
    "chat, lowest type": ("chat", None),
}
SHORT = list(ROWS)[:4]  # of the studies with a budget: no stage 3, no chat


def run(program, *flags):
    """One command on one thread, or on the GPU where there is one; its output goes to out/study/log.txt."""
    command = [sys.executable, f"{program}.py", "--dtype", "fp32", *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(OUT / "log.txt", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=env).returncode
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}; see {OUT / 'log.txt'}")


def train(stage, seed, out, *flags):
    named = ("--stage", stage, "--seed", seed, "--out", out, "--resume", "--score-rows", 0)
    run("train", *named, "--workers", 2, *flags)
    newest = weights.find(out)
    steps = weights.read_checked(newest, "config.json")["training"]["steps"]
    if newest.name != f"step-{steps:08d}":  # a signal ends a run in peace
        sys.exit(f"{out} was stopped at {newest.name} of {steps}")


def scores(ckpt, data, out, *flags):
    """evaluate.py's scores of a checkpoint: {source: {metric: ...}}. All samples, where no --limit is given.
    data: a mixture of the toy world, or a file."""
    if not (out / "scores.json").is_file():
        data = data if str(data).endswith(".toml") else f"out/toy/{data}.toml"
        named = ("--ckpt", ckpt, "--data", data, "--out", out)
        run("evaluate", *named, "--beams", 1, "--min-new-tokens", 0, "--batch", 50, *flags)
    return json.loads((out / "scores.json").read_text())


def value(found, row):
    source, metric = ROWS[row]
    if metric:
        return found[source][metric]["score"]
    return min(s["score"] for name, s in found[source].items() if name.startswith("type "))


def show(values, digits):
    mean, low, high = (
        f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low}–{high})"


def table(head, rows):
    """rows: {name: a {column: value} for each seed} -> {name: {column: values}}"""
    columns = list(next(iter(rows.values()))[0])
    print(f"| {head} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    found = {}
    for name, seeds in rows.items():
        found[name] = {column: [values[column] for values in seeds] for column in columns}
        cells = [
            show(values, 4 if "loss" in column else 3) for column, values in found[name].items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    return found
