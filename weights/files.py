"""Files of tensors: safetensors and torch's own.

A file is opened anew for each tensor: pages of a mapped file count as our memory until it is closed.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.errors import BadInput
from support.files import read_json, reading

NUMBERS = ("F16", "BF16", "F32", "F64")
WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys that others save a state dict under


class Safetensors:
    def __init__(self, path):
        self.path = path
        self.shapes = {}
        try:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    tensor = f.get_slice(key)
                    self.shapes[key] = tensor.get_shape()
                    kind = tensor.get_dtype()
                    if kind not in NUMBERS:
                        raise ValueError(f"{key} of {kind}, where {', '.join(NUMBERS)} are known")
        except (SafetensorError, OSError, ValueError) as e:
            raise BadInput(unreadable(path, e)) from None

    def read(self, key):
        with safe_open(self.path, "pt") as f:
            return f.get_tensor(key)


class Pickled:
    """.bin, .pth, .pt through weights_only=True, which builds tensors and refuses anything that would run.

    The newer kind, a zip, is mapped; an older file has to be read whole.
    """

    def __init__(self, path):
        self.path = path
        with reading(path), open(path, "rb") as f:
            self.is_zip = f.read(2) == b"PK"
        self.state = self.load()
        self.shapes = {key: tensor.shape for key, tensor in self.state.items()}
        if self.is_zip:
            self.state = None

    def load(self):
        try:
            state = torch.load(self.path, "cpu", weights_only=True, mmap=self.is_zip)
        except Exception as e:  # whatever torch stumbles over in a broken file
            if "nsupported" in str(e) or "weights_only" in str(e).lower():
                raise BadInput(
                    f"{self.path}: holds more than tensors and was refused, as reading it could run code; "
                    "have its author save a plain state dict"
                ) from None
            raise BadInput(unreadable(self.path, e)) from None
        for wrapper in WRAPPERS:
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise BadInput(
                f"{self.path}: is not a state dict (names with their tensors); save one with torch.save"
            )
        return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}

    def read(self, key):
        state = self.load() if self.is_zip else self.state
        return state[key]


def unreadable(path, e):
    first = str(e).strip().partition("\n")[0][:160]
    return f"{path}: cannot be read as weights ({first or type(e).__name__}); download or copy it again"


def weight_files(path):
    """All files of tensors of a folder (sharded with an index, or single) or the one file that was named."""
    path = Path(path)
    if path.is_file():
        return [open_weights(path)]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            return [open_weights(path / shard) for shard in shards(index)]
        if (path / name).is_file():
            return [open_weights(path / name)]
    raise BadInput(
        f"{path}: no model.safetensors, no pytorch_model.bin and no index of shards; "
        "name the folder that holds the weights"
    )


def open_weights(path):
    return Safetensors(path) if path.suffix == ".safetensors" else Pickled(path)


def shards(index):
    """The names of the files beside it that an index lists."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise BadInput(f"{index}: has no weight_map; download it again")
    names = {str(name) for name in listed.values()}
    for name in names:
        if Path(name).name != name or not os.path.isfile(index.parent / name):
            raise BadInput(
                f"{index}: names the shard {name[:80]!r}, which is not in the folder; download it again"
            )
    return sorted(names)


def save_tensors(tensors, path):
    # the library's own file would be readable by us alone: it gets the rights of any new file here
    path.touch()
    rights = path.stat().st_mode
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(rights)


def load_tensors(path):
    file = Safetensors(path)
    return {key: file.read(key) for key in file.shapes}
