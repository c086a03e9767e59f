"""Every result about learning that the README tells, anew: runs of train.py and evaluate.py, side by side.

    python -m tools.study seeds        # the three stages with three seeds: what each stage teaches
    python -m tools.study adapters     # pool, resampler and others, each at its own rate: same training FLOPs
    python -m tools.study tune         # a frozen LLM with inner adaptors, LoRA, QV-tuning, full finetuning: same
                                       # budget; and what is left of what it could read before it saw pictures
    python -m tools.study seeds --runs 1 --jobs 1

Runs of one thread each, --jobs at a time, go to out/study; what is finished there is not run again. Each study
ends with its table in Markdown, mean over the seeds (lowest to highest), and a JSON line.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support.start
import toy
from tools.backbones import reading
from tools.runs import OUT, ROWS, SHORT, scores, table, train, value
from tools.study_adapters import ARMS, adapters

# ---- tune; the ViT is frozen in all of them
TUNES = {
    "frozen, inner adaptors": "inner",
    "frozen, LoRA of rank 16 on q, v": "lora",
    "Q and V": "qv",
    "full": "full",
}
RATES = {"lora": (3e-3, 1e-2)}  # peak learning rates of what trains in the LLM; of the others:
OTHERS = (3e-4, 1e-3)


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
    parser.add_argument("--arm", choices=ARMS, action="append", help="of adapters: only this")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    toy.write("out/toy")  # before two runs would draw it at once
    with ThreadPoolExecutor(args.jobs) as pool:
        chosen = {"arms": args.arm} if args.arm else {}
        found = STUDIES[args.study](pool, args.runs, **chosen)
    print(json.dumps({"study": args.study, **found}))


if __name__ == "__main__":
    main()
