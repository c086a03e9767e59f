"""Convolutions before and after the pooling: Honeybee's C-Abstractor (arXiv 2312.06742), in small.

    python train.py --stage 1 --adapter examples/abstractor.py:Abstractor
    python sample.py --adapter examples/abstractor.py:Abstractor --image PICTURE

Theirs has three RegNet blocks on either side; here one on either side, a bottleneck without groups and
without squeeze-and-excitation, and no positions are learned, as the ViT has its own. Names of dimensions:
N images, s patches per side, P windows per side, Dv the ViT's width, C = Dv / 4, D the LLM's width.
"""

import math

from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Matrix, 3 x 3 convolution, matrix, added to what came in."""

    def __init__(self, width):
        super().__init__()
        C = width // 4
        self.down = nn.Linear(width, C)
        self.norm1 = nn.LayerNorm(C)
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm2 = nn.LayerNorm(C)
        self.up = nn.Linear(C, width)

    def forward(self, x):  # (N, s, s, Dv)
        y = F.silu(self.norm1(self.down(x)))  # (N, s, s, C)
        y = self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.up(F.silu(self.norm2(y)))


class Abstractor(nn.Module):
    def __init__(self, width_vit, width_llm, grid, ln_vision=True):
        super().__init__()
        self.grid = grid  # P
        self.norm = nn.LayerNorm(width_vit) if ln_vision else nn.Identity()
        self.before = Block(width_vit)
        self.after = Block(width_vit)
        self.fc1 = nn.Linear(width_vit, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x):  # (N, s*s, Dv)
        N, patches, Dv = x.shape
        s = math.isqrt(patches)
        x = self.before(self.norm(x).view(N, s, s, Dv))
        x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.grid)  # (N, Dv, P, P)
        x = self.after(x.permute(0, 2, 3, 1)).flatten(1, 2)  # (N, P*P, Dv)
        return self.fc2(F.gelu(self.fc1(x)))  # (N, P*P, D)
