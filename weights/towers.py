"""A vision tower, whatever it is."""

from dataclasses import replace
from pathlib import Path

import torch

from model import EVA_G, ViT, ViTConfig
from support.errors import BadInput
from support.files import read_json
from weights.clip import clip_config, clip_table
from weights.configs import read_config
from weights.eva import blip2_config, blip2_table, eva_table
from weights.rename import fill, on_meta

TOWERS = {  # model_type in config.json
    "clip": (clip_config, clip_table),
    "clip_vision_model": (clip_config, clip_table),
    "blip_2_vision_model": (blip2_config, blip2_table),
}


def load_vit(path, image_size=None, dtype=torch.float32, config=None):
    """eva_vit_g.pth, or a folder of one of TOWERS; config: of another EVA."""
    if Path(path).is_dir():
        kind = str(read_json(Path(path) / "config.json").get("model_type"))
        if kind not in TOWERS:
            raise BadInput(
                f"{path}: model_type {kind!r} is no vision tower known here; take CLIP, EVA or BLIP-2's"
            )
        make_config, make_table = TOWERS[kind]
        config = read_config(path, make_config)
    else:
        make_table = eva_table
        config = config or ViTConfig(224, **EVA_G)
    if image_size:
        config = replace(config, image_size=image_size)
    return fill(on_meta(ViT, config), path, make_table(config), dtype)
