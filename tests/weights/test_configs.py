"""A stranger's config.json is refused in a sentence before anything is built after it."""

import pytest
import tiny

import weights.checkpoint
import weights.llama
from support.errors import BadInput
from support.files import SMALL


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("model_type", "mistral", "not LLaMA"),
        ("attention_bias", True, "not LLaMA"),
        ("head_dim", 64, "not LLaMA"),
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
        ("hidden_size", 96, "half a pair to rotate"),
    ],
)
def test_what_is_no_llama_or_one_of_a_billion_layers_is_refused_before_it_is_made(
    key, value, says, tmp_path, monkeypatch
):
    config = {"model_type": "llama", "num_attention_heads": 32, key: value}
    weights.checkpoint.write_json(tmp_path / "config.json", config)
    monkeypatch.setattr(weights.llama, "on_meta", None)
    with pytest.raises(BadInput, match=says):
        weights.llama.load_llama(tmp_path)


def test_a_config_of_many_megabytes_is_refused_by_its_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "' + "x" * SMALL + '"}')
    monkeypatch.setattr(weights.llama, "llama_config", None)
    with pytest.raises(BadInput, match=f"config.json: has more than {SMALL} bytes"):
        weights.llama.load_llama(tmp_path)


def test_a_config_whose_pictures_have_no_place_is_refused(tmp_path):
    model = tiny.model()
    model.config.image_mark = ""
    weights.checkpoint.save(tmp_path / "c", model)
    with pytest.raises(BadInput, match="describes no model known here .*image_mark is ''"):
        weights.checkpoint.load(tmp_path / "c")
