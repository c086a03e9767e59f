"""The vision towers against transformers: CLIP, BLIP-2's EVA; and EVA's own file."""

from functools import partial

import layouts
import oracle
import pytest
import tiny
import torch

import model
import weights.towers
from support.errors import BadInput
from weights.rename import faults, fill, match, on_meta

DTYPES = (torch.float32, torch.float64)


def images(size, dtype):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=rng, dtype=dtype)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("size", [56, 84, 42])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_gives_hidden_state_minus_2_at_its_own_and_other_resolutions(
    dtype, size, published, tmp_path
):
    theirs = oracle.clip().to(dtype)  # saved in float64, positions are resized in float64
    folder = oracle.folder(theirs, tmp_path, published)
    ours = weights.towers.load_vit(folder, None if size == 56 else size, dtype)
    pixels = images(size, dtype)
    with torch.no_grad():
        want = theirs(pixels, output_hidden_states=True, interpolate_pos_encoding=size != 56)
        oracle.assert_close(ours(pixels), want.hidden_states[-2])
    # positions of another square are resized while a file is read, too
    table = weights.towers.vit_table(weights.towers.TRANSFORMERS, ours.config)
    assert tiny.same(fill(on_meta(model.ViT, ours.config), folder, table, dtype), ours)


def test_the_eva_tower_equals_blip2s_up_to_its_last_block(tmp_path):
    theirs = oracle.blip2()
    theirs_last = []
    theirs.encoder.layers[-1].register_forward_hook(lambda *call: theirs_last.append(call[-1]))
    ours = weights.towers.load_vit(oracle.folder(theirs, tmp_path))
    for dtype in DTYPES:
        pixels = images(56, dtype)
        with torch.no_grad():
            theirs.to(dtype)(pixels)
            oracle.assert_close(ours.to(dtype)(pixels), theirs_last.pop())


def test_a_whole_blip2_gives_its_tower(tmp_path):
    tower = oracle.blip2()
    tower_alone = weights.towers.load_vit(oracle.folder(tower, tmp_path / "alone"))
    whole = oracle.whole_blip2(tower)
    assert tiny.same(weights.towers.load_vit(oracle.folder(whole, tmp_path / "whole")), tower_alone)


def test_an_eva_file_loads_without_its_last_block_norm_and_head(tmp_path, monkeypatch):
    small = partial(model.ViTConfig, patch=56, width=24, layers=2, heads=2, mlp=40)
    vit = oracle.randomise(model.ViT(small(224)))
    names = ("blocks.2.attn.q_bias", "norm.weight", "fc_norm.bias", "head.weight")
    unused = dict.fromkeys(names, torch.ones(24))
    torch.save(layouts.eva(vit) | unused, tmp_path / "eva.pth")
    monkeypatch.setattr(weights.towers, "ViTConfig", small)
    assert tiny.same(weights.towers.load_vit(tmp_path / "eva.pth"), vit)
    assert weights.towers.load_vit(tmp_path / "eva.pth", 112).config.image_size == 112


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("own, size", [(56, 56), (60, 60), (60, 90), (56, 42)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_siglip_gives_its_last_hidden_state_at_its_own_and_other_resolutions(
    dtype, own, size, whole, published, tmp_path
):
    theirs = oracle.siglip(image_size=own).to(dtype)  # of 60 pixels 56 fill patches
    saved = oracle.whole_siglip(theirs).to(dtype) if whole else theirs
    ours = weights.towers.load_vit(oracle.folder(saved, tmp_path, published), size, dtype)
    pixels = images(size, dtype)
    with torch.no_grad():
        want = theirs(pixels, interpolate_pos_encoding=size != own)
        oracle.assert_close(ours(pixels), want.last_hidden_state)
    assert ours.config.pixel_mean == ours.config.pixel_std == [0.5] * 3


SIGLIP2_SO400M = dict(  # the vision_config of config.json as on the hub
    hidden_size=1152,
    image_size=384,
    intermediate_size=4304,
    model_type="siglip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=27,
    patch_size=14,
)


@pytest.mark.parametrize(
    "preset, vision",
    [
        ("nano", dict(image_size=256, model_type="siglip_vision_model")),
        ("small", SIGLIP2_SO400M),
    ],
)
def test_the_presets_are_the_real_siglip2_by_names_and_shapes(preset, vision):
    published = dict(model_type="siglip", vision_config=vision, text_config={})
    config = weights.towers.vit_config(published, "config.json")
    assert config == model.PRESETS[preset]().vit
    theirs = on_meta(oracle.SiglipModel, oracle.SiglipConfig(vision_config=vision)).state_dict()
    ours = dict(on_meta(model.ViT, config).named_parameters())
    table = weights.towers.vit_table(weights.towers.TRANSFORMERS, config)
    assert list(faults(match(theirs, table), theirs, ours)) == []


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model", "dinov2"])
def test_a_tower_of_another_kind_is_refused(kind):
    with pytest.raises(BadInput, match=f"'{kind}' is no vision tower .* SigLIP of a fixed size"):
        weights.towers.vit_config({"model_type": kind}, "config.json")
