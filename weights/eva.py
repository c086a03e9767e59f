"""EVA-CLIP's ViT-g: eva_vit_g.pth, and the same tower in transformers' BLIP-2."""

from model import EVA_G, ViTConfig
from weights.clip import FIELDS, TOWER
from weights.configs import renamed

QKV = ("blocks.{}.q.weight", "blocks.{}.k.weight", "blocks.{}.v.weight")
EVA = {  # eva_vit_g.pth and the visual_encoder of InfMLLM_7B
    "cls_token": "cls",
    "pos_embed": "positions",
    "patch_embed.proj.{}": "patch_embed.{}",
    "blocks.{}.norm1.{}": "blocks.{}.norm1.{}",
    "blocks.{}.attn.qkv.weight": QKV,
    "blocks.{}.attn.q_bias": "blocks.{}.q.bias",
    "blocks.{}.attn.v_bias": "blocks.{}.v.bias",
    "blocks.{}.attn.proj.{}": "blocks.{}.proj.{}",
    "blocks.{}.norm2.{}": "blocks.{}.norm2.{}",
    "blocks.{}.mlp.fc1.{}": "blocks.{}.fc1.{}",
    "blocks.{}.mlp.fc2.{}": "blocks.{}.fc2.{}",
    "norm.*": None,
    "fc_norm.*": None,
    "head.*": None,  # what EVA was trained with and BLIP-2 leaves out
}
BLIP2 = TOWER | {
    "embeddings.position_embedding": "positions",
    "encoder.layers.{}.self_attn.qkv.weight": QKV,
    "encoder.layers.{}.self_attn.qkv.bias": ("blocks.{}.q.bias", None, "blocks.{}.v.bias"),
    "encoder.layers.{}.self_attn.projection.{}": "blocks.{}.proj.{}",
}


def eva_table(config):
    """Block 39 of the published file does not run."""
    return {f"blocks.{config.layers}.*": None} | EVA


def blip2_table(config):
    return BLIP2


def blip2_config(d, what):
    return ViTConfig(**{"image_size": 224} | EVA_G | renamed(d, FIELDS))
