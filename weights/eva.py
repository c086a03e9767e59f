"""Names of one family and ours."""

from model import ViTConfig
from weights.clip import TOWER
from weights.configs import from_a_stranger

EVA = {  # eva_vit_g.pth and the visual_encoder of InfMLLM_7B
    "cls_token": "cls",
    "pos_embed": "positions",
    "patch_embed.proj.weight": "patch_embed.weight",
    "patch_embed.proj.bias": "patch_embed.bias",
    "blocks.{}.norm1.weight": "blocks.{}.norm1.weight",
    "blocks.{}.norm1.bias": "blocks.{}.norm1.bias",
    "blocks.{}.attn.qkv.weight": "blocks.{}.qkv.weight",
    "blocks.{}.attn.q_bias": "blocks.{}.q_bias",
    "blocks.{}.attn.v_bias": "blocks.{}.v_bias",
    "blocks.{}.attn.proj.weight": "blocks.{}.proj.weight",
    "blocks.{}.attn.proj.bias": "blocks.{}.proj.bias",
    "blocks.{}.norm2.weight": "blocks.{}.norm2.weight",
    "blocks.{}.norm2.bias": "blocks.{}.norm2.bias",
    "blocks.{}.mlp.fc1.weight": "blocks.{}.fc1.weight",
    "blocks.{}.mlp.fc1.bias": "blocks.{}.fc1.bias",
    "blocks.{}.mlp.fc2.weight": "blocks.{}.fc2.weight",
    "blocks.{}.mlp.fc2.bias": "blocks.{}.fc2.bias",
    "norm.*": None,
    "fc_norm.*": None,
    "head.*": None,  # what EVA was trained with and BLIP-2 leaves out
}

BLIP2 = TOWER | {
    "embeddings.position_embedding": "positions",
    "embeddings.patch_embedding.bias": "patch_embed.bias",
    "encoder.layers.{}.self_attn.qkv.weight": "blocks.{}.qkv.weight",
    "encoder.layers.{}.self_attn.qkv.bias": ("blocks.{}.q_bias", None, "blocks.{}.v_bias"),
    "encoder.layers.{}.self_attn.projection.weight": "blocks.{}.proj.weight",
    "encoder.layers.{}.self_attn.projection.bias": "blocks.{}.proj.bias",
}


def eva(config):
    """EVA's table; block 39 of the published file does not run."""
    return {f"blocks.{config.layers}.*": None} | EVA


@from_a_stranger
def blip2_config(d, what):
    return ViTConfig(
        d.get("image_size", 224),
        d.get("patch_size", 14),
        d.get("hidden_size", 1408),
        d.get("num_hidden_layers", 39),
        d.get("num_attention_heads", 16),
        d.get("intermediate_size", 6144),
        act=d.get("hidden_act", "gelu"),
        eps=d.get("layer_norm_eps", 1e-6),
    )
