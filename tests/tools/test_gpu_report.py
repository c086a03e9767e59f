"""tools/gpu_report.py: every part runs, here at toy size, and what fails is named."""

import json
import sys

import pytest
import torch

from tools import gpu_report


def reported(tmp_path, *flags):
    gpu_report.main(["--out", str(tmp_path), *flags])
    report = json.loads((tmp_path / "report.json").read_text())
    return report, (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_every_part_runs_or_says_that_it_needs_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(gpu_report.Path(gpu_report.__file__).parent.parent)
    parts = ("kernel", "train", "decode", "shard")  # and the kernel's tests, which this suite runs
    report, page = reported(tmp_path, "--minutes", "10", *(f"--part={part}" for part in parts))
    assert {entry["part"] for entry in report["measurements"]} == set(parts)
    for entry in report["measurements"]:
        assert entry["status"].startswith(("run", gpu_report.NEEDS_CUDA)), entry
        assert f"**{entry['title']}**: {entry['status']}" in page
    if not torch.cuda.is_available():
        needing = [e["title"] for e in report["measurements"] if e["status"] == "needs CUDA"]
        assert needing == ["toy, stage 2, --compile"]


def test_what_fails_or_takes_too_long_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    def child(code):
        return [sys.executable, "-c", code]

    rows = '{"rows": [{"a": 1.5, "b": null}]}'
    listed = [
        ("kernel", "dies", child("raise ValueError('no such shape')"), 60),
        ("train", "hangs", child("import time; time.sleep(60)"), 6),
        ("train", "never", None, 60),
        ("decode", "tells", child(f"print('words'); print({rows!r})"), 60),
    ]
    monkeypatch.setattr(gpu_report, "measurements", lambda cuda: listed)
    report, page = reported(tmp_path)
    assert [entry["status"] for entry in report["measurements"]] == [
        "failed: ValueError: no such shape",
        "stopped after 6 s",
        "needs CUDA",
        "run",
    ]
    assert "| a | b |\n|---|---|\n| 1.5 | – |" in page
    report, _ = reported(tmp_path, "--minutes", "0", "--part", "decode")
    [entry] = report["measurements"]
    assert entry["status"].startswith("no time left")
