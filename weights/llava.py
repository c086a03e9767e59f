"""Names of one family and ours."""

from pathlib import Path

import torch

from model import Config, InfMLLM
from support.errors import BadInput
from support.files import read_json
from weights.clip import clip, clip_config
from weights.files import weight_files
from weights.llama import llama, llama_config
from weights.rename import fill, on_meta, prefixed


def llava(c):  # transformers 5 leaves `vision_model.` out where the published files have it
    projector = {
        f"multi_modal_projector.linear_{i}.{leaf}": f"adapter.fc{i}.{leaf}"
        for i in (1, 2)
        for leaf in ("weight", "bias")
    }
    vit = clip(c.vit)
    return (
        prefixed(llama(c.llm), "language_model.", "llm.")
        | projector
        | prefixed(vit, "vision_tower.vision_model.", "vit.")
        | prefixed(vit, "vision_tower.", "vit.")
    )


def load_llava(path, dtype=torch.float32):
    """A whole LLaVA-1.5 folder: with nothing pooled and no ln_vision, its projector is the pool-adapter."""
    d = read_json(Path(path) / "config.json")
    expected = {
        "model_type": "llava",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }
    for key, value in expected.items():
        if d.get(key, value) != value:
            raise BadInput(
                f"{path}: {key} is {d[key]!r} where LLaVA-1.5 has {value!r}; take a LLaVA-1.5 folder"
            )
    config = Config(
        clip_config(d.get("vision_config", {}), path),
        llama_config(d.get("text_config", {}), path),
        adapter="mlp",
        ln_vision=False,
        image_mark="<ImageHere>",
    )
    return fill(on_meta(InfMLLM, config), weight_files(path), llava(config), path, dtype)
