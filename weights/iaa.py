"""IAA as it was released: LLaMA-3, LLaVA's tower and two branches (iaa.py)."""

import torch
from torch import nn

from iaa import compose
from model import CLIP_L, Config, InfMLLM, ViTConfig
from weights.checkpoint import new_branch
from weights.configs import read_config, understood
from weights.llama import LLAMA, llama_config, llama_table
from weights.rename import fill, on_meta, prefixed
from weights.towers import TRANSFORMERS, vit_table

# the layers of the base that a layer of a branch follows
IAA_INNER = [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]
ENDINGS = {"mm": ("", ""), "grounding": ("_grounding", "_G")}  # of names in the released file


def iaa_table(c):
    vit = vit_table(TRANSFORMERS, c.vit)
    table = prefixed(vit, "model.vision_tower.vision_tower.", "base.vit.")
    table |= prefixed(llama_table(c.llm), "", "base.llm.")
    layers = {theirs: ours for theirs, ours in LLAMA.items() if ".layers." in theirs}
    for name, (end, projector) in ENDINGS.items():
        inner = f".condition_layers{end}."
        branch = {key.replace(".layers.", inner): ours for key, ours in layers.items()}
        branch |= {
            f"model.embed_tokens_condition{end}.weight": "embed.weight",
            f"model.norm_condition{end}.weight": "norm.weight",
            f"lm_head_condtion{end}.weight": "lm_head.weight",  # as the released code spells it
            f"lm_head_condition{end}.weight": "lm_head.weight",
            f"model.mm_projector{projector}.0.{{}}": "adapter.fc1.{}",
            f"model.mm_projector{projector}.2.{{}}": "adapter.fc2.{}",
        }
        table |= prefixed(branch, "", f"{name}.")
    return table


def iaa_config(d, path):
    """Its config.json tells of the language model alone."""
    vit = ViTConfig(**CLIP_L)
    llm = llama_config(d | {"model_type": "llama"}, path)
    return Config(
        vit, llm, adapter="mlp", ln_vision=False, image_mark="<ImageHere>", template="iaa"
    )


def iaa_modules(config):
    modules = nn.ModuleDict({"base": InfMLLM(config)})
    modules["base"].adapter = None  # the released text path has no projector
    for name in ENDINGS:
        modules[name] = new_branch(config, {"name": name, "after": IAA_INNER})
    return modules


def load_iaa(path, dtype=torch.float32):
    """{"mm": model, "grounding": model}, sharing one base."""
    config = read_config(path, iaa_config)
    with understood(path):
        modules = on_meta(iaa_modules, config)
    fill(modules, path, iaa_table(config), dtype)
    base = modules["base"]
    base.adapter = modules["mm"].adapter  # so that it is a model like any other, and can be saved
    return {name: compose(base, modules[name]) for name in ENDINGS}
