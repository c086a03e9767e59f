"""What is kept of a run's records, the curve that is drawn of them, and the table that ends a stage."""

import io
import json
import sys

import pytest
from matplotlib.figure import Figure

import train
from support.errors import BadInput
from support.log import forget_later_steps, open_tensorboard, plot, records, stage_table


def test_a_resumed_run_forgets_what_was_written_of_later_steps_and_half_a_line(tmp_path):
    file = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) for step in (5, 10, 15)]
    file.write_text("\n".join(lines) + '\n{"ste')
    assert [r["step"] for r in records(tmp_path)] == [5, 10, 15]
    forget_later_steps(file, 10)
    assert file.read_text() == "\n".join(lines[:2]) + "\n"


def test_the_curve_is_drawn_and_without_matplotlib_it_says_what_is_missing(
    tmp_path, capsys, monkeypatch
):
    log = '{"step": 1, "loss": 6.0}\n{"step": 2, "held_out": {"a": 1.0, "b": 3.0}}\n{"st'
    (tmp_path / "log.jsonl").write_text(log)
    assert train.main(["--plot", str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train.main(["--plot", str(tmp_path)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert train.main(["--plot", str(tmp_path / "nowhere")]) == 2
    assert "name the folder of a run" in capsys.readouterr().err


def test_letters_that_the_terminal_or_utf_8_lack_are_spelt_out(tmp_path, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    folder = tmp_path / "\xfc\udcff"  # the last is a byte that is no text
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 6.0}\n')
    assert train.main(["--plot", str(folder)]) == 0
    screen.flush()
    assert rb"\xfc\udcff/loss.png" in screen.buffer.getvalue()


def test_the_curve_has_a_line_for_each_source(tmp_path, monkeypatch):
    log = '{"step": 1, "loss": 6.0}\n{"step": 2, "held_out": {"a": 1.0, "b": 3.0}}\n'
    (tmp_path / "log.jsonl").write_text(log)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: figures.append(figure))
    plot(tmp_path)
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert lines == {"training": [6], "held out, a": [1], "held out, b": [3]}


def test_tensorboard_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match="pip install tensorboard"):
        open_tensorboard(tmp_path)


def test_a_stage_ends_with_its_scores_beside_those_of_the_stages_before_it(tmp_path, capsys):
    for stage in (1, 2, 3):
        scores = {"exact": stage / 4, "type colour": 0.5, "type count": stage / 8}
        folder = tmp_path / f"stage{stage}/evaluation"
        folder.mkdir(parents=True)
        vqa = {name: {"score": score} for name, score in scores.items()}
        (folder / "scores.json").write_text(json.dumps({"vqa": vqa}))
    stage_table(tmp_path / "stage2")
    head, exact, lowest = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-2:] == ["stage1", "stage2"], "nothing of a later stage"
    assert exact.split() == ["vqa", "exact", "0.250", "0.500"]
    assert lowest.split() == "vqa lowest type 0.125 count 0.250 count".split()
