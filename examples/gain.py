"""Gains, much as in (IA)3 (arXiv 2205.05638): what q and v of the LLM give is multiplied by numbers that train,
one for each output; the matrices stay as they are.

python -m examples.gain train --stage 2
python -m examples.gain train --stage 2 --resume
python -m examples.gain sample --image PICTURE
python -m examples.gain evaluate
"""

import torch
from torch import nn

import train
from model import InfMLLM
from weights import checkpoint, load_tensors


class Gain(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.base.frozen = True  # the gains train where the base would
        # one each: it begins as the model that it is added to
        self.gains = nn.Parameter(torch.ones_like(base.weight[:, 0]))

    def forward(self, x):
        return self.base(x) * self.gains.to(x.dtype)


def swap(model):
    for layer in model.llm.layers:
        layer.q = Gain(layer.q)
        layer.v = Gain(layer.v)


def fill(model, path, *how):
    """Weights into a model: those of this fork's checkpoints have a place only after the swap."""
    if not isinstance(model, InfMLLM):
        return plain_fill(model, path, *how)
    swapped = "llm.layers.0.q.gains" in load_tensors(path)
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
