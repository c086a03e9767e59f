"""Names of one family and ours."""

import torch

from model import InfMLLM
from weights.eva import eva
from weights.files import weight_files
from weights.llama import llama
from weights.rename import fill, on_meta, prefixed


def infmllm(c):
    ends = [(f"ln_vision.{leaf}", f"adapter.norm.{leaf}") for leaf in ("weight", "bias")]
    ends += [
        (f"pooler.mlp.{2 * i - 2}.{leaf}", f"adapter.fc{i}.{leaf}")
        for i in (1, 2)
        for leaf in ("weight", "bias")
    ]
    return (
        prefixed(eva(c.vit), "visual_encoder.", "vit.")
        | prefixed(llama(c.llm), "lm_model.", "llm.")
        | dict(ends)
    )


def load_infmllm(path, config, dtype=torch.float32):
    """The released InfMLLM state dict, whose folder has no config: take PRESETS["infmllm-7b"]()."""
    return fill(on_meta(InfMLLM, config), weight_files(path), infmllm(config), path, dtype)
