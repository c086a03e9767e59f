"""InfMLLM as it was released."""

import torch

from model import InfMLLM
from weights.llama import llama_table
from weights.rename import fill, on_meta, prefixed
from weights.towers import EVA, vit_table

ADAPTER = {
    "ln_vision.{}": "adapter.norm.{}",
    "pooler.mlp.0.{}": "adapter.fc1.{}",
    "pooler.mlp.2.{}": "adapter.fc2.{}",
}


def infmllm_table(c):
    vit = prefixed(vit_table(EVA, c.vit), "visual_encoder.", "vit.")
    llm = prefixed(llama_table(c.llm), "lm_model.", "llm.")
    return vit | llm | ADAPTER


def load_infmllm(path, config, dtype=torch.float32):
    """The released state dict, whose folder has no config: take PRESETS["infmllm-7b"]()."""
    return fill(on_meta(InfMLLM, config), path, infmllm_table(config), dtype)
