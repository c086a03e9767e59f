"""The forks in examples/, used with the commands that stand in docs/FORK.md."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch

import weights
from support.log import records

PAGE = (tiny.ROOT / "docs/FORK.md").read_text()
PICTURE = "out/toy/heldout/images/000039.png"
SMALL = {
    "train": "--steps 10 --batch 8 --log-every 1 --save-every 5 --eval-every 10 --eval-rows 4 --score-rows 0",
    "sample": "--max-new-tokens 4",
    "evaluate": "--limit 4 --max-new-tokens 4",
}


@pytest.fixture
def here(tmp_path):
    """The project's folder in small: stage 1 is done, and there are data for every example."""
    tiny.world(tmp_path)
    shutil.copytree(tiny.ROOT / "examples", tmp_path / "examples")
    shutil.copytree(tmp_path / "start", tmp_path / "out/stage1/step-00000001")
    pictures = tmp_path / "out/toy/images"
    (tmp_path / PICTURE).parent.mkdir(parents=True)
    shutil.copy(pictures / "0.png", tmp_path / PICTURE)
    counts = []
    for row in json.loads((tmp_path / "out/toy/vqa.json").read_text()):
        [colour] = row["answers"]
        folder = tmp_path / "flowers" / f"very_{colour}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / row["image"], folder)
        counts.append(row | {"question": f"{colour} grounds", "answers": ["1"]})
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    shutil.copytree(pictures, tmp_path / "images")
    for table in re.findall(r"```toml\n(.*?)```", PAGE, re.S):
        name = re.search(r'name = "(\w+)"', table)[1]
        (tmp_path / f"{name}.toml").write_text(table)
    return tmp_path


def commands(name):
    """The page's commands that use an example, each made small."""
    for line in re.findall(rf"^python .*examples[./]{name}\b.*", PAGE, re.M):
        script = re.search(r"\b(train|sample|evaluate)\b", line)[0]
        yield f"{line} {SMALL[script]}"


def typed(here, line):
    code, said = tiny.typed(here, line)
    assert code == 0, said
    return said


def follow(here, name):
    """Type an example's commands one after another; what is to be resumed has lost its second half."""
    for line in commands(name):
        last = here / "out/stage2/step-00000010"
        if "--resume" in line:
            last = last.rename(here / "whole")
        said = typed(here, line)
        if "--resume" in line:
            for file in ("model.safetensors", "optimizer.safetensors"):
                resumed = (here / "out/stage2/step-00000010" / file).read_bytes()
                assert resumed == (last / file).read_bytes()
    return said


def tensors(path):
    return weights.load_tensors(weights.find(path) / "model.safetensors")


def answers(here):
    [file] = here.glob("out/evaluate/*/predictions.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name, width", [("shuffle", 4 * 16), ("fourier", 16), ("abstractor", 16)])
def test_an_adapter_of_a_users_own_file(here, name, width):
    shutil.rmtree(here / "out/stage1")
    kind = name.title()
    shuffle, own = "examples/shuffle.py:Shuffle", f"examples/{name}.py:{kind}"
    assert own in PAGE
    first, second, asked = [line.replace(shuffle, own) for line in commands("shuffle")]
    said = typed(here, f"{first} --init start")
    assert f"fresh ({kind})" in said  # and not start's pool, though its shapes may fit
    one = tensors(here / "out/stage1")["adapter.fc1.weight"]
    assert one.shape == (32, width)
    config = json.loads((weights.find(here / "out/stage1") / "config.json").read_text())
    assert config["model"]["adapter"] == kind  # its name, and nothing that could be imported
    typed(here, second)
    two = tensors(here / "out/stage2")["adapter.fc1.weight"]
    assert 0 < (two - one).abs().max() < 0.1  # carried on, not fresh
    shutil.rmtree(here / "out/stage2/step-00000010")
    typed(here, f"{second} --resume")
    assert torch.equal(tensors(here / "out/stage2")["adapter.fc1.weight"], two)
    assert typed(here, f"{asked} --task caption").strip()
    flag = f"--adapter {own}"
    scores = f"python evaluate.py {flag} --data out/toy/heldout.toml --limit 4"
    assert "captions" in typed(here, scores)
    for line in (f"{second} --out out/other", asked):
        code, said = tiny.typed(here, line.replace(flag, ""))
        assert code == 2 and f"name your own with --adapter FILE.py:{kind}" in said


ODD = """
from adapter import PoolAdapter

class Odd(PoolAdapter):
    def forward(self, x):
        return super().forward(x)[:, 1:]
"""


def test_what_is_no_adapter_is_refused_in_one_sentence(here):
    (here / "odd.py").write_text(ODD)
    for named, sentence in (
        ("nowhere.py:Shuffle", "nowhere.py is no file of Python"),
        ("examples/shuffle.py:Shuffler", "has no class Shuffler"),
        ("qformer", "'qformer' is none of pool, mlp, resampler"),
        ("odd.py:Odd --init start --out out/odd", "--adapter Odd: makes ("),
        (
            "odd.py:Odd --init start --plan",
            "of an image; for --grid 2 and this LLM it has to be (4, 32)",
        ),
    ):
        code, said = tiny.typed(here, f"python train.py --stage 1 --adapter {named}")
        assert code == 2 and sentence in said


def test_a_format_of_a_users_own(here):
    assert "flowers" in follow(here, "folders")
    losses = tiny.losses(here / "out/stage2")
    assert losses[10] < losses[1]
    for row in answers(here):
        assert "what is this" in row["asked"] and row["truth"][0].startswith("very ")


def test_a_task_with_a_prompt_of_its_own(here):
    assert "right" in follow(here, "count")
    losses = tiny.losses(here / "out/stage2")
    assert losses[10] < losses[1]
    for row in answers(here):
        assert row["asked"].endswith("grounds? Number:") and row["truth"] == ["1"]
    other = "python -m examples.count train --stage 2 --out out/both --data out/toy/stage2.toml"
    typed(here, f"{other} {SMALL['train']}")  # the tasks of others are asked as before


def test_another_loss_is_trained_and_the_plain_one_is_held_out(here):
    follow(here, "zloss")
    typed(here, f"python train.py --stage 2 --out out/plain {SMALL['train']}")
    own, plain = (records(here / f"out/{name}") for name in ("stage2", "plain"))
    assert own[0]["held_out"] == plain[0]["held_out"]
    vocabulary = tensors(here / "start")["llm.embed.weight"].shape[0]
    z = math.log(vocabulary)  # of a model that has no opinion yet
    assert own[1]["loss"] - plain[1]["loss"] == pytest.approx(1e-4 * z**2, rel=0.01)


def test_gains_train_on_top_of_matrices_which_stay(here):
    follow(here, "gain")
    before, after = tensors(here / "start"), tensors(here / "out/stage2")
    gains = {name for name in after if name.endswith(".gains")}
    assert {name.split(".")[3] for name in gains} == {"q", "v"} and len(gains) == 4
    assert all((after[name] != 1).any() for name in gains)
    for name in after.keys() - gains:
        old = before[name.replace("base.", "")]
        assert torch.equal(after[name], old) == name.startswith("llm."), name
    typed(here, f"python train.py --stage 2 --out out/plain {SMALL['train']}")
    own, plain = (tiny.losses(here / f"out/{name}") for name in ("stage2", "plain"))
    assert own[1] == plain[1] and own[10] != plain[10]  # it begins as the model it is added to
    code, said = tiny.typed(here, f"python sample.py --image {PICTURE} --prompt hello")
    assert code == 2 and "q.gains" in said  # its checkpoint without its file


def test_an_example_is_a_program_of_its_own(here):
    line = next(commands("folders"))
    words = line.replace("python", sys.executable, 1).split()
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    subprocess.run(words, cwd=here, env=environment, check=True, capture_output=True)
    assert weights.find(here / "out/stage2").name == "step-00000010"
    for line, sentence in (
        ("--stage 2", "name train, sample or evaluate"),
        ("train --stage 5", "invalid choice"),
        ("sample --ckpt nowhere --prompt hi", "no checkpoint here"),
    ):
        code, said = tiny.typed(here, f"python -m examples.folders {line}")
        assert code == 2 and sentence in said and "Traceback" not in said
