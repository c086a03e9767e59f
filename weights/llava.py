"""LLaVA-1.5: with nothing pooled and no ln_vision, its projector is the pool-adapter."""

import torch

from model import Config, InfMLLM
from support.errors import BadInput
from weights.configs import insist, read_config
from weights.llama import llama_config, llama_table
from weights.rename import fill, on_meta, prefixed
from weights.towers import TRANSFORMERS, vit_config, vit_table

ONLY = {
    "model_type": "llava",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}
PROJECTOR = {
    "multi_modal_projector.linear_1.{}": "adapter.fc1.{}",
    "multi_modal_projector.linear_2.{}": "adapter.fc2.{}",
}


def llava_table(c):
    llm = prefixed(llama_table(c.llm), "language_model.", "llm.")
    vit = prefixed(vit_table(TRANSFORMERS, c.vit), "vision_tower.", "vit.")
    return vit | llm | PROJECTOR


def llava_config(d, path):
    if "mm_vision_tower" in d:
        raise BadInput(
            f"{path}: is LLaVA in its authors' own layout, without its vision tower; take the folder that "
            "transformers reads, such as llava-hf/llava-1.5-7b-hf"
        )
    insist(d, ONLY, path, "LLaVA-1.5")
    vision = d.get("vision_config", {})
    insist(vision, {"model_type": "clip_vision_model"}, path, "LLaVA-1.5's vision tower")
    vit = vit_config(vision, path)
    llm = llama_config(d.get("text_config", {}), path)
    return Config(vit, llm, adapter="mlp", ln_vision=False, image_mark="<ImageHere>")


def load_llava(path, dtype=torch.float32):
    config = read_config(path, llava_config)
    return fill(on_meta(InfMLLM, config), path, llava_table(config), dtype)
