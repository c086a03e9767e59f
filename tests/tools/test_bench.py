"""A benchmark runs: a table, and one JSON line at the end."""

import json
import sys

from tools import bench, bench_pool


def test_a_benchmark_ends_with_a_line_of_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench_pool, "ON_CPU", [(2, 4, 2, 8)])
    monkeypatch.setattr(bench_pool, "copy_bandwidth", lambda device: 1e9)  # takes seconds
    monkeypatch.setattr(sys, "argv", ["bench", "pool", "--device", "cpu"])
    bench.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == "pool"
    assert [row["pass"] for row in found["rows"]] == ["forward", "fwd + bwd"]
