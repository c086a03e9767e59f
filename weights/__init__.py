# ruff: noqa: F401
"""Weights in and out: our own checkpoint directory, and the files that others publish.

    save(dir, model, tokenizer, ...)     config.json, model.safetensors, the tokenizer, and what resuming needs
    load(dir) -> InfMLLM                 no flags: the architecture travels with the weights
    load_llama, load_vit, load_llava, load_infmllm, load_iaa, export_llama

The checkpoint of a branch (iaa.py, lora.py) holds the branch's tensors alone and names its base: load() brings
both, and add_branch(model, dir) composes the base of a model with another branch.

Each family has a table of names (see rename.py), a reader of its config.json and a loader.
No file is unpickled but by torch.load(weights_only=True), which builds tensors and nothing else.
"""

from weights.checkpoint import (
    add_branch,
    base_of,
    describe,
    find,
    kind_of,
    load,
    load_checked,
    read_checked,
    save,
)
from weights.files import load_tensors
from weights.iaa import IAA_INNER, load_iaa
from weights.infmllm import load_infmllm
from weights.llama import export_llama, load_llama
from weights.llava import load_llava
from weights.towers import load_vit
