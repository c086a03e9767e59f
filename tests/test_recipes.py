"""recipes/: the paper's mixtures name the files that the sets' authors publish, and run from end to end on them."""

import json
import re
import shutil

import published
import pytest
from tiny import ROOT, TOKENIZER, losses, typed

import look
from formats import load_mixture
from support.errors import BadInput
from text import Tokenizer

TRAIN = (
    "python train.py --stage 2 --data recipes/stage2.toml --init start --batch 13 --eval-every 0 "
    "--device cpu --workers 0 --log-every 1 --save-every 2 --keep 9"
)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """recipes/ beside the sets of stage 2 and of the evaluation, in miniature."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "start").symlink_to(world / "start")
    published.write_sets(folder / "recipes/data")
    return folder


def test_stage_2_trains_on_all_thirteen_sets_and_resumes_to_the_byte(folder):
    sources = load_mixture(folder / "recipes/stage2.toml")
    assert len(sources) == 13
    code, words = typed(folder, f"{TRAIN} --steps 4 --out whole")
    assert code == 0, words
    shutil.copytree(folder / "whole", folder / "cut")
    shutil.rmtree(folder / "cut/step-00000004")
    code, words = typed(folder, f"{TRAIN.replace('--init start', '--resume')} --steps 4 --out cut")
    assert code == 0, words
    assert losses(folder / "cut") == losses(folder / "whole")
    whole, cut = [folder / out / "step-00000004/model.safetensors" for out in ("whole", "cut")]
    assert whole.read_bytes() == cut.read_bytes()
    assert not (folder / "whole/unreadable.txt").exists()


def test_the_papers_table_and_every_file_that_a_server_takes(folder):
    line = "python evaluate.py --ckpt start --data recipes/eval.toml --beams 1 --device cpu --out answers"
    code, words = typed(folder, line)
    assert code == 0, words
    for name, figure in (("okvqa", 0.6133), ("gqa", 0.6315), ("refcoco+-testB", 0.8183)):
        [row] = [row for row in words.splitlines() if row.startswith(f"{name} ")]
        assert row.split()[-1] == str(figure), row
    assert "accuracy (okvqa" in words and "exact (gqa)" in words and "exact (ocrvqa)" in words
    rows = list(map(json.loads, (folder / "answers/predictions.jsonl").open()))
    words = {row["source"]: len(Tokenizer(TOKENIZER).encode(row["said"])) for row in rows}
    assert words["textvqa"] < 20 < words["ocrvqa"]  # which may say 100 tokens; the model never ends
    sent = {
        name: json.loads((folder / f"answers/{name}.submission.json").read_text())
        for name in ("vqav2-test-dev", "okvqa", "gqa", "textvqa", "ocrvqa", "refcocog-test")
    }
    assert [row["question_id"] for row in sent["vqav2-test-dev"]] == [90]
    assert [set(row) for row in sent["okvqa"]] == [{"question_id", "answer"}]
    assert [row["questionId"] for row in sent["gqa"]] == ["02930152", "07333408"]
    assert [set(row) for row in sent["gqa"]] == [{"questionId", "prediction"}] * 2
    assert [row["question_id"] for row in sent["textvqa"]] == [0]
    assert [row["question_id"] for row in sent["ocrvqa"]] == ["1401604307-0", "1401604307-1"]
    assert set(sent["refcocog-test"][0]) == {"img_name", "sent_id", "bbox"}


def test_the_files_of_the_other_servers(folder):
    line = "python evaluate.py --ckpt start --data recipes/stage2.toml --beams 1 --device cpu --out more"
    mixture = folder / "recipes/stage2.toml"
    text = mixture.read_text()
    mixture.write_text(
        text.replace('format = "ocrvqa"', 'format = "ocrvqa"\nsplit = "train"').replace(
            'format = "refer"', 'format = "refer"\nsplit = "val"'
        )
    )
    code, words = typed(folder, line)
    mixture.write_text(text)
    assert code == 0, words
    aokvqa = json.loads((folder / "more/aokvqa.submission.json").read_text())
    assert set(aokvqa["22MexNkBPpdZGX6sxbxVBH"]) == {"direct_answer"}
    textcaps = json.loads((folder / "more/textcaps.submission.json").read_text())
    assert [row["image_id"] for row in textcaps] == ["0054c91397f2fe05"]


def test_a_protocol_that_there_is_none_of_is_refused(folder):
    text = (folder / "recipes/eval.toml").read_text()
    (folder / "recipes/wrong.toml").write_text(text.replace('protocol = "gqa"', 'protocol = "g"'))
    line = "python evaluate.py --ckpt start --data recipes/wrong.toml --device cpu --out wrong"
    code, words = typed(folder, line)
    assert code == 2 and "source 'gqa': `protocol` is 'g'; name one of vqav2" in words


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "eval", "hub1", "hub2", "hub3"])
def test_a_newcomer_is_told_what_to_fetch_and_from_where(name, capsys):
    with pytest.raises(BadInput, match="none of its sources"):
        look.main([str(ROOT / f"recipes/{name}.toml")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (ROOT / f"recipes/{name}.toml").read_text().count("[[source]]")
    for line in lines:
        assert re.search(r"is not there; it comes from https://\S+ .*\d", line), line
