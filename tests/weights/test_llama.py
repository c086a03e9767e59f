"""LLaMA and its kin: their layouts, the presets, and parity with transformers in both directions."""

import oracle
import pytest
import torch
from tiny import same
from transformers import AutoConfig, AutoModelForCausalLM

import weights.llama
from model import PRESETS, Config, InfMLLM, Llama, ViTConfig
from sample import around_padding, generate_ids
from weights.rename import faults, match, on_meta

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
SMOLLM2_135M = dict(
    attention_bias=False,
    hidden_act="silu",
    hidden_size=576,
    intermediate_size=1536,
    max_position_embeddings=8192,
    mlp_bias=False,
    model_type="llama",
    num_attention_heads=9,
    num_hidden_layers=30,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_interleaved=False,
    rope_scaling=None,
    rope_theta=100000,
    tie_word_embeddings=True,
    vocab_size=49152,
)
LLAMA_3_2_1B = dict(
    attention_bias=False,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_scaling={
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=500000.0,
    tie_word_embeddings=True,
    vocab_size=128256,
)
MISTRAL_7B_V3 = dict(
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    model_type="mistral",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    vocab_size=32768,
)
QWEN2_5_500M = dict(
    hidden_act="silu",
    hidden_size=896,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=21,
    model_type="qwen2",
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)
QWEN3_600M = dict(
    attention_bias=False,
    head_dim=128,
    hidden_act="silu",
    hidden_size=1024,
    intermediate_size=3072,
    max_position_embeddings=40960,
    max_window_layers=28,
    model_type="qwen3",
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
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
MILLION = {"rope_type": "default", "rope_theta": 1e6}
GROUPED = dict(num_key_value_heads=2)
KINDS = {
    "plain": {},
    "grouped queries": GROUPED,
    "tied": dict(tie_word_embeddings=True),
    "theta": dict(rope_parameters=MILLION),
    "linear": dict(rope_parameters=LINEAR),
    "llama3": dict(rope_parameters=LLAMA3),
    "attention's biases": dict(attention_bias=True),
    "mlp's biases": dict(mlp_bias=True),
    "wide heads": GROUPED | dict(head_dim=16),
    "mistral": GROUPED | dict(kind="mistral", sliding_window=None, rope_parameters=MILLION),
    "mistral's wide heads": GROUPED | dict(kind="mistral", head_dim=12),
    "a window": dict(kind="mistral", sliding_window=100),
    "qwen2": GROUPED | dict(kind="qwen2", rope_parameters=MILLION),
    "qwen2, tied": dict(kind="qwen2", tie_word_embeddings=True),
    "qwen3": GROUPED | dict(kind="qwen3", head_dim=16, rope_parameters=MILLION),
    "qwen3, tied": dict(kind="qwen3", head_dim=8, tie_word_embeddings=True),
    "qwen3's biases": dict(kind="qwen3", head_dim=4, attention_bias=True),
}


@pytest.mark.parametrize(
    "preset, config",
    [
        ("nano", SMOLLM2_135M),
        ("small", QWEN3_600M),
        ("infmllm-7b", LLAMA2_7B),
        ("infmllm-13b", LLAMA2_13B),
    ],
)
def test_the_presets_are_the_real_models(preset, config):
    assert weights.llama.llama_config(config, "config.json") == PRESETS[preset]().llm


@pytest.mark.parametrize(
    "config",
    [LLAMA2_7B, SMOLLM2_135M, LLAMA_3_2_1B, MISTRAL_7B_V3, QWEN2_5_500M, QWEN3_600M],
    ids=lambda config: f"{config['model_type']}-{config['hidden_size']}",
)
def test_published_models_fit_by_names_and_shapes(config):
    ours = weights.llama.llama_config(config, "config.json")
    theirs = AutoConfig.for_model(**config)
    theirs = on_meta(AutoModelForCausalLM.from_config, theirs).state_dict()
    parameters = dict(on_meta(Llama, ours).named_parameters())
    table = weights.llama.llama_table(ours)
    assert list(faults(match(theirs, table), theirs, parameters)) == []
    assert ours.context == config["max_position_embeddings"]


def test_a_mistral_whose_window_is_shorter_than_its_context_is_cut_to_it():
    for window, context in ((4096, 4096), (None, 32768), (65536, 32768)):
        config = MISTRAL_7B_V3 | dict(sliding_window=window)
        assert weights.llama.llama_config(config, "config.json").context == context


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_what_it_exports_give_the_logits_of_transformers(kind, published, tmp_path):
    theirs = oracle.llama(**KINDS[kind])
    ours = weights.llama.load_llama(oracle.folder(theirs, tmp_path / "in", published))
    weights.llama.export_llama(ours, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = weights.llama.load_llama(tmp_path / "out")
    assert same(ours, again) and again.config == ours.config
    assert type(exported).__name__ == type(theirs).__name__.replace("Mistral", "Llama")
    tokens = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            want = theirs.to(dtype)(tokens).logits
            oracle.assert_close(ours.head(ours.to(dtype)(tokens)), want)
            oracle.assert_close(exported.to(dtype)(tokens).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama3", "attention's biases", "mistral", "qwen2", "qwen3"])
def test_prompts_of_unequal_length_have_the_logits_and_the_greedy_answers_of_transformers(
    kind, tmp_path
):
    theirs = oracle.llama(**KINDS[kind])
    llm = weights.llama.load_llama(oracle.folder(theirs, tmp_path))
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 96, (n,), generator=rng).tolist() for n in (3, 17, 9)]
    tokens = torch.tensor([[0] * (17 - len(prompt)) + prompt for prompt in prompts])
    pad = torch.tensor([[17 - len(prompt)] for prompt in prompts])
    seen = torch.arange(17) >= pad
    positions, mask = around_padding(pad, 0, 17)
    want = theirs(tokens, attention_mask=seen.long(), position_ids=positions).logits
    oracle.assert_close(llm.head(llm(tokens, positions, mask))[seen], want[seen])

    model = InfMLLM(Config(ViTConfig(8, 8, 8, 1, 1, 8), llm.config, grid=1))
    model.llm = llm
    length = dict(max_new_tokens=40, min_new_tokens=40)
    fixed = dict(do_sample=False, eos_token_id=2, pad_token_id=0)
    answers = theirs.generate(tokens, attention_mask=seen.long(), **length, **fixed)
    assert generate_ids(model, [], prompts, eos=2, **length) == answers[:, 17:].tolist()
