"""Weights in and out: our own checkpoint directory, and the files that others publish.

    save(dir, model, tokenizer, ...)     config.json, model.safetensors, tokenizer.model, and what resuming needs
    load(dir) -> InfMLLM                 no flags: the architecture travels with the weights
    load_llama, load_vit, load_llava, load_infmllm, load_iaa, export_llama

The checkpoint of a branch (IAA) holds the branch's tensors alone and names its base; load() brings both, and
add_branch(model, dir) puts further branches beside it.

A foreign file is read through a table: its names on the left, ours on the right. `{}` is a number, `*` any ending,
None means dropped on purpose, a tuple takes a matrix apart by rows, and `name[1/3]` is the second of three row blocks
of ours. A key that no line names, a tensor of ours that no key fills, or a shape that differs is an error.
No file is unpickled but by torch.load(weights_only=True), which builds tensors and nothing else.
"""

from weights.checkpoint import (
    add_branch,
    base_of,
    find,
    fingerprint,
    load,
    read_checked,
    save,
    verify,
)
from weights.files import load_tensors, save_tensors
from weights.iaa import IAA_INNER, LLAMA_3, load_iaa
from weights.infmllm import load_infmllm
from weights.llama import export_llama, load_llama
from weights.llava import load_llava
from weights.towers import load_vit

__all__ = [
    "save",
    "load",
    "find",
    "verify",
    "fingerprint",
    "read_checked",
    "base_of",
    "add_branch",
    "load_tensors",
    "save_tensors",
    "load_llama",
    "load_vit",
    "load_llava",
    "load_infmllm",
    "load_iaa",
    "export_llama",
    "IAA_INNER",
    "LLAMA_3",
]
