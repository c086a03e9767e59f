"""tools/study_adapters.py: what is recorded is not run again, each arm has its own best rate, all have one budget."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import PRESETS
from support.plan import flops
from tools import study_adapters as study
from train import TOY


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """-> the runs that would have been trained, in order; a run scores by its rate alone."""
    runs = []

    def result(run):
        runs.append(run)
        best = study.HOW[2 if "2x2" in run.arm else 1][0]
        found = dict.fromkeys(study.ROWS, 1 - abs(run.rate - best))
        return found | {"minutes": 1.0, "machine": "none"}

    monkeypatch.setattr(study, "result", result)
    monkeypatch.setattr(study, "RECORDS", tmp_path / "records.jsonl")
    monkeypatch.setattr(study.toy, "write", lambda *args, **how: None)
    monkeypatch.setattr(study.toy, "write_mixture", lambda *args: None)
    monkeypatch.setattr(study, "speeds", lambda arms: dict.fromkeys(arms, 1))
    monkeypatch.setattr(study, "plot", lambda rows: None)
    return runs


def test_what_is_recorded_is_not_run_again_and_each_arm_has_its_own_best_rate(asked, capsys):
    with ThreadPoolExecutor(1) as pool:
        study.adapters(pool, 3, ["mlp"])
        assert [(run.on, run.rate) for run in asked[:3]] == [
            ("validation", rate) for rate, _ in study.HOW
        ]
        assert [(run.rate, run.seed) for run in asked[3:]] == [(5e-3, seed) for seed in range(3)]
        asked.clear()
        study.adapters(pool, 3, ["mlp", "pool 2x2"])  # an arm is added
    assert {run.arm for run in asked} == {"pool 2x2"} and len(asked) == 6
    assert {run.rate for run in asked if run.on == "held out"} == {1e-2}
    assert len(study.RECORDS.read_text().splitlines()) == 12
    assert (
        "| pool 2x2 | 4 | 121 | 1 | 170, 650, 214 | 0.01, 0.1 | 1.000 |" in capsys.readouterr().out
    )


def test_every_arm_has_the_training_flops_of_the_pool():
    for stage, row in TOY.items():
        budget = study.STEPS[stage] * sum(
            flops(PRESETS["toy"](), row.text, row.answer, stage).values()
        )
        for arm in study.ARMS:
            cost = sum(flops(study.config(arm), row.text, row.answer, stage).values())
            assert study.steps(arm, stage) * cost == pytest.approx(budget, rel=0.005), arm


def test_the_committed_records_are_whole():
    for line in study.RECORDS.read_text().splitlines():
        record = json.loads(line)
        assert record["arm"] in study.ARMS and set(study.CHOSEN_BY) <= set(record)
