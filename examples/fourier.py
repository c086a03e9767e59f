"""The low frequencies of the grid of patches, as in Fourier-VLM (arXiv 2508.06038).

    python train.py --stage 1 --adapter examples/fourier.py:Fourier
    python sample.py --adapter examples/fourier.py:Fourier --image PICTURE

A two-dimensional cosine transform of the patches keeps its P x P lowest frequencies, and the inverse
transform makes a picture of P x P tokens of them: a token is a place again and no frequency. For a row of
patches both are one matrix. Names of dimensions: N images, s patches per side, P tokens per side, Dv the
ViT's width, D the LLM's.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def low_pass(s, P, device):
    """(P, s): DCT-II of s places, its P lowest frequencies, inverse DCT at P places. Rows sum to 1."""
    frequency = torch.arange(P, device=device) * math.pi  # (P,), of waves along a side
    here = (torch.arange(s, device=device) + 0.5) / s  # (s,)
    there = (torch.arange(P, device=device) + 0.5) / P  # (P,)
    weight = torch.where(frequency == 0, 1, 2) / s  # (P,)
    return torch.cos(there[:, None] * frequency) * weight @ torch.cos(frequency[:, None] * here)


class Fourier(nn.Module):
    def __init__(self, width_vit, width_llm, grid, ln_vision=True):
        super().__init__()
        self.grid = grid  # P
        self.norm = nn.LayerNorm(width_vit) if ln_vision else nn.Identity()
        self.fc1 = nn.Linear(width_vit, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x):  # (N, s*s, Dv)
        N, patches, Dv = x.shape
        s, P = math.isqrt(patches), self.grid
        x = self.norm(x)
        # made here, as a buffer that no checkpoint keeps would stay empty where one is loaded
        low = low_pass(s, P, x.device).to(x.dtype)  # (P, s)
        x = low @ x.reshape(N, s, s * Dv)  # (N, P, s*Dv)
        x = low @ x.view(N, P, s, Dv)  # (N, P, P, Dv)
        return self.fc2(F.gelu(self.fc1(x.view(N, P * P, Dv))))  # (N, P*P, D)
