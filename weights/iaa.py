"""Names of one family and ours."""

import sys
from pathlib import Path

import torch

from model import BRANCHES, CLIP_L, Config, InfMLLM, ViTConfig
from support.errors import BadInput
from support.files import read_json
from weights.clip import clip
from weights.files import weight_files
from weights.llama import LLAMA, llama, llama_config
from weights.rename import fill, on_meta, prefixed

IAA = {
    "mm": "",
    "grounding": "_grounding",
}  # our branches, and how their names end in the released file ...

IAA_INNER = [
    0,
    1,
    5,
    6,
    10,
    11,
    15,
    16,
    20,
    21,
    25,
    26,
    30,
    31,
]  # ... whose layers run after these of 32

LLAMA_3 = "the released IAA is prompted with LLaMA-3's tokenizer, which this program does not read"


def iaa(c):
    """The released IAA: LLaMA-3's names, LLaVA's for its tower, and two branches."""
    table = prefixed(llama(c.llm), "", "llm.") | prefixed(
        clip(c.vit), "model.vision_tower.vision_tower.vision_model.", "vit."
    )
    layer = {
        k.removeprefix("model.layers.{}."): v and v.removeprefix("layers.{}.")
        for k, v in LLAMA.items()
        if k.startswith("model.layers.")
    }
    for name, end in IAA.items():
        ours = f"{BRANCHES}{name}."
        table |= prefixed(layer, f"model.condition_layers{end}.{{}}.", ours + "layers.{}.")
        table |= {
            f"model.embed_tokens_condition{end}.weight": ours + "embed.weight",
            f"model.norm_condition{end}.weight": ours + "norm.weight",
        }
        for head in ("condtion", "condition"):  # the first is how the released code spells it
            table[f"lm_head_{head}{end}.weight"] = ours + "lm_head.weight"
        # the text path has no projector: ours of the base is that of mm, one module under two names
        ours, theirs = (
            ("adapter.", "mm_projector") if name == "mm" else (ours + "adapter.", "mm_projector_G")
        )
        table |= {
            f"model.{theirs}.{2 * i - 2}.{leaf}": f"{ours}fc{i}.{leaf}"
            for i in (1, 2)
            for leaf in ("weight", "bias")
        }
    return table


def iaa_model(d, path):
    """The released IAA without its weights; the places that it adds layers to are not in its config.json."""
    llm = llama_config(d | {"model_type": "llama"}, path)
    if llm.layers <= IAA_INNER[-1]:
        raise BadInput(
            f"{path}: has {llm.layers} layers, and IAA's own follow {IAA_INNER}; take the released folder"
        )
    llm.branches = {name: list(IAA_INNER) for name in IAA}
    model = on_meta(
        InfMLLM,
        Config(ViTConfig(**CLIP_L), llm, adapter="mlp", ln_vision=False, image_mark="<ImageHere>"),
    )
    model.adapter = model.llm.branches["mm"].adapter
    return model


def load_iaa(path, dtype=torch.float32):
    """The released IAA folder: its base, and its branches mm and grounding, none of them active."""
    model = iaa_model(read_json(Path(path) / "config.json"), path)
    print(f"{path}: {LLAMA_3}", file=sys.stderr)
    return fill(model, weight_files(path), iaa(model.config), path, dtype)
