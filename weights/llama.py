"""LLaMA and its kin: Vicuna, SmolLM2, TinyLlama; Mistral, Qwen2 and Qwen3, which differ in config fields alone."""

import json
from pathlib import Path

import torch

from model import Llama, LlamaConfig
from support.errors import BadInput
from weights.configs import insist, read_config, renamed
from weights.files import save_tensors
from weights.rename import fill, match, on_meta

LLAMA = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.{}": "layers.{}.q.{}",
    "model.layers.{}.self_attn.k_proj.{}": "layers.{}.k.{}",
    "model.layers.{}.self_attn.v_proj.{}": "layers.{}.v.{}",
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.k_norm.weight",
    "model.layers.{}.self_attn.o_proj.{}": "layers.{}.o.{}",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.{}": "layers.{}.gate.{}",
    "model.layers.{}.mlp.up_proj.{}": "layers.{}.up.{}",
    "model.layers.{}.mlp.down_proj.{}": "layers.{}.down.{}",
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,  # computed from the config
    "model.rotary_emb.inv_freq": None,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
    "max_position_embeddings": "context",
    "rms_norm_eps": "eps",
    "rope_theta": "theta",
    "tie_word_embeddings": "tied",
    "head_dim": "head_dim",
    "attention_bias": "o_bias",
    "mlp_bias": "mlp_bias",
}
QWEN = dict(vocab=151936, mlp=22016, context=32768, eps=1e-6)
FAMILIES = {  # model_type: what its config.json may leave out, where that is not our default
    "llama": dict(context=2048, eps=1e-6),
    "mistral": dict(kv_heads=8, mlp=14336, context=131072, eps=1e-6),
    "qwen2": QWEN | dict(qkv_bias=True),
    "qwen3": QWEN | dict(head_dim=128, qk_norm=True),
}
ONLY = {"hidden_act": "silu", "use_sliding_window": False, "rope_interleaved": False}


def llama_table(config):
    if config.tied:
        return LLAMA | {"lm_head.weight": None}
    return LLAMA


def llama_config(d, path):
    kind = d.get("model_type")
    if kind not in FAMILIES:
        raise BadInput(
            f"{path}: model_type {kind!r} is no language model known here; take one of {', '.join(FAMILIES)}"
        )
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    values = FAMILIES[kind] | renamed(d, FIELDS) | renamed(rope, {"rope_theta": "theta"})
    values.setdefault("kv_heads", values.get("heads", LlamaConfig.heads))
    values.setdefault("qkv_bias", values.get("o_bias", False))
    if kind == "mistral":  # a row of no more than the window sees all of itself, as here
        window = d.get("sliding_window", 4096)
        values["context"] = min(values["context"], window or values["context"])
    config = LlamaConfig(rope=rope, **values)
    full = ["full_attention"] * len(d.get("layer_types") or [])
    insist(rope | d, ONLY | {"layer_types": full, "partial_rotary_factor": 1}, path, kind)
    return config


def load_llama(path, dtype=torch.float32):
    """A folder of one of FAMILIES as published or as transformers saves it."""
    config = read_config(path, llama_config)
    return fill(on_meta(Llama, config), path, llama_table(config), dtype)


def export_llama(model, path):
    """The language model as a Hugging Face folder that transformers opens."""
    c = model.config
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    ours = dict(model.named_parameters())
    turned = {name: theirs for theirs, name in llama_table(c).items() if name}
    state = {theirs: ours[name] for name, (theirs,) in match(ours, turned).items()}
    save_tensors(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf_config(model), indent=2))


def hf_config(model):
    """The config.json of a language model as Hugging Face writes it."""
    c = model.config
    family = "llama"  # Mistral is this, with grouped queries
    if c.qk_norm:
        family = "qwen3"
    elif c.qkv_bias and not c.o_bias:
        family = "qwen2"
    config = ONLY | {theirs: getattr(c, name) for theirs, name in FIELDS.items()}
    return config | {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "rope_scaling": c.rope or None,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
    }
