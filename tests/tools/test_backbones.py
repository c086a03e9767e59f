"""The stand-ins for pretrained backbones: their schooling at miniature, and what the shipped ones can do."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

import weights
from model import Config, LlamaConfig, ViTConfig
from support.errors import BadInput
from text import Tokenizer
from tools import backbones

ASSETS = tiny.ROOT / "assets/toy"
MINI = Config(
    ViTConfig(64, 8, 32, 1, 2, 64), LlamaConfig(640, 32, 1, 2, 2, 64, context=512), grid=4
)
PLAN = backbones.Schooling(40, 8, 1e-2, 0.3)


@pytest.mark.parametrize("part", ["vit", "llm"])
def test_schooling_lowers_the_loss_and_an_interrupted_one_takes_the_same_steps(part, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((ASSETS / "tokenizer.model").read_bytes())
    school = lambda **how: backbones.school(part, tmp_path, 0, PLAN, MINI, every=100, **how)
    losses = school()
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    (tmp_path / f"{part}.pt").unlink()
    assert school(stop=15) + school() == losses
    with pytest.raises(BadInput, match="began with --seed 0"):
        backbones.school(part, tmp_path, 1, PLAN, MINI)


def test_the_tokenizer_that_ships_is_the_one_that_the_program_makes(tmp_path):
    backbones.train_tokenizer(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (ASSETS / "tokenizer.model").read_bytes()


def test_the_shipped_llama_reads_a_scene_that_is_spelt_out():
    reader = backbones.pupil("llm", 0, Tokenizer(ASSETS))
    reader.llm = weights.load(ASSETS).llm
    reader.slots.data = load_file(ASSETS / "slots.safetensors")["slots"]
    scores = reader.gate(seed=7, scenes=200)
    assert scores["all"] >= 0.975, scores
    assert min(scores.values()) >= 0.93, scores  # a kind comes 50 to 400 times: room for chance


@torch.no_grad()
def test_the_shipped_vit_tells_what_lies_where_by_a_linear_probe():
    """New heads are fitted by least squares on 600 scenes, one each for colour, shape and size."""
    seer = backbones.pupil("vit", 0, None)
    seer.vit = weights.load(ASSETS).vit
    seer.patch_head = seer.cell_head = torch.nn.Identity()
    images, classes, _ = seer.batch(7, "heldout", range(800))
    cells = seer(images)[:, -16:].flatten(0, 1)
    classes = classes[:, -16:].flatten(0, 1)
    new = slice(600 * 16, None)  # the cells of 200 more scenes
    for kind, least in ((0, 0.95), (1, 0.9), (2, 0.95)):
        wanted = torch.nn.functional.one_hot(classes[:, kind]).float()
        head = torch.linalg.lstsq(cells[: new.start], wanted[: new.start]).solution
        said = (cells[new] @ head)[:, 1:].argmax(1) + 1
        truth = classes[new, kind]
        right = (said == truth)[truth > 0].double().mean()
        assert right >= least, (kind, right)


def test_the_assets_fit_into_ten_megabytes():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*")) <= 10e6
