"""Pixel shuffle in the place of pooling, as in InternVL and SmolVLM: no patch is averaged away.

    python train.py --stage 1 --adapter examples/shuffle.py:Shuffle
    python sample.py --adapter examples/shuffle.py:Shuffle --image PICTURE

The R x R patches of a window are laid side by side, R*R times as wide, and a matrix makes one visual token
of them. Names of dimensions: N images, s patches per side, P = s / R windows per side, Dv the ViT's width.
"""

import torch
from torch import nn
from torch.nn import functional as F

R = 2  # patches per side of a window


class Shuffle(nn.Module):
    def __init__(self, width_vit, width_llm, grid, ln_vision=True):
        super().__init__()
        self.grid = grid  # P
        self.norm = nn.LayerNorm(R * R * width_vit) if ln_vision else nn.Identity()
        self.fc1 = nn.Linear(R * R * width_vit, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x: torch.Tensor):  # (N, s*s, Dv)
        N, patches, Dv = x.shape
        P = self.grid
        assert patches == (P * R) ** 2, f"--grid {P} needs {P * R} patches per side"
        x = x.reshape(N, P, R, P, R, Dv).transpose(2, 3)  # (N, P, P, R, R, Dv)
        x = x.reshape(N, P * P, R * R * Dv)
        return self.fc2(F.gelu(self.fc1(self.norm(x))))  # (N, P*P, D)
