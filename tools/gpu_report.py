"""All that a device can say about this project, in one command and on one page.

    python -m tools.gpu_report                          # -> gpu-report/report.md and report.json
    python -m tools.gpu_report --minutes 30 --part train --part decode

A bare clone with torch and triton is enough: weights are random, nothing is fetched. Every measurement is a child
process with a time limit of its own; one that fails is named and the rest goes on. Without a GPU everything runs on
the CPU at toy size, which says nothing but that the command works.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

PRESETS = ("infmllm-7b", "small")
NEEDS_CUDA = "needs CUDA"


def measurements(cuda):
    """[(part, what is measured, command, seconds at most)]; a command of None needs CUDA."""
    device = "cuda" if cuda else "cpu"

    def bench(line):
        return [sys.executable, "-m", "tools.bench", *line.split(), "--device", device]

    def pytest(*files):
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]

    found = [
        ("tests", "the kernel's tests on this device", pytest("tests/test_pool_triton.py"), 600),
        ("kernel", "the kernel against eager, compiled and a copy", bench("pool"), 300),
        ("kernel", "other rows, stages and warps", bench("search"), 300),
    ]
    for preset in PRESETS if cuda else ("toy",):
        at = f"--preset {preset}"
        for stage in (1, 2, 3):
            limit = bench(f"limit {at} --stage {stage}")
            found.append(("train", f"{preset}, stage {stage}", limit, 240))
        compiled = bench(f"limit {at} --stage 2 --compile") if cuda else None
        profile = bench(f"profile {at} --stage 2")
        found.append(("train", f"{preset}, stage 2, --compile", compiled, 300))
        found.append(("train", f"{preset}, stage 2: what takes the time", profile, 240))
        grouped = bench(f"grouped {at}")
        found.append(("train", f"{preset}: padded rows with grouped queries", grouped, 120))
        found.append(("decode", preset, bench(f"decoding {at}"), 240))
    found.append(("shard", "ranks against a single process", bench("sharded"), 300))
    return found


def run(command, limit):
    """{status, seconds, and what its last line of JSON says}"""
    if command is None:
        return {"status": NEEDS_CUDA, "seconds": 0}
    if limit < 5:
        return {"status": "no time left; give it more with --minutes", "seconds": 0}
    began = time.monotonic()
    env = os.environ | {"PYTHONPATH": "."}
    if not torch.cuda.is_available():
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": f"stopped after {limit:.0f} s", "seconds": limit}
    took = time.monotonic() - began
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        *_, reason = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        return {"status": f"failed: {reason[:300]}", "seconds": took}
    if lines[-1].startswith("{"):
        return {"status": "run", "seconds": took, **json.loads(lines[-1])}
    return {"status": f"run: {lines[-1]}", "seconds": took}


def output(*command):
    """What a command says; nothing where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def about():
    cuda = torch.cuda.is_available()
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    driver = output("nvidia-smi", *query).splitlines()[:1]
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "devices": torch.cuda.device_count() if cuda else 0,
        "driver": driver[0] if driver else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD") or None,
    }


def page(report):
    """The report as Markdown: a line and a table for each measurement."""
    lines = [f"# {report['about']['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["about"].items()]
    part = None
    for entry in report["measurements"]:
        if entry["part"] != part:
            part = entry["part"]
            lines += ["", f"## {part}"]
        lines += ["", f"**{entry['title']}**: {entry['status']} ({entry['seconds']:.0f} s)"]
        if entry["command"]:
            lines += ["", f"`{entry['command']}`"]
        scalars = {k: v for k, v in entry.items() if isinstance(v, float) and k != "seconds"}
        if scalars:
            lines += ["", ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())]
        if rows := entry.get("rows"):
            columns = list(rows[0])
            lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(cell(row[name]) for name in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value):
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("tests", "kernel", "train", "decode", "shard")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it; default 10")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="default gpu-report")
    parser.add_argument("--part", action="append", choices=parts, help="only this; may be repeated")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"about": about(), "measurements": []}
    for part, title, command, limit in measurements(torch.cuda.is_available()):
        if args.part and part not in args.part:
            continue
        result = run(command, min(limit, end - time.monotonic()))
        line = " ".join(["python", *command[1:]]) if command else None
        entry = {"part": part, "title": title, "command": line, **result}
        report["measurements"].append(entry)
        print(f"{part}: {title}: {entry['status']} ({entry['seconds']:.0f} s)", flush=True)
        # after each, so that nothing is lost if this is stopped
        (args.out / "report.json").write_text(json.dumps(report, indent=2))
        (args.out / "report.md").write_text(page(report))
    print(f"{args.out / 'report.md'}")


if __name__ == "__main__":
    main()
