"""LLaVA-1.5: its preset, and parity with transformers from pixels to logits."""

import json

import oracle
import pytest
import torch

import weights.llava
from model import IMAGE, PRESETS
from support.errors import BadInput

LLAVA = dict(  # as config.json says on the hub
    model_type="llava",
    text_config=dict(
        max_position_embeddings=4096, model_type="llama", rms_norm_eps=1e-5, vocab_size=32064
    ),
    vision_config=dict(
        hidden_size=1024,
        image_size=336,
        intermediate_size=4096,
        model_type="clip_vision_model",
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        projection_dim=768,
        vocab_size=32000,
    ),
)


def test_the_preset_is_the_real_llava():
    assert weights.llava.llava_config(LLAVA, "config.json") == PRESETS["llava-7b"]()


@pytest.mark.parametrize("published", [False, True])
def test_llava_end_to_end_with_unequal_lengths_gives_its_logits(published, tmp_path):
    theirs = oracle.llava(num_key_value_heads=2)
    ours = weights.llava.load_llava(oracle.folder(theirs, tmp_path, published))
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 96, (4, 60), generator=rng)
    lengths = torch.tensor([[40], [31], [60], [12]])
    mask = torch.arange(60) < lengths
    for row, start in ((0, 2), (1, 5), (2, 1), (2, 30)):
        tokens[row, start : start + 16] = 100  # the 16 placeholders of an image
    images = torch.randn(4, 3, 56, 56, generator=rng)
    for dtype in (torch.float32, torch.float64):
        ours, theirs, images = ours.to(dtype), theirs.to(dtype), images.to(dtype)
        with torch.no_grad():
            want = theirs(tokens, images, mask.long()).logits
            got = ours(images, tokens.masked_fill(tokens == 100, IMAGE))
        oracle.assert_close(got[mask], want[mask])


def test_llava_as_its_authors_publish_it_is_named_with_the_way_out(tmp_path):
    theirs = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(BadInput, match="authors' own layout.* take .*llava-hf/llava-1.5-7b-hf"):
        weights.llava.load_llava(tmp_path)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("vision_feature_layer", -1, "vision_feature_layer=-1 is not LLaVA"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "is not LLaVA-1.5's vision tower"),
    ],
)
def test_a_llava_that_reads_other_features_is_refused(key, value, says):
    with pytest.raises(BadInput, match=says):
        weights.llava.llava_config(LLAVA | {key: value}, "config.json")
