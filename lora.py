"""LoRA (arXiv 2106.09685): a frozen LLM that learns through thin matrices beside its own.

Beside a matrix W (out, in) stand A (r, in), random, and B (out, r), at first zero: y = W x + B A x. Nothing
scales B A (alpha is r, as others write it): the learning rate does. The adapter trains as well.

    model = grow(base, 16, ["q", "v"])       # fresh matrices, which leave the base's function as it is
    model = compose(base, branch)            # an InfMLLM like any other; the base's layers are its own now
    weights.save(path, merged(model))        # the same function as a plain model: W + B A
"""

import torch
from torch import nn

from model import InfMLLM, LlamaConfig, LlamaLayer

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer


class LowRank(nn.Module):
    """B A x: A begins as any nn.Linear does, B with zeros."""

    def __init__(self, beside: nn.Linear, rank):
        super().__init__()
        self.down = nn.Linear(beside.in_features, rank, bias=False)  # A
        self.up = nn.Linear(rank, beside.out_features, bias=False)  # B
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.up(self.down(x))


class Branch(nn.Module):
    """What is trained and saved: matrices beside those named `on` of every layer, and the adapter."""

    name = tune = "lora"

    def __init__(self, c: LlamaConfig, rank, on, adapter):
        super().__init__()
        self.described = {"rank": rank, "on": on}
        with torch.device("meta"):
            beside = LlamaLayer(c)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: LowRank(getattr(beside, name), rank) for name in on})
            for _ in range(c.layers)
        )
        self.adapter = adapter

    def __str__(self):
        return f"LoRA of rank {self.described['rank']} on {', '.join(self.described['on'])}"


class Beside(nn.Linear):
    """The base's weight and bias, under their own names, and a LowRank beside them."""

    def __init__(self, linear: nn.Linear, low: LowRank):
        assert type(linear) is not Beside, "this base has low-rank matrices already"
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.low = low

    def forward(self, x):
        return super().forward(x) + self.low(x)


class LoraInfMLLM(InfMLLM):
    def __init__(self, base: InfMLLM, branch: Branch):
        nn.Module.__init__(self)  # nothing is allocated: every module is the base's or the branch's
        self.config = base.config
        self.vit = base.vit
        self.adapter = branch.adapter
        self.llm = base.llm
        self.__dict__["branch"] = branch  # no child: its modules are the adapter's and the layers'
        for layer, beside in zip(self.llm.layers, branch.layers):
            for name, low in beside.items():
                setattr(layer, name, Beside(getattr(layer, name), low))

    def trained_modules(self, stage, tune):
        """The branch, whatever the stage; the ViT is the base's, which stays as it is."""
        return [self.branch]


compose = LoraInfMLLM


def grow(base, rank, on):
    """The base with fresh matrices; A follows torch's seed."""
    with base.llm.norm.weight.device:  # --plan has everything on meta
        branch = Branch(base.llm.config, rank, on, base.adapter)
    return compose(base, branch)


@torch.no_grad()
def merged(model):
    """The same function without a branch, as weights.save takes it: (InfMLLM on meta, {name: tensor})."""
    with torch.device("meta"):
        plain = InfMLLM(model.config)
    tensors = {name: model.get_parameter(name) for name, _ in plain.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Beside):
            w, low = module.weight, module.low
            both = w + low.up.weight @ low.down.weight
            tensors[f"{name}.weight"] = both.to(w.dtype)
    return plain, tensors
