"""tools/study_adapters.py: what is recorded is not run again, each arm has its own best rate, all have one budget."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import PRESETS
from support.plan import flops
from tools import study_adapters as study
from train import TOY


@pytest.fixture
def made(tmp_path, monkeypatch):
    """-> the runs that would have been trained, in order; a run scores by its rate alone."""
    runs = []

    def result(run):
        runs.append(run)
        best = study.HOW[2 if "2x2" in run.arm else 1][0]
        names = [*study.ROWS, *(f"vqa, type {kind}" for kind in study.PLACES)]
        found = dict.fromkeys(names, 1 - abs(run.rate - best))
        return found | {"minutes": 1.0, "machine": "none"}

    monkeypatch.setattr(study, "result", result)
    monkeypatch.setattr(study, "RECORDS", tmp_path / "records.jsonl")
    study.RECORDS.touch()
    monkeypatch.setattr(study.toy, "write", lambda *args, **how: None)
    monkeypatch.setattr(study.toy, "write_mixture", lambda *args: None)
    monkeypatch.setattr(study, "speeds", lambda arms: dict.fromkeys(arms, 1))
    monkeypatch.setattr(study, "plot", lambda rows: None)
    return runs


def test_what_is_recorded_is_not_run_again_and_each_arm_has_its_own_best_rate(made, capsys):
    with ThreadPoolExecutor(1) as pool:
        study.adapters(pool, 3, ["mlp"])
        assert [(run.on, run.rate) for run in made[:3]] == [
            ("validation", rate) for rate, _ in study.HOW
        ]
        assert [(run.rate, run.seed) for run in made[3:]] == [(5e-3, seed) for seed in range(3)]
        made.clear()
        study.adapters(pool, 3, ["mlp", "pool 2x2"])  # an arm is added
    assert {run.arm for run in made} == {"pool 2x2"} and len(made) == 6
    assert {run.rate for run in made if run.on == "held out"} == {1e-2}
    assert len(study.RECORDS.read_text().splitlines()) == 12


def test_a_record_of_another_rate_or_another_budget_is_in_no_row(made, monkeypatch, capsys):
    with ThreadPoolExecutor(1) as pool:
        study.adapters(pool, 1, ["mlp"])
        made.clear()
        monkeypatch.setattr(study, "MORE", {"mlp": [(5.1e-3, 0.03)]})
        monkeypatch.setattr(study.Records, "best", lambda self, arm: (5.1e-3, 0.03))
        study.adapters(pool, 1, ["mlp"])
        assert [run.rate for run in made] == [5.1e-3, 5.1e-3]
        last = capsys.readouterr().out.splitlines()[-1]
        assert "| 101, 454, 157 | 0.0051, 0.03 |" in last and "–" not in last
        made.clear()
        monkeypatch.setitem(study.STEPS, 2, 500)
        study.adapters(pool, 1, ["mlp"])
        assert len(made) == 5


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
