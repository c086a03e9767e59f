"""Files of tensors: safetensors and torch's own."""

import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.errors import BadInput

WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys that others save a state dict under
NAMES = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")


class TensorFile:
    """The tensors of a file: `like` on the meta device, read(name) one at a time.

    torch's mapped file is opened anew for each: the pages that were read count as our memory until it is closed.
    """

    def __init__(self, path):
        tensors = load_tensors(path)
        self.like = {name: tensor.to("meta") for name, tensor in tensors.items()}
        if path.suffix == ".safetensors":
            self.read = safe_open(path, "pt", backend="pread").get_tensor
        elif is_mapped(path):
            self.read = lambda name: load_tensors(path)[name]
        else:
            self.read = tensors.get


def is_mapped(path):
    """Whether loading reads nothing yet; torch's older files, which are no zip, are read whole."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def load_tensors(path):
    """{name: tensor} of a file. weights_only=True builds tensors and refuses anything that would run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        refuse_compressed(path)
        state = torch.load(path, "cpu", weights_only=True, mmap=is_mapped(path))
        for wrapper in WRAPPERS:
            state = state.get(wrapper, state)
        return {name.removeprefix("module."): plain(tensor) for name, tensor in state.items()}
    except BadInput:
        raise
    except Exception as e:  # whatever the libraries stumble over in a broken file
        why = f"{type(e).__name__}: {str(e)[:160]}"
        if "nsupported" in str(e) or "weights_only" in str(e).lower():
            why = "it holds more than tensors and was refused, as reading it could run code"
        raise BadInput(
            f"{path}: cannot be read as weights ({why}); "
            "take a plain state dict, names with their tensors, or copy it again"
        ) from None


def refuse_compressed(path):
    """torch stores plainly: a zip that does not may unpack into any memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type for entry in file.infolist()):
                raise BadInput(f"{path}: is compressed, as torch writes none; take another")


def plain(tensor):
    """A tensor of numbers that lie there: not sparse, quantized, nested, or on the meta device."""
    tensor = tensor.detach()
    strange = tensor.is_quantized or tensor.is_nested or tensor.is_meta
    if strange or tensor.layout != torch.strided:
        raise ValueError(f"a tensor that is {tensor.layout}, quantized, nested or without numbers")
    return tensor


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
