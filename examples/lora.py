"""LoRA: q and v of the LLM stay as they are, and beside each of them two thin matrices train.

python -m examples.lora train --stage 2
python -m examples.lora train --stage 2 --resume
python -m examples.lora sample --image PICTURE
python -m examples.lora evaluate
"""

from torch import nn

import train
from model import InfMLLM
from weights import checkpoint, load_tensors


class LowRank(nn.Module):
    def __init__(self, base, rank=8):
        super().__init__()
        self.base = base
        self.base.frozen = True  # down and up train where the base would
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, **like)
        self.up = nn.Linear(rank, base.out_features, **like)
        nn.init.zeros_(self.up.weight)  # it begins as the model that it is added to

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def swap(model):
    for layer in model.llm.layers:
        layer.q = LowRank(layer.q)
        layer.v = LowRank(layer.v)


def fill(model, path, *how):
    """Weights into a model: those of this fork's checkpoints have a place only after the swap."""
    if not isinstance(model, InfMLLM):
        return plain_fill(model, path, *how)
    swapped = "llm.layers.0.q.up.weight" in load_tensors(path)
    if swapped:
        swap(model)
    plain_fill(model, path, *how)
    if not swapped:
        swap(model)
    return model


plain_fill = checkpoint.fill

if __name__ == "__main__":
    checkpoint.fill = fill
    train.fork()
