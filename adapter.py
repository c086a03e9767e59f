"""From the ViT's patches to the LLM's embeddings: the pool-adapter, and the adapters it is compared with.

Every adapter is built as Adapter(width_vit, width_llm, grid, ln_vision) and maps (N, s*s, Dv) to (N, Q, D):

    pool        LayerNorm, mean over windows s x s -> P x P, two-layer MLP       Q = P*P, order kept
    mlp         the same with P = s: nothing is pooled, LLaVA's projector        Q = s*s, order kept
    resampler   P*P learned queries cross-attend to the patches, as a Q-Former   Q = P*P, order learned

To add one, write its class and name it in ADAPTERS.

Names of dimensions: N images, s patches per side, P windows per side, Dv the ViT's width, D the LLM's,
H heads of width hd.
"""

import math
import os

import torch
from torch import nn
from torch.nn import functional as F


def pool_reference(x, weight, bias, grid, eps=1e-5):
    """LayerNorm (none if weight is None) and window means: (N, s*s, Dv) -> (N, P*P, Dv).

    Computed in fp32, returned in x's dtype. The mean of normalised patches is affine in them, so weight
    and bias are applied to the P*P means and not to the s*s patches: the same function, less work.
    """
    N, patches, Dv = x.shape
    s, P = side(patches), grid
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if weight is not None:
        y = F.layer_norm(y, (Dv,), eps=eps)
    y = y.reshape(N, s, s, Dv)
    if s % P == 0:
        y = y.view(N, P, s // P, P, s // P, Dv).mean(2).mean(3)  # (N, P, P, Dv)
    else:  # windows overlap as in adaptive average pooling
        y = F.adaptive_avg_pool2d(y.permute(0, 3, 1, 2), P).permute(0, 2, 3, 1)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.reshape(N, P * P, Dv).to(x.dtype)


def pool(x, weight, bias, grid, eps=1e-5):
    """pool_reference, or the same as one kernel (pool_triton.py): not in fp64, not where windows overlap."""
    plain = x.dtype == torch.float64 or side(x.shape[1]) % grid != 0
    if plain or pool_path(x.device.type) == "torch":
        return pool_reference(x, weight, bias, grid, eps)
    import pool_triton

    return pool_triton.pool(x, weight, bias, grid, eps)


def pool_path(device):
    """'triton' on CUDA, 'torch' elsewhere; NANO_POOL=triton|torch forces either."""
    path = os.environ.get("NANO_POOL") or ("triton" if device == "cuda" else "torch")
    assert path in ("triton", "torch"), f"NANO_POOL is triton or torch, not {path}"
    return path


def side(patches):
    s = math.isqrt(patches)
    assert s * s == patches, f"{patches} patches do not form a square"
    return s


class PoolAdapter(nn.Module):
    """InfMLLM's: keeps the order of the patches and with it their place in the image."""

    def __init__(self, width_vit, width_llm, grid, ln_vision=True):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(width_vit, eps=1e-5) if ln_vision else None  # ln_vision
        self.fc1 = nn.Linear(width_vit, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x):  # (N, s*s, Dv)
        if self.norm is None:
            x = pool(x, None, None, self.grid)  # (N, P*P, Dv)
        else:
            x = pool(x, self.norm.weight, self.norm.bias, self.grid, self.norm.eps)
        return self.fc2(F.gelu(self.fc1(x)))  # (N, P*P, D)


class Resampler(nn.Module):
    """The Q-Former's stand-in, in Qwen-VL's form: learned queries cross-attend once to all patches.

    Where a patch lies, its key knows through the ViT's own positions only."""

    def __init__(self, width_vit, width_llm, grid, ln_vision=True, head_dim=64):
        super().__init__()
        self.grid = grid
        self.heads = max(1, width_llm // head_dim)
        self.norm = nn.LayerNorm(width_vit, eps=1e-5) if ln_vision else nn.Identity()
        self.queries = nn.Parameter(torch.zeros(grid * grid, width_llm))
        self.q = nn.Linear(width_llm, width_llm)
        self.kv = nn.Linear(width_vit, 2 * width_llm)
        self.fc1 = nn.Linear(width_llm, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x):  # (N, s*s, Dv)
        N, Q, D, H = len(x), self.grid**2, self.queries.shape[1], self.heads
        k, v = self.kv(self.norm(x)).chunk(2, dim=-1)  # (N, s*s, D) each
        k = k.view(N, -1, H, D // H).transpose(1, 2)  # (N, H, s*s, hd)
        v = v.view(N, -1, H, D // H).transpose(1, 2)
        q = self.q(self.queries).to(k.dtype).view(1, Q, H, D // H).transpose(1, 2)  # (1, H, Q, hd)
        y = F.scaled_dot_product_attention(q.expand(N, -1, -1, -1), k, v)  # (N, H, Q, hd)
        y = y.transpose(1, 2).reshape(N, Q, D)
        return self.fc2(F.gelu(self.fc1(y)))


ADAPTERS = {"pool": PoolAdapter, "mlp": PoolAdapter, "resampler": Resampler}
