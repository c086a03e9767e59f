"""LLaMA, Vicuna and their kin."""

import json
from pathlib import Path

import torch

from model import Llama, LlamaConfig
from weights.configs import insist, read_config, renamed
from weights.files import save_tensors
from weights.rename import fill, match, on_meta

LLAMA = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.o.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.up.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.down.weight",
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
}
DEFAULTS = {"context": 2048, "eps": 1e-6}  # theirs, where they are not ours
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def llama_table(config):
    if config.tied:
        return LLAMA | {"lm_head.weight": None}
    return LLAMA


def llama_config(d, path):
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    values = DEFAULTS | renamed(d, FIELDS) | renamed(rope, {"rope_theta": "theta"})
    values.setdefault("kv_heads", values.get("heads", LlamaConfig.heads))
    config = LlamaConfig(rope=rope, **values)
    insist(d, ONLY | {"head_dim": config.width // config.heads}, path, "LLaMA")
    return config


def load_llama(path, dtype=torch.float32):
    """A LLaMA or Vicuna folder as published or as transformers saves it."""
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
    config = ONLY | {theirs: getattr(c, name) for theirs, name in FIELDS.items()}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": c.rope or None,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
