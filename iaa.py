"""Inner adaptors (IAA, arXiv 2408.12902): a frozen LLM that learns to see through layers of its own.

A branch brings whole decoder layers, each running after a chosen layer of the base and replacing the
hidden state, h <- A_i(L_i(h)), between an embedding, a norm, a head and a visual adapter of its own.
There is no gate. What is asked without a picture is answered by the base alone, bit for bit.

    model = grow(base, "mm", [0, 1, 5])      # a fresh branch, which computes the base's function
    model = compose(base, branch)            # an InfMLLM like any other, sharing the base's modules
"""

import copy

import torch
from torch import nn

from model import InfMLLM, Llama, LlamaConfig, LlamaLayer, RMSNorm


class Branch(nn.Module):
    """What is trained and saved: the layers that run after the base's layers `after`, and the ends."""

    tune = "inner"

    def __init__(self, c: LlamaConfig, name, after, adapter):
        super().__init__()
        assert name.isidentifier(), f"a branch's name is a word such as mm, not {name!r}"
        each_once = list(after) == sorted(set(after))
        assert after and each_once and 0 <= after[0] and after[-1] < c.layers, (
            f"branch {name}: {after} are not layers from 0 to {c.layers - 1}, each once and in order"
        )
        self.name = name
        self.after = list(after)
        self.described = {"name": name, "after": self.after}
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.vocab, c.width), freeze=False)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in after)
        self.norm = RMSNorm(c.width, c.eps)
        self.lm_head = None if c.tied else nn.Linear(c.width, c.vocab, bias=False)
        self.adapter = adapter

    def __str__(self):
        return f"the branch {self.name} after {self.after}"


class BranchedLlama(Llama):
    """The base's layers and the branch's, in the order in which they run, between the branch's ends."""

    def __init__(self, base: Llama, branch: Branch):
        nn.Module.__init__(self)  # nothing is allocated: every module is the base's or the branch's
        self.config = base.config
        self.recompute = False
        self.embed = branch.embed
        inner = dict(zip(branch.after, branch.layers))
        self.layers = nn.ModuleList()
        for i, layer in enumerate(base.layers):
            self.layers.append(layer)
            if i in inner:
                self.layers.append(inner[i])
        self.norm = branch.norm
        self.lm_head = branch.lm_head


class BranchedInfMLLM(InfMLLM):
    def __init__(self, base: InfMLLM, branch: Branch):
        nn.Module.__init__(self)
        self.config = base.config
        self.vit = base.vit
        self.adapter = branch.adapter
        self.llm = BranchedLlama(base.llm, branch)
        self.base = base  # the same modules again, and the base's own ends
        self.branch = branch

    @property
    def text_model(self):
        return self.base

    def trained_modules(self, stage, tune):
        """The branch, whatever the stage, and nothing of the base."""
        return [self.branch]

    def resize(self, image_size, grid=None):
        super().resize(image_size, grid)
        self.base.config = self.config
        self.base.adapter.grid = self.config.grid
        return self


def compose(base, branch):
    """The base seeing through the branch. Several branches may share a base: a model for each."""
    return BranchedInfMLLM(base, branch)


@torch.no_grad()
def grow(base, name, after):
    """A fresh branch that computes the base's function, composed with the base.

    Everything is a copy of the base's; with o and down at zero an inner layer, a copy of the one that
    it follows, adds nothing to the hidden state yet."""
    with torch.device("meta"):
        branch = Branch(base.llm.config, name, after, None)
    branch.embed = copy.deepcopy(base.llm.embed)
    branch.layers = copy.deepcopy(nn.ModuleList(base.llm.layers[i] for i in after))
    for layer in branch.layers:
        for p in (*layer.o.parameters(), *layer.down.parameters()):
            p.zero_()
    branch.norm = copy.deepcopy(base.llm.norm)
    branch.lm_head = copy.deepcopy(base.llm.lm_head)
    branch.adapter = copy.deepcopy(base.adapter)
    return compose(base, branch)
