"""LLaVA-1.5: with nothing pooled and no ln_vision, its projector is the pool-adapter."""

import torch

from model import Config, InfMLLM
from support.errors import BadInput
from weights.clip import clip_config, tower_table
from weights.configs import read_config, unlike
from weights.llama import llama_config, llama_table
from weights.rename import fill, on_meta, prefixed

ONLY = {
    "model_type": "llava",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}


def llava_table(c):
    tower = tower_table(c.vit)
    return (
        prefixed(llama_table(c.llm), "language_model.", "llm.")
        | {"multi_modal_projector.linear_1.{}": "adapter.fc1.{}"}
        | {"multi_modal_projector.linear_2.{}": "adapter.fc2.{}"}
        | prefixed(tower, "vision_tower.vision_model.", "vit.")  # the published files
        | prefixed(tower, "vision_tower.", "vit.")  # transformers 5
    )


def llava_config(d, what):
    refused = unlike(d, ONLY)
    if refused:
        raise BadInput(f"{what}: {', '.join(refused)} is not LLaVA-1.5; take a LLaVA-1.5 folder")
    vit = clip_config(d.get("vision_config", {}), what)
    llm = llama_config(d.get("text_config", {}), what)
    return Config(vit, llm, adapter="mlp", ln_vision=False, image_mark="<ImageHere>")


def load_llava(path, dtype=torch.float32):
    config = read_config(path, llava_config)
    return fill(on_meta(InfMLLM, config), path, llava_table(config), dtype)
