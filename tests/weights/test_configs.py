"""A stranger's config.json is refused in a sentence before anything is built after it."""

import os

import pytest
import tiny

import weights.checkpoint
import weights.llama
from support.errors import BadInput
from support.files import SMALL


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("model_type", "qwen3_moe", "'qwen3_moe' is no language model .* mistral, qwen2, qwen3"),
        ("hidden_act", "gelu", "hidden_act='gelu' is not llama"),
        ("rope_interleaved", True, "rope_interleaved=True is not llama"),
        ("use_sliding_window", True, "use_sliding_window=True is not llama"),
        ("layer_types", ["sliding_attention"] * 32, "layer_types=.'sliding_attention'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5 is not llama"),
        ("rope_parameters", {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ("head_dim", 65, "half a pair to rotate"),
        ("head_dim", -2, "head_dim is -2"),
        ("attention_bias", "no", "qkv_bias is no|o_bias is no"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "'yarn' is not one of"),
        ("rope_scaling", {"type": "linear", "factor": 0.0}, "config.json"),
        ("rope_scaling", 7, "config.json"),
        ("num_hidden_layers", 10**9, "layers is 1000000000"),
        ("num_hidden_layers", 0, "layers is 0"),
        ("num_hidden_layers", 2.0, "layers is 2.0"),
        ("vocab_size", 2**30, "vocab is"),
        ("intermediate_size", 2**21, "mlp is"),
        ("rms_norm_eps", -1e-5, "eps is"),
        ("tie_word_embeddings", "no", "tied is no"),
        ("rope_scaling", {"rope_type": "longrope"}, "'longrope' is not one of"),
        ("hidden_size", 96, "half a pair to rotate"),
    ],
)
def test_what_is_no_llama_or_one_of_a_billion_layers_is_refused_before_it_is_made(
    key, value, says, tmp_path, monkeypatch
):
    config = {"model_type": "llama", "num_attention_heads": 32, key: value}
    weights.checkpoint.write_json(tmp_path / "config.json", config)
    monkeypatch.setattr(weights.llama, "on_meta", None)
    with pytest.raises(BadInput, match=says) as e:
        weights.llama.load_llama(tmp_path)
    assert "take " in str(e.value)


def test_a_config_of_many_megabytes_is_refused_by_its_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "' + "x" * SMALL + '"}')
    monkeypatch.setattr(weights.llama, "llama_config", None)
    with pytest.raises(BadInput, match=f"config.json: has more than {SMALL} bytes"):
        weights.llama.load_llama(tmp_path)


def test_a_config_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BadInput, match="config.json: is no regular file"):
        weights.llama.load_llama(tmp_path)


def test_a_config_whose_pictures_have_no_place_is_refused(tmp_path):
    model = tiny.model()
    model.config.image_mark = ""
    weights.checkpoint.save(tmp_path / "c", model)
    with pytest.raises(BadInput, match="describes no model known here .*image_mark is ''"):
        weights.checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize(
    "key, value", [("prefix", 2), ("pixel_std", [0, 1, 1]), ("pixel_mean", "CLIP"), ("act", "relu")]
)
def test_a_tower_that_no_one_built_is_refused(key, value, tmp_path):
    model = tiny.model()
    setattr(model.config.vit, key, value)
    weights.checkpoint.save(tmp_path / "c", model)
    with pytest.raises(BadInput, match=f"describes no model known here .*{key[:3]}"):
        weights.checkpoint.load(tmp_path / "c")
