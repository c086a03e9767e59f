"""LLaMA's layout, its presets, and parity with transformers in both directions."""

import oracle
import pytest
import torch
from tiny import same
from transformers import LlamaForCausalLM

import weights.llama
from model import PRESETS

LLAMA2_7B = dict(  # as config.json says on the hub
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    vocab_size=32000,
    model_type="llama",
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_scaling=None,
)
LLAMA2_13B = LLAMA2_7B | dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
TINYLLAMA = LLAMA2_7B | dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    attention_bias=False,
)
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "plain": {},
    "grouped queries": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "linear": dict(rope_parameters=LINEAR),
    "llama3": dict(rope_parameters=LLAMA3),
}


@pytest.mark.parametrize(
    "preset, config",
    [("infmllm-7b", LLAMA2_7B), ("infmllm-13b", LLAMA2_13B), ("small", TINYLLAMA)],
)
def test_the_presets_are_the_real_llamas(preset, config):
    assert weights.llama.llama_config(config, "config.json") == PRESETS[preset]().llm


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_and_what_it_exports_give_the_logits_of_transformers(kind, published, tmp_path):
    theirs = oracle.llama(**KINDS[kind])
    ours = weights.llama.load_llama(oracle.folder(theirs, tmp_path / "in", published))
    weights.llama.export_llama(ours, tmp_path / "out")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = weights.llama.load_llama(tmp_path / "out")
    assert same(ours, again) and again.config == ours.config
    tokens = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            want = theirs.to(dtype)(tokens).logits
            oracle.assert_close(ours.head(ours.to(dtype)(tokens)), want)
            oracle.assert_close(exported.to(dtype)(tokens).logits, want)
