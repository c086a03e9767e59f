"""CLIP's vision tower as LLaVA reads it: without its last block and final norm."""

from model import ViTConfig
from weights.configs import renamed
from weights.rename import prefixed

TOWER = {  # the lines that transformers' CLIP and BLIP-2 towers share
    "embeddings.class_embedding": "cls",
    "embeddings.patch_embedding.{}": "patch_embed.{}",
    "embeddings.position_ids": None,
    "encoder.layers.{}.layer_norm1.{}": "blocks.{}.norm1.{}",
    "encoder.layers.{}.layer_norm2.{}": "blocks.{}.norm2.{}",
    "encoder.layers.{}.mlp.fc1.{}": "blocks.{}.fc1.{}",
    "encoder.layers.{}.mlp.fc2.{}": "blocks.{}.fc2.{}",
    "post_layernorm.*": None,
}
CLIP = TOWER | {
    "embeddings.position_embedding.weight": "positions",
    "pre_layrnorm.{}": "pre_norm.{}",  # their spelling
    "encoder.layers.{}.self_attn.k_proj.bias": None,  # cancels in the softmax
    "encoder.layers.{}.self_attn.q_proj.{}": "blocks.{}.q.{}",
    "encoder.layers.{}.self_attn.k_proj.{}": "blocks.{}.k.{}",
    "encoder.layers.{}.self_attn.v_proj.{}": "blocks.{}.v.{}",
    "encoder.layers.{}.self_attn.out_proj.{}": "blocks.{}.proj.{}",
}
CLIP_TEXT = {
    "text_model.*": None,
    "text_projection.weight": None,
    "visual_projection.weight": None,
    "logit_scale": None,
}
FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "hidden_act": "act",
    "layer_norm_eps": "eps",
}
DEFAULTS = dict(
    image_size=224,
    patch=32,
    width=768,
    layers=12,
    heads=12,
    mlp=3072,
    act="quick_gelu",
    eps=1e-5,
    patch_bias=False,
    pre_norm=True,
)


def tower_table(config):
    """LLaVA reads hidden state -2, so their last block does not run."""
    return {f"encoder.layers.{config.layers}.*": None} | CLIP


def clip_table(config):
    """A whole CLIP, whose text half is dropped, or its tower alone, under the names of several versions."""
    table = tower_table(config)
    return prefixed(table, "vision_model.") | table | CLIP_TEXT


def clip_config(d, what):
    values = DEFAULTS | renamed(d.get("vision_config", d), FIELDS)
    values["layers"] -= 1
    return ViTConfig(**values)
