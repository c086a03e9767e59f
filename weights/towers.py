"""Vision towers: CLIP as LLaVA reads it, SigLIP, EVA-CLIP's ViT-g, and the same in transformers' BLIP-2.

To add one, write its names into a table, and what its config.json leaves out into TOWERS.
"""

from pathlib import Path

import torch

from model import CLIP_L, SIGLIP_BASE, ViT, ViTConfig
from support.errors import BadInput
from weights.configs import read_config, renamed
from weights.rename import fill, on_meta, prefixed

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
ALONE = {  # a tower in transformers
    "embeddings.class_embedding": "cls",
    "embeddings.patch_embedding.{}": "patch_embed.{}",
    "embeddings.position_ids": None,
    "encoder.layers.{}.layer_norm1.{}": "blocks.{}.norm1.{}",
    "encoder.layers.{}.layer_norm2.{}": "blocks.{}.norm2.{}",
    "encoder.layers.{}.mlp.fc1.{}": "blocks.{}.fc1.{}",
    "encoder.layers.{}.mlp.fc2.{}": "blocks.{}.fc2.{}",
    "post_layernorm.{}": "post_norm.{}",  # SigLIP's; vit_table drops it elsewhere
    "head.*": None,  # SigLIP's pooling
    # CLIP's and SigLIP's
    "embeddings.position_embedding.weight": "positions",
    "pre_layrnorm.{}": "pre_norm.{}",  # their spelling
    "encoder.layers.{}.self_attn.k_proj.bias": None,  # cancels in the softmax
    "encoder.layers.{}.self_attn.q_proj.{}": "blocks.{}.q.{}",
    "encoder.layers.{}.self_attn.k_proj.{}": "blocks.{}.k.{}",
    "encoder.layers.{}.self_attn.v_proj.{}": "blocks.{}.v.{}",
    "encoder.layers.{}.self_attn.out_proj.{}": "blocks.{}.proj.{}",
    # BLIP-2's
    "embeddings.position_embedding": "positions",
    "encoder.layers.{}.self_attn.qkv.weight": QKV,
    "encoder.layers.{}.self_attn.qkv.bias": ("blocks.{}.q.bias", None, "blocks.{}.v.bias"),
    "encoder.layers.{}.self_attn.projection.{}": "blocks.{}.proj.{}",
}
CLIP_TEXT = {
    "text_*": None,
    "visual_projection.weight": None,
    "logit_*": None,
}
BLIP2_REST = {
    "qformer.*": None,
    "query_tokens": None,
    "language_model.*": None,
    "language_projection.*": None,
}
# under the names of several versions, or a whole CLIP, SigLIP or BLIP-2, of which the rest is dropped
TRANSFORMERS = prefixed(ALONE, "vision_model.") | ALONE | CLIP_TEXT | BLIP2_REST

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
CLIP = CLIP_L | dict(image_size=224, patch=32, width=768, layers=12, heads=12, mlp=3072)
SIGLIP_224 = SIGLIP_BASE | dict(image_size=224)
TOWERS = {  # model_type: what its config.json may leave out, how many blocks at its end do not run
    "clip": (CLIP, 1),  # LLaVA reads hidden state -2
    "clip_vision_model": (CLIP, 1),
    "siglip": (SIGLIP_224, 0),
    "siglip_vision_model": (SIGLIP_224, 0),
    "blip_2_vision_model": (dict(image_size=224), 0),
    "blip-2": (dict(image_size=224), 0),
}


def vit_table(names, config):
    """What is behind the blocks that run is dropped: CLIP's last, and block 39 of eva_vit_g.pth; a norm."""
    dropped = {f"*.{config.layers}.*": None}
    if not config.post_norm:
        dropped["*post_layernorm.*"] = None
    return dropped | names


def vit_config(d, path):
    kind = d.get("model_type")
    if kind not in TOWERS:
        raise BadInput(
            f"{path}: model_type {kind!r} is no vision tower known here; take CLIP, EVA or SigLIP of "
            "a fixed size"
        )
    defaults, unused = TOWERS[kind]
    values = defaults | renamed(d.get("vision_config", d), FIELDS)
    values["layers"] -= unused
    return ViTConfig(**values)


def load_vit(path, image_size=None, dtype=torch.float32):
    """eva_vit_g.pth, or a folder of one of TOWERS."""
    if Path(path).is_dir():
        config = read_config(path, vit_config)
        names = TRANSFORMERS
    else:
        config = ViTConfig(224)
        names = EVA
    vit = fill(on_meta(ViT, config), path, vit_table(names, config), dtype)
    if image_size:
        vit.resize(image_size)
    return vit
