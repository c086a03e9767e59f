"""Files of tensors."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.errors import BadInput
from support.files import read_json

NUMBERS = ("F16", "BF16", "F32", "F64")


class Safetensors:
    def __init__(self, path):
        self.path = path
        try:
            with safe_open(path, "pt") as f:
                parts = {k: f.get_slice(k) for k in f.keys()}
                self.shapes = {k: part.get_shape() for k, part in parts.items()}
                odd = [
                    f"{k} of {part.get_dtype()}"
                    for k, part in parts.items()
                    if part.get_dtype() not in NUMBERS
                ]
        except (SafetensorError, OSError, ValueError) as e:
            raise BadInput(unreadable(path, e)) from None
        if odd:
            raise BadInput(unreadable(path, f"{odd[0]}, where {', '.join(NUMBERS)} are known"))

    def read(
        self, key
    ):  # opened for each tensor: pages of a mapped file count as ours until it is closed
        with safe_open(self.path, "pt") as f:
            return f.get_tensor(key)


class Pickled:
    """.bin, .pth, .pt through weights_only=True, which builds tensors and refuses anything that would run.

    A file of the newer zip kind is mapped, anew for each tensor (as above); an older one has to be read whole.
    """

    def __init__(self, path):
        self.path, self.state = path, None
        try:
            shapes = self.open()
        except RuntimeError:
            shapes = self.state = self.open(mmap=False)
        self.shapes = {k: tuple(t.shape) for k, t in shapes.items()}

    def open(self, mmap=True):
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu", mmap=mmap)
        except (
            Exception
        ) as e:  # torch.load raises whatever its reading of a broken file stumbles over
            if "nsupported" in str(e) or "weights_only" in str(e).lower():
                raise BadInput(
                    f"{self.path}: holds more than tensors and was refused, as reading it could run code; "
                    "have its author save a plain state dict"
                ) from None
            if mmap and isinstance(e, RuntimeError) and "mmap" in str(e):
                raise
            raise BadInput(unreadable(self.path, e)) from None
        for wrap in ("model_state_dict", "state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrap), dict):
                state = state[wrap]
        if not isinstance(state, dict) or not all(
            isinstance(t, torch.Tensor) for t in state.values()
        ):
            raise BadInput(
                f"{self.path}: is not a state dict (names with their tensors); save one with torch.save"
            )
        return {str(k).removeprefix("module."): t for k, t in state.items()}

    def read(self, key):
        return (self.state or self.open())[key]


def unreadable(path, e):
    why = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
    return f"{path}: cannot be read as weights ({why}); download or copy it again"


def weight_files(path):
    """All files of tensors of a folder (sharded with an index, or single) or the one file that was named."""
    path = Path(path)
    if path.is_file():
        return [Safetensors(path) if path.suffix == ".safetensors" else Pickled(path)]
    for stem, suffix, kind in (
        ("model", "safetensors", Safetensors),
        ("pytorch_model", "bin", Pickled),
    ):
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise BadInput(f"{index}: has no weight_map; download it again")
            for name in set(listed.values()):
                if (
                    not isinstance(name, str)
                    or Path(name).name != name
                    or not os.path.isfile(path / name)
                ):
                    raise BadInput(
                        f"{index}: names the shard {str(name)[:80]!r}, which is not in the folder; "
                        "download it again"
                    )
            return [kind(path / name) for name in sorted(set(listed.values()))]
        if single.is_file():
            return [kind(single)]
    raise BadInput(
        f"{path}: no model.safetensors, no pytorch_model.bin and no index of shards; "
        "name the folder that holds the weights"
    )


def save_tensors(tensors, path):
    path.touch()
    rights = (
        path.stat().st_mode
    )  # those of any new file here; the library's own file would be ours alone
    save_file(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    path.chmod(rights)


def load_tensors(path):
    file = Safetensors(path)
    return {key: file.read(key) for key in file.shapes}
