"""Names of one family and ours."""

from model import ViTConfig
from support.errors import BadInput
from weights.configs import from_a_stranger

TOWER = {  # the lines that transformers' CLIP and BLIP-2 towers share
    "embeddings.class_embedding": "cls",
    "embeddings.patch_embedding.weight": "patch_embed.weight",
    "embeddings.position_ids": None,
    "encoder.layers.{}.layer_norm1.weight": "blocks.{}.norm1.weight",
    "encoder.layers.{}.layer_norm1.bias": "blocks.{}.norm1.bias",
    "encoder.layers.{}.layer_norm2.weight": "blocks.{}.norm2.weight",
    "encoder.layers.{}.layer_norm2.bias": "blocks.{}.norm2.bias",
    "encoder.layers.{}.mlp.fc1.weight": "blocks.{}.fc1.weight",
    "encoder.layers.{}.mlp.fc1.bias": "blocks.{}.fc1.bias",
    "encoder.layers.{}.mlp.fc2.weight": "blocks.{}.fc2.weight",
    "encoder.layers.{}.mlp.fc2.bias": "blocks.{}.fc2.bias",
    "post_layernorm.*": None,
}

CLIP = TOWER | {
    "embeddings.position_embedding.weight": "positions",
    "pre_layrnorm.weight": "pre_norm.weight",  # their spelling
    "pre_layrnorm.bias": "pre_norm.bias",
    "encoder.layers.{}.self_attn.q_proj.weight": "blocks.{}.qkv.weight[0/3]",
    "encoder.layers.{}.self_attn.k_proj.weight": "blocks.{}.qkv.weight[1/3]",
    "encoder.layers.{}.self_attn.v_proj.weight": "blocks.{}.qkv.weight[2/3]",
    "encoder.layers.{}.self_attn.q_proj.bias": "blocks.{}.q_bias",
    "encoder.layers.{}.self_attn.k_proj.bias": None,  # cancels in the softmax
    "encoder.layers.{}.self_attn.v_proj.bias": "blocks.{}.v_bias",
    "encoder.layers.{}.self_attn.out_proj.weight": "blocks.{}.proj.weight",
    "encoder.layers.{}.self_attn.out_proj.bias": "blocks.{}.proj.bias",
}

CLIP_TEXT = {
    "text_model.*": None,
    "text_projection.weight": None,
    "visual_projection.weight": None,
    "logit_scale": None,
}


def clip(config):
    """CLIP's table, without the last block: LLaVA reads hidden state -2."""
    return {f"encoder.layers.{config.layers}.*": None} | CLIP


@from_a_stranger
def clip_config(d, what):
    if d.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
        raise BadInput(
            f"{what}: hidden_act={d['hidden_act']!r} is no CLIP; take a CLIP vision tower"
        )
    return ViTConfig(
        d.get("image_size", 224),
        d.get("patch_size", 32),
        d.get("hidden_size", 768),
        d.get("num_hidden_layers", 12) - 1,
        d.get("num_attention_heads", 12),
        d.get("intermediate_size", 3072),
        act=d.get("hidden_act", "quick_gelu"),
        eps=d.get("layer_norm_eps", 1e-5),
        patch_bias=False,
        pre_norm=True,
    )
