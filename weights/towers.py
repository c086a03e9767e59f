"""Names of one family and ours."""

from pathlib import Path

import torch

from model import EVA_G, ViT, ViTConfig
from support.errors import BadInput
from support.files import read_json
from weights.clip import CLIP_TEXT, clip, clip_config
from weights.eva import BLIP2, blip2_config, eva
from weights.files import weight_files
from weights.rename import fill, on_meta, prefixed


def load_vit(path, image_size=None, dtype=torch.float32, config=None):
    """eva_vit_g.pth, a CLIP folder (its text half is dropped) or a Blip2VisionModel folder; config: of another EVA."""
    path = Path(path)
    if path.is_dir():
        d = read_json(path / "config.json")
        kind = d.get("model_type")
        if kind == "blip_2_vision_model":
            config, make = blip2_config(d, path), lambda c: BLIP2
        elif kind in ("clip", "clip_vision_model"):
            config = clip_config(d.get("vision_config", d) if kind == "clip" else d, path)
            make = lambda c: prefixed(clip(c), "vision_model.") | clip(c) | CLIP_TEXT
        else:
            raise BadInput(
                f"{path}: model_type {kind!r} is no vision tower known here; take CLIP, EVA or BLIP-2's"
            )
    else:
        config, make = config or ViTConfig(224, **EVA_G), eva
    if image_size:
        config.image_size = image_size
    config.__post_init__()
    return fill(on_meta(ViT, config), weight_files(path), make(config), path, dtype)
