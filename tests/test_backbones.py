"""The stand-ins for pretrained backbones: their schooling at miniature, and what the shipped ones can do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tools.backbones
import toy
import weights
from model import PIXEL_MEAN, PIXEL_STD, Config, LlamaConfig, ViTConfig
from support.errors import BadInput
from text import Tokenizer

ASSETS = Path(__file__).parent.parent / "assets" / "toy"
MINI = Config(
    ViTConfig(64, 8, 32, 1, 2, 64), LlamaConfig(640, 32, 1, 2, 2, 64, context=512), grid=4
)
PLAN = tools.backbones.Schooling(60, 8, 1e-2, 0.3)


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((ASSETS / "tokenizer.model").read_bytes())
    return tmp_path


def taught(folder, part):
    return torch.load(folder / f"{part}.pt")["net"]


@pytest.mark.parametrize("part", ["vit", "llm"])
def test_schooling_lowers_the_loss_and_an_interrupted_one_ends_where_a_whole_one_does(
    part, scratch
):
    losses = tools.backbones.school(part, scratch, 0, PLAN, MINI, every=100)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    whole = taught(scratch, part)
    (scratch / f"{part}.pt").unlink()
    first = tools.backbones.school(part, scratch, 0, PLAN, MINI, stop=25, every=100)
    second = tools.backbones.school(part, scratch, 0, PLAN, MINI, every=100)
    assert first + second == losses
    for name, tensor in taught(scratch, part).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_schooling_begun_with_another_seed_is_not_gone_on_with(scratch):
    tools.backbones.school("vit", scratch, 0, PLAN, MINI, stop=1)
    with pytest.raises(BadInput, match="began with --seed 0"):
        tools.backbones.school("vit", scratch, 1, PLAN, MINI)


def test_every_thing_of_a_scene_has_a_cell_of_its_own():
    for number in range(300):
        things = toy.scene(0, "train", number).things
        assert len({tools.backbones.cell_of(t) for t in things}) == len(things)


def test_the_symbolic_prefix_spells_out_the_scene_and_nothing_else():
    tokenizer = Tokenizer(ASSETS)
    reader = tools.backbones.pupil("llm", 0, tokenizer, MINI)
    for number in range(20):
        scene = toy.scene(0, "heldout", number)
        cells = reader.symbols(scene)
        assert (cells[:, 0] >= 0).sum() == len(scene.things)
        for t in scene.things:
            words = [tokenizer.decode([i]) for i in cells[tools.backbones.cell_of(t)].tolist()]
            assert words[:3] == [t.colour, t.shape, t.size]
            assert [float(w) for w in words[3:]] == pytest.approx(
                [v / toy.SIDE for v in t.box], abs=0.0051
            )


def test_the_tokenizer_that_ships_is_the_one_that_the_program_makes(tmp_path):
    tools.backbones.train_tokenizer(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (ASSETS / "tokenizer.model").read_bytes()


def test_the_shipped_llama_reads_a_scene_that_is_spelt_out():
    model, tokenizer = weights.load(ASSETS), Tokenizer(ASSETS)
    reader = tools.backbones.pupil("llm", 0, tokenizer)
    reader.llm.load_state_dict(model.llm.state_dict())
    reader.slots.data = load_file(ASSETS / "slots.safetensors")["slots"]
    scores = reader.gate(seed=7, scenes=200)
    assert scores["all"] >= 0.975, scores
    assert min(scores.values()) >= 0.93, scores  # a kind comes 50 to 400 times: room for chance


def test_the_shipped_vit_tells_what_lies_where_by_a_linear_probe():
    """The heads are thrown away, so that new ones are fitted on 600 scenes by least squares: colour, shape, size."""
    vit = weights.load(ASSETS).vit
    seer = tools.backbones.Seer(vit.config, 0)
    seer.vit.load_state_dict(vit.state_dict())

    @torch.no_grad()
    def features(split, numbers):
        images, classes, _ = seer.batch(7, split, numbers)
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
        x = torch.nn.functional.layer_norm(
            vit((images.float() - mean) / std)[:, 1:], (vit.config.width,)
        )
        x = x.view(len(x), 4, 2, 4, 2, -1).mean((2, 4)).flatten(0, 2)  # (B*C, Dv)
        return torch.cat((x, torch.ones(len(x), 1)), 1), classes[:, -16:].flatten(0, 1)

    x, y = features("train", range(600))
    held, truth = features("heldout", range(200))
    there = truth[:, 0] > 0
    for kind, least in ((0, 0.95), (1, 0.9), (2, 0.95)):
        hot = torch.nn.functional.one_hot(y[:, kind]).double()
        fit = torch.linalg.lstsq(x.double(), hot).solution
        right = (
            ((held.double() @ fit)[:, 1:].argmax(1) + 1 == truth[:, kind])[there].double().mean()
        )
        assert right >= least, (kind, right)


def test_the_assets_fit_into_ten_megabytes():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*")) <= 10e6
