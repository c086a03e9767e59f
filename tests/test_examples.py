"""The forks in examples/, used as a user would use them."""

import json

import pytest
import tiny
import torch

import adapter
import evaluate
import sample
import train
import weights

SHUFFLE = str(tiny.ROOT / "examples/shuffle.py:Shuffle")
FAST = ["--workers", "0", "--batch", "8", "--eval-every", "0", "--save-every", "5"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    known = dict(adapter.ADAPTERS)
    yield tmp_path
    adapter.ADAPTERS.clear()
    adapter.ADAPTERS.update(known)


def run(*argv):
    return train.main([str(a) for a in argv])


def forget():
    """As in a program that has just started."""
    adapter.ADAPTERS.pop("Shuffle", None)


def test_an_adapter_of_a_users_own_file_is_trained_resumed_carried_on_asked_and_scored(
    here, capsys
):
    first = ["--stage", 1, "--init", "start", "--out", here / "one", "--steps", 10, *FAST]
    assert run(*first, "--adapter", SHUFFLE) == 0
    assert "adapter        3" in capsys.readouterr().out  # 3,2xx parameters, all of them trained
    config = json.loads((weights.find(here / "one") / "config.json").read_text())
    assert config["model"]["adapter"] == "Shuffle"  # its name, and nothing that could be imported
    tensors = weights.load_tensors(weights.find(here / "one") / "model.safetensors")
    assert tensors["adapter.fc1.weight"].shape == (32, 4 * 16)

    forget()
    second = ["--stage", 2, "--init", here / "one", "--out", here / "two", "--steps", 2, *FAST]
    assert run(*second) == 2
    assert "name your own with --adapter FILE.py:Shuffle" in capsys.readouterr().err
    assert run(*second, "--adapter", SHUFFLE) == 0
    before = tensors["adapter.fc1.weight"]
    after = weights.load_tensors(weights.find(here / "two") / "model.safetensors")
    assert 0 < (after["adapter.fc1.weight"] - before).abs().max() < 0.1  # carried on, not fresh

    forget()
    picture = ["--ckpt", str(here / "one"), "--image", "out/toy/images/0.png", "--task", "caption"]
    assert sample.run(lambda: sample.main(picture)) == 2
    assert "name your own with --adapter FILE.py:Shuffle" in capsys.readouterr().err
    sample.main([*picture, "--adapter", SHUFFLE, "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip() != ""
    forget()
    data = ["--ckpt", str(here / "one"), "--data", "out/toy/heldout.toml", "--limit", "4"]
    evaluate.main([*data, "--adapter", SHUFFLE, "--out", str(here / "scored"), "--json"])
    assert "captions" in json.loads(capsys.readouterr().out)


def test_a_run_with_an_own_adapter_resumes_to_the_byte(here):
    common = ["--stage", 1, "--init", "start", "--steps", 10, "--keep", 9, *FAST]
    assert run(*common, "--out", here / "whole", "--adapter", SHUFFLE) == 0
    assert run(*common, "--out", here / "cut", "--adapter", SHUFFLE) == 0
    for path in (here / "cut/step-00000010").iterdir():
        path.unlink()
    (here / "cut/step-00000010").rmdir()
    forget()
    assert run("--stage", 1, "--resume", "--out", here / "cut", *FAST, "--adapter", SHUFFLE) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [here / run / "step-00000010" / name for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_no_adapter_is_refused_in_one_sentence(here, capsys):
    for named, sentence in (
        ("nowhere.py:Shuffle", "nowhere.py is no file of Python"),
        (SHUFFLE.replace("Shuffle", "Shuffler"), "has no class Shuffler"),
        ("qformer", "'qformer' is none of pool, mlp, resampler"),
    ):
        assert run("--stage", 1, "--init", "start", "--out", here, "--adapter", named) == 2
        assert sentence in capsys.readouterr().err


def test_shuffle_keeps_the_order_of_the_patches(here):
    from examples.shuffle import Shuffle

    torch.manual_seed(0)
    shuffle = Shuffle(6, 10, grid=3).double()
    x = torch.randn(1, 36, 6, dtype=torch.float64, requires_grad=True)
    moved = x.detach().clone()
    moved[0, 6 * 2 + 5] += 1  # row 2, column 5: window (1, 2)
    changed = (shuffle(moved) - shuffle(x)).abs().amax(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [5]
    assert torch.autograd.gradcheck(shuffle, x)
