"""Every result about learning that the README tells, anew: runs of train.py and evaluate.py, side by side.

    python -m tools.study seeds        # the three stages with three seeds: what each stage teaches
    python -m tools.study adapters     # pool, resampler, no pooling, other grids, no stage 1: same budget
    python -m tools.study tune         # a frozen LLM with inner adaptors, LoRA, QV-tuning, full finetuning: same
                                       # budget; and what is left of what it could read before it saw pictures
    python -m tools.study seeds --runs 1 --jobs 1

Runs of one thread each, --jobs at a time, go to out/study; what is finished there is not run again. Each study
ends with its table in Markdown, mean over the seeds (lowest to highest), and a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support.start
import toy
from tools.backbones import reading

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

# ---- adapters
ARMS = {  # flags of both stages
    "pool 4x4": [],
    "resampler, 16 queries": ["--adapter", "resampler"],
    "pool 2x2": ["--grid", 2],
    "pool 8x8": ["--grid", 8],
    "mlp, 64 tokens": ["--adapter", "mlp"],
    "pool 4x4, no stage 1": [],
}
STAGE_1, STAGE_2 = 150, 600  # steps
LOOKS = range(200, STAGE_2 + 1, 200)  # steps of stage 2 at which boxes are scored

# ---- tune; the ViT is frozen in all of them
TUNES = {
    "frozen, inner adaptors": "inner",
    "frozen, LoRA of rank 16 on q, v": "lora",
    "Q and V": "qv",
    "full": "full",
}
RATES = {"lora": (3e-3, 1e-2)}  # peak learning rates of what trains in the LLM; of the others:
OTHERS = (3e-4, 1e-3)


def run(program, *flags):
    """One command on one thread, its output in out/study/log.txt."""
    command = [sys.executable, f"{program}.py", *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(OUT / "log.txt", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=env).returncode
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}; see {OUT / 'log.txt'}")


def train(stage, seed, out, *flags):
    named = ("--stage", stage, "--seed", seed, "--out", out, "--resume", "--score-rows", 0)
    run("train", *named, *flags)


def scores(ckpt, data, out, *flags):
    """evaluate.py's scores of a checkpoint: {source: {metric: ...}}. All samples, where no --limit is given."""
    if not (out / "scores.json").is_file():
        named = ("--ckpt", ckpt, "--data", f"out/toy/{data}.toml", "--out", out)
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


# ---------------------------------------------------------------------------------------------------
# seeds


def both_sets(ckpt, home, stage):
    """{row: score} on the held-out set and on the one with unseen pairs."""
    seen = scores(ckpt, "heldout", home / f"heldout{stage}")
    unseen = scores(ckpt, "compositional", home / f"compositional{stage}")
    found = {row: value(seen, row) for row in ROWS}
    for row, (_, metric) in ROWS.items():
        if metric:
            found[f"{row}, unseen pairs"] = value(unseen, row)
    return found


def three_stages(seed):
    home = OUT / f"seed{seed}"
    found = []
    for stage in (1, 2, 3):
        train(stage, seed, home / f"stage{stage}")
        found.append(both_sets(home / f"stage{stage}", home, stage))
    return found


def seeds(pool, runs):
    before = both_sets("assets/toy", OUT / "seeds", 0)
    stages = ("before", "after stage 1", "stage 2", "stage 3")
    rows = {row: [] for row in before}
    for after in pool.map(three_stages, range(runs)):
        for row in rows:
            values = [found[row] for found in (before, *after)]
            rows[row].append(dict(zip(stages, values)))
    return table("held out, generated", rows)


# ---------------------------------------------------------------------------------------------------
# adapters


def one_arm(arm, seed):
    """A short stage 1 and 2. -> {column: score}"""
    home = OUT / f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
    start = [*ARMS[arm], "--init", "assets/toy"]
    budget = ["--batch", 32, "--eval-every", 0]
    if "no stage 1" not in arm:
        train(1, seed, home / "stage1", *start, *budget, "--steps", STAGE_1)
        start = []
    saves = ["--save-every", LOOKS.step, "--keep", 99]
    train(2, seed, home / "stage2", *start, *budget, "--steps", STAGE_2, *saves)

    def asked(ckpt, task, name):
        return scores(ckpt, "heldout", home / name, "--limit", 500, "--task", task)

    found = {}
    for step in LOOKS:
        boxes = asked(home / f"stage2/step-{step:08d}", "ground", f"boxes{step}")
        found[f"Acc@0.5, step {step}"] = value(boxes, "boxes, Acc@0.5")
    others = asked(home / "stage2", "caption", "caption") | asked(home / "stage2", "vqa", "vqa")
    return found | {row: value(others, row) for row in SHORT[:3]}


def adapters(pool, runs):
    jobs = [(arm, seed) for seed in range(runs) for arm in ARMS]
    done = dict(zip(jobs, pool.map(one_arm, *zip(*jobs))))
    found = table("adapter", {arm: [done[arm, seed] for seed in range(runs)] for arm in ARMS})
    plot(found)
    return found


def plot(found):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for arm, values in found.items():
        ways = [values[f"Acc@0.5, step {step}"] for step in LOOKS]
        means = [sum(way) / len(way) for way in ways]
        axes.plot([0, *LOOKS], [0, *means], "o-", label=arm, linewidth=1.5, markersize=3)
        axes.fill_between(LOOKS, list(map(min, ways)), list(map(max, ways)), alpha=0.15)
    axes.set(xlabel="step of stage 2", ylabel="held-out boxes, Acc@0.5", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.savefig(OUT / "adapters.png", dpi=110, bbox_inches="tight")
    print(f"\ndrew {OUT / 'adapters.png'}: mean and range over the seeds")


# ---------------------------------------------------------------------------------------------------
# tune


def scored(ckpt, out):
    """{column: score}: what it sees, and what is left of text, which is the base's, branch or not."""
    asked = scores(ckpt, "asked", out, "--limit", 250)
    model, tokenizer = support.start.load_model(ckpt, device="cpu")
    loss, right = reading(model.text_model.llm, tokenizer)
    found = {row: value(asked, row) for row in SHORT}
    return found | {"text loss": loss, "text answers right": right}


def after_stage_1(seed):
    home = OUT / f"seed{seed}/stage1"
    train(1, seed, home)
    return scored(home, OUT / f"tune-none-{seed}")


def one_tune(name, rate, seed):
    """Stage 2's mixture after stage 1, this part of the LLM in training."""
    home = OUT / f"tune-{TUNES[name]}-{rate:g}-{seed}"
    start = ["--init", OUT / f"seed{seed}/stage1", "--data", "out/toy/stage2.toml"]
    start += ["--tune", TUNES[name], "--lr", f"adapter=2e-3,llm={rate:g}"]
    train(3, seed, home / "run", *start, "--steps", 300, "--batch", 32, "--eval-every", 0)
    return scored(home / "run", home / "asked")


def tune(pool, runs):
    toy.write_mixture(
        Path("out/toy/asked.toml"), "heldout", dict.fromkeys(("captions", "vqa", "refs"))
    )
    before = list(pool.map(after_stage_1, range(runs)))
    arms = [(name, rate) for name in TUNES for rate in RATES.get(TUNES[name], OTHERS)]
    jobs = [(*arm, seed) for seed in range(runs) for arm in arms]
    done = dict(zip(jobs, pool.map(one_tune, *zip(*jobs))))
    rows = {"after stage 1": before}
    for name, rate in arms:
        rows[f"{name}, {rate:g}"] = [done[name, rate, seed] for seed in range(runs)]
    found = table("of the LLM trains", rows)
    for arm, values in found.items():
        if "inner" in arm:
            same = values["text loss"] == found["after stage 1"]["text loss"]
            assert same, "a branch has changed what its base reads"
    return found


STUDIES = {"seeds": seeds, "adapters": adapters, "tune": tune}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES, help="which results")
    parser.add_argument("--runs", type=int, default=3, help="seeds 0 ... runs-1; default 3")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, a thread each; default 2"
    )
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    toy.write("out/toy")  # before two runs would draw it at once
    with ThreadPoolExecutor(args.jobs) as pool:
        found = STUDIES[args.study](pool, args.runs)
    print(json.dumps({"study": args.study, **found}))


if __name__ == "__main__":
    main()
