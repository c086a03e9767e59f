"""Every result about learning that the README tells, anew: runs of train.py and evaluate.py, side by side.

    python -m tools.study seeds        # the three stages with three seeds: what each stage teaches
    python -m tools.study adapters     # pool against resampler, no pooling and other grids, and without stage 1: same budget
    python -m tools.study tune         # a frozen LLM with inner adaptors against QV-tuning and full finetuning: same budget,
                                 # what it sees and what is left of what it could read before it saw anything
    python -m tools.study seeds --runs 1 --jobs 1

Runs of one thread each, --jobs at a time, go to out/study; what is finished there is not run again. Each study ends
with its table in Markdown, mean over the seeds (lowest to highest), and a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sample
import toy

OUT = Path("out/study")

ROWS = {  # of the tables: (data, source, metric as evaluate.py names it)
    "captions, any order": ("heldout", "captions", "exact, any order"),
    "VQA": ("heldout", "vqa", "accuracy (vqav2)"),
    "VQA, lowest type": ("heldout", "vqa", None),
    "boxes, Acc@0.5": ("heldout", "refs", "Acc@0.5"),
    "chat turns": ("heldout", "chat", "right"),
    "chat, lowest type": ("heldout", "chat", None),
}

UNSEEN = {name: ("compositional", *row[1:]) for name, row in ROWS.items() if row[2]}

ARMS = {  # of the study of adapters: flags of both stages
    "pool 4x4": [],
    "resampler, 16 queries": ["--adapter", "resampler"],
    "pool 2x2": ["--grid", "2"],
    "pool 8x8": ["--grid", "8"],
    "mlp, 64 tokens": ["--adapter", "mlp"],
    "pool 4x4, no stage 1": [],
}

FIRST, SECOND, EVERY, BATCH = (
    150,
    600,
    200,
    32,
)  # of that study: steps of stage 1 and 2, and from look to look;

SOME = ("--limit", 500)  # samples of a source at each

TUNES = {
    "frozen, inner adaptors": "inner",
    "Q and V": "qv",
    "full": "full",
}  # the ViT is frozen in all of them

RATES = (3e-4, 1e-3)  # peak learning rates of what trains in the LLM ...

BUDGET = ["--steps", 300, "--batch", 32]  # ... and the length of the runs, the same for every arm


def run(program, *flags):
    """One command on one thread, its output in out/study/log.txt."""
    command = [sys.executable, f"{program}.py", *map(str, flags)]
    with open(OUT / "log.txt", "a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}; see {OUT / 'log.txt'}")


def train(stage, out, seed, *flags):
    run(
        "train",
        "--stage",
        stage,
        "--seed",
        seed,
        "--out",
        out,
        "--resume",
        "--score-rows",
        0,
        *flags,
    )


def examine(ckpt, out, data="heldout", *flags):
    """evaluate.py's scores of a checkpoint as {source: {metric: ...}}, of all samples where no --limit is given."""
    if not (out / "scores.json").is_file():
        run(
            "evaluate",
            "--ckpt",
            ckpt,
            "--data",
            f"out/toy/{data}.toml",
            "--out",
            out,
            "--beams",
            1,
            "--min-new-tokens",
            0,
            "--batch",
            50,
            *flags,
        )
    return json.loads((out / "scores.json").read_text())


def value(scores, source, metric):
    if metric:
        return scores[source][metric]["score"]
    return min(s["score"] for name, s in scores[source].items() if name.startswith("type "))


def show(values, digits=3):
    mean, low, high = (
        f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values))
    )
    return mean + (f" ({low}–{high})" if len(values) > 1 else "")


def table(head, rows):
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def look(job):
    """Scores on both held-out sets, {(stage, data): scores}: of stage 0, the stand-ins, or of a seed's three stages."""
    seed, stages = job
    home, found = OUT / f"seed{seed}", {}
    for stage in stages:
        if stage:
            train(stage, home / f"stage{stage}", seed)
        for data in ("heldout", "compositional"):
            ckpt = home / f"stage{stage}" if stage else "assets/toy"
            found[stage, data] = examine(ckpt, home / f"{data}{stage}", data)
    return found


def seeds(pool, runs):
    *found, before = pool.map(look, [*((seed, (1, 2, 3)) for seed in range(runs)), ("s", (0,))])
    found = [before | f for f in found]
    table(
        ["held out, generated", "before", "after stage 1", "stage 2", "stage 3"],
        [
            [name + ", unseen pairs" * unseen]
            + [
                show([value(f[stage, data], *row) for f in found[: runs if stage else 1]])
                for stage in range(4)
            ]
            for unseen, rows in enumerate((ROWS, UNSEEN))
            for name, (data, *row) in rows.items()
        ],
    )
    return {
        f"{name}, {data}": [[value(f[stage, data], *row) for f in found] for stage in range(4)]
        for rows in (ROWS, UNSEEN)
        for name, (data, *row) in rows.items()
    }


def one_arm(job):
    """A short stage 1 and 2. -> (scores after stage 2, Acc@0.5 on the way there)"""
    name, seed = job
    home, flags = OUT / f"{name.replace(' ', '-').replace(',', '')}-{seed}", ARMS[name]
    start, short = [*flags, "--init", "assets/toy"], ["--batch", BATCH, "--eval-every", 0]
    if "no stage 1" not in name:
        train(1, home / "stage1", seed, *start, *short, "--steps", FIRST)
        start = []
    train(
        2,
        home / "stage2",
        seed,
        *start,
        *short,
        "--steps",
        SECOND,
        "--save-every",
        EVERY,
        "--keep",
        99,
    )
    way = [
        examine(
            home / f"stage2/step-{step:08d}",
            home / f"boxes{step}",
            "heldout",
            *SOME,
            "--task",
            "ground",
        )
        for step in range(EVERY, SECOND + 1, EVERY)
    ]
    last = way[-1]
    for task in ("caption", "vqa"):
        last |= examine(home / "stage2", home / task, "heldout", *SOME, "--task", task)
    return last, [value(scores, "refs", "Acc@0.5") for scores in way]


def adapters(pool, runs):
    jobs = [(name, seed) for seed in range(runs) for name in ARMS]
    found = dict(zip(jobs, pool.map(one_arm, jobs)))
    names, steps = list(ROWS)[:4], range(EVERY, SECOND + 1, EVERY)
    of = lambda arm: [found[arm, seed] for seed in range(runs)]
    table(
        [
            "adapter",
            *(f"Acc@0.5, step {step}" for step in steps),
            *(n for n in names if "Acc" not in n),
        ],
        [
            [
                arm,
                *(show([way[i] for _, way in of(arm)]) for i in range(len(steps))),
                *(
                    show([value(last, *ROWS[n][1:]) for last, _ in of(arm)])
                    for n in names
                    if "Acc" not in n
                ),
            ]
            for arm in ARMS
        ],
    )
    curves = {arm: [way for _, way in of(arm)] for arm in ARMS}
    plot(curves, steps)
    return {
        arm: {
            "Acc@0.5": ways,
            **{n: [value(last, *ROWS[n][1:]) for last, _ in of(arm)] for n in names},
        }
        for arm, ways in curves.items()
    }


def one_tune(job):
    """Stage 2's mixture after stage 1, that part of the LLM in training. -> scores, and what is left of text"""
    name, rate, seed = job
    begin, home = OUT / f"seed{seed}/stage1", OUT / f"tune-{TUNES.get(name)}-{rate:g}-{seed}"
    if rate:
        train(
            3,
            home / "run",
            seed,
            "--init",
            begin,
            "--data",
            "out/toy/stage2.toml",
            "--eval-every",
            0,
            "--tune",
            TUNES[name],
            "--lr",
            f"adapter=2e-3,llm={rate:g}",
            *BUDGET,
        )
    else:
        train(1, begin, seed)
    ckpt = home / "run" if rate else begin
    scores = examine(ckpt, home / "asked", "asked", "--limit", 250)
    model, tokenizer = sample.load_model(ckpt, device="cpu")
    with model.using(None):
        text = toy.reading(model.llm, tokenizer)  # text alone is the base's, branch or not
    return {n: value(scores, *ROWS[n][1:]) for n in list(ROWS)[:4]} | {
        "text loss": text["loss"],
        "text answers right": text["right"],
    }


def tune(pool, runs):
    asked = [
        f'[[source]]\nname = "{source}"\n{toy.SOURCES[source].format("heldout")}\n'
        for _, source, _ in list(ROWS.values())[:4]
        if source != "chat"
    ]
    Path("out/toy/asked.toml").write_text("".join(dict.fromkeys(asked)))
    start = {
        seed: one_tune(("stage 1", 0, seed)) for seed in range(runs)
    }  # the arms begin from these
    jobs = [(name, rate, seed) for seed in range(runs) for rate in RATES for name in TUNES]
    found = dict(zip(jobs, pool.map(one_tune, jobs)))
    rows, names = {"after stage 1": list(start.values())}, list(start[0])
    for name in TUNES:
        for rate in RATES:
            rows[f"{name}, {rate:g}"] = [found[name, rate, seed] for seed in range(runs)]
    table(
        ["of the LLM trains", *names],
        [
            [arm, *(show([f[n] for f in some], 3 + (n == "text loss")) for n in names)]
            for arm, some in rows.items()
        ],
    )
    frozen = [f["text loss"] for name in rows if "inner" in name for f in rows[name]]
    assert set(frozen) == {f["text loss"] for f in start.values()}, (
        "a branch has changed what its base reads"
    )
    return rows


def plot(curves, steps):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for arm, ways in curves.items():
        columns = list(zip(*ways))
        axes.plot(
            [0, *steps],
            [0, *(sum(c) / len(c) for c in columns)],
            "o-",
            label=arm,
            linewidth=1.5,
            markersize=3,
        )
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
    axes.set(xlabel="step of stage 2", ylabel="held-out boxes, Acc@0.5", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.savefig(OUT / "adapters.png", dpi=110, bbox_inches="tight")
    print(f"\ndrew {OUT / 'adapters.png'}: mean and range over the seeds")


STUDIES = {"seeds": seeds, "adapters": adapters, "tune": tune}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(STUDIES), help="which results")
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
