"""Files of tensors: safetensors and torch's own."""

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.errors import BadInput

WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys that others save a state dict under
NAMES = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")


class TensorFile:
    """The tensors of a file, one at a time.

    A mapped file is opened anew for each: the pages that were read count as our memory until it is closed.
    """

    def __init__(self, path):
        self.path = path
        self.kept = load_tensors(path)
        self.like = {name: tensor.to("meta") for name, tensor in self.kept.items()}
        if is_mapped(path):
            self.kept = None

    def read(self, name):
        tensors = self.kept or load_tensors(self.path)
        return tensors[name]


def is_mapped(path):
    """Whether loading reads nothing yet; torch's older files, which are no zip, are read whole."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def load_tensors(path):
    """{name: tensor} of a file. weights_only=True builds tensors and refuses anything that would run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, "cpu", weights_only=True, mmap=is_mapped(path))
        for wrapper in WRAPPERS:
            state = state.get(wrapper, state)
        return {name.removeprefix("module."): tensor.detach() for name, tensor in state.items()}
    except Exception as e:  # whatever the libraries stumble over in a broken file
        why = f"{type(e).__name__}: {str(e)[:160]}"
        if "nsupported" in str(e) or "weights_only" in str(e).lower():
            why = "it holds more than tensors and was refused, as reading it could run code"
        raise BadInput(
            f"{path}: cannot be read as weights ({why}); "
            "take a plain state dict, names with their tensors, or copy it again"
        ) from None


def weight_files(path):
    """All files of tensors of a folder, sharded or single, or the one file that was named."""
    path = Path(path)
    if path.is_file():
        return [path]
    for name in NAMES:
        files = sorted(path.glob(name))
        if files:
            return files
    raise BadInput(f"{path}: no {', no '.join(NAMES)}; name the folder that holds the weights")


def save_tensors(tensors, path):
    # the library's own file would be readable by us alone: it gets the rights of any new file here
    path.touch()
    rights = path.stat().st_mode
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(rights)
