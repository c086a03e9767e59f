"""Names of one family and ours."""

import json
from pathlib import Path

import torch

from model import Llama, LlamaConfig
from support.errors import BadInput
from support.files import read_json
from weights.configs import from_a_stranger
from weights.files import save_tensors, weight_files
from weights.rename import fill, on_meta

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


def llama(config):
    return LLAMA | ({"lm_head.weight": None} if config.tied else {})


@from_a_stranger
def llama_config(d, what):
    ours = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    refused = [f"{key}={d[key]!r}" for key, only in ours.items() if d.get(key, only) != only]
    width, heads = d.get("hidden_size", 4096), d.get("num_attention_heads", 32)
    if (d.get("head_dim") or width // heads) != width // heads:
        refused.append(f"head_dim={d['head_dim']}")
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        refused.append(f"rope scaling {kind!r}")
    if refused:
        raise BadInput(
            f"{what}: {', '.join(refused)} is not LLaMA as built here; take LLaMA or Vicuna"
        )
    theta = rope.get("rope_theta", d.get("rope_theta", 1e4))
    scaling = (
        {}
        if kind == "default"
        else {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    )
    if scaling:
        scaling["rope_type"] = kind
    return LlamaConfig(
        d.get("vocab_size", 32000),
        width,
        d.get("num_hidden_layers", 32),
        heads,
        d.get("num_key_value_heads") or heads,
        d.get("intermediate_size", 11008),
        d.get("max_position_embeddings", 2048),
        d.get("rms_norm_eps", 1e-6),
        theta,
        scaling,
        d.get("tie_word_embeddings", False),
    )


def load_llama(path, dtype=torch.float32):
    """A LLaMA or Vicuna folder as published or as transformers saves it."""
    config = llama_config(read_json(Path(path) / "config.json"), path)
    return fill(on_meta(Llama, config), weight_files(path), llama(config), path, dtype)


def export_llama(model, path):
    """The language model as a Hugging Face folder that transformers opens."""
    c, path = model.config, Path(path)
    path.mkdir(parents=True, exist_ok=True)
    names = {}
    for theirs, ours in llama(c).items():
        if ours is None:
            continue
        numbers = range(c.layers) if "{}" in ours else [0]
        names |= {ours.replace("{}", str(i)): theirs.replace("{}", str(i)) for i in numbers}
    state = {names[name]: p for name, p in model.named_parameters() if name in names}
    save_tensors(state, path / "model.safetensors")
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=c.vocab,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        intermediate_size=c.mlp,
        max_position_embeddings=c.context,
        rms_norm_eps=c.eps,
        rope_theta=c.theta,
        rope_scaling=c.rope or None,
        tie_word_embeddings=c.tied,
        hidden_act="silu",
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype=dtype,
    )
    (path / "config.json").write_text(json.dumps(config, indent=2))
