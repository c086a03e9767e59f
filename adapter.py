"""From the ViT's patches to the language model's embeddings: the pool-adapter, and the adapters it is compared with.

All of them map (N, 1+s*s, Dv), CLS first, to (N, Q, D):

    PoolAdapter   LayerNorm, drop CLS, mean over windows s x s -> P x P, two-layer MLP.     Q = P*P, order kept
    PoolAdapter   with P = s: no pooling, LLaVA's projector (adapter="mlp")                 Q = s*s
    Resampler     P*P learned queries that cross-attend to the patches, as a Q-Former does  Q = P*P, order learned

Names of dimensions: N images, s patches per side, P windows per side, Dv the ViT's width, D the language model's.
"""

import os
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F


def pool_reference(x, weight, bias, grid, eps=1e-5):
    """LayerNorm (none if weight is None) and window means: (N, 1+s*s, Dv) -> (N, P*P, Dv) in x's dtype, sums in fp32.

    The mean of normalised patches is affine in them, so the LayerNorm's weight and bias are applied to the P*P means
    and not to the s*s patches: the same function, with a quarter of the work at s = 2P.
    """
    N, Dv, s, P = x.shape[0], x.shape[2], side(x.shape[1] - 1), grid
    acc = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(acc) for t in (weight, bias))
    y = x.to(acc)
    if weight is not None:
        y = F.layer_norm(y, (Dv,), *((weight, bias) if s == P else ()), eps=eps)
    y = y[:, 1:]  # (N, s*s, Dv) as a view: to normalise CLS in vain is cheaper than a copy
    if s == P:
        return y.to(x.dtype)
    if s % P == 0:  # (N, P, P, Dv); two means of whole rows are five times as fast as mean((2, 4))
        y = y.reshape(N, P, s // P, P, s // P, Dv).mean(2).mean(3)
    else:  # windows overlap: adaptive semantics
        y = F.adaptive_avg_pool2d(y.reshape(N, s, s, Dv).permute(0, 3, 1, 2), P).permute(0, 2, 3, 1)
    if weight is not None:
        y = y * weight if bias is None else torch.addcmul(bias, y, weight)
    return y.reshape(N, P * P, Dv).to(x.dtype)


@cache
def pool_path(device):
    """'triton' on CUDA, 'torch' elsewhere; NANO_POOL=triton|torch forces either."""
    path = os.environ.get("NANO_POOL") or ("triton" if device == "cuda" else "torch")
    assert path in ("triton", "torch"), f"NANO_POOL is triton or torch, not {path}"
    return path


def pool(x, weight, bias, grid, eps=1e-5):
    """pool_reference, or the same function as one kernel (pool_triton.py), which computes in fp32 and not in fp64."""
    plain = pool_path(x.device.type) == "torch" or x.dtype == torch.float64
    if plain:
        return pool_reference(x, weight, bias, grid, eps)
    from pool_triton import pool as fused

    return fused(x, weight, bias, grid, eps)


def side(patches):
    s = round(patches**0.5)
    assert s * s == patches, f"{patches} patches do not form a square; the first token must be CLS"
    return s


class PoolAdapter(nn.Module):
    """InfMLLM's: keeps the patches' order and with it their place in the image. (N,1+s*s,Dv) -> (N,P*P,D)"""

    def __init__(self, width_vit, width_llm, grid, ln_vision=True):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(width_vit, eps=1e-5) if ln_vision else None  # ln_vision
        self.fc1 = nn.Linear(width_vit, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x):
        weight, bias, eps = (
            (self.norm.weight, self.norm.bias, self.norm.eps) if self.norm else (None, None, 1e-5)
        )
        x = pool(x, weight, bias, self.grid, eps)  # (N, P*P, Dv)
        return self.fc2(F.gelu(self.fc1(x)))  # (N, P*P, D)


class Resampler(nn.Module):
    """The Q-Former's stand-in (Qwen-VL's form): learned queries cross-attend once to all patches, which lose their
    order. Keys see where a patch lies through the ViT's own positions only. (N,1+s*s,Dv) -> (N,P*P,D)"""

    def __init__(self, width_vit, width_llm, grid, ln_vision=True, head_width=64):
        super().__init__()
        self.grid, self.heads = grid, max(1, width_llm // head_width)
        self.norm = nn.LayerNorm(width_vit, eps=1e-5) if ln_vision else None
        self.queries = nn.Parameter(torch.zeros(grid * grid, width_llm))
        self.q = nn.Linear(width_llm, width_llm)
        self.kv = nn.Linear(width_vit, 2 * width_llm)
        self.fc1 = nn.Linear(width_llm, width_llm)
        self.fc2 = nn.Linear(width_llm, width_llm)

    def forward(self, x):
        N, Q, D = x.shape[0], self.grid**2, self.queries.shape[1]
        x = x[:, 1:] if self.norm is None else self.norm(x[:, 1:])  # (N, s*s, Dv)
        k, v = (
            self.kv(x).view(N, -1, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # (N, H, s*s, hd)
        q = (
            self.q(self.queries).view(1, Q, self.heads, -1).transpose(1, 2).expand(N, -1, -1, -1)
        )  # (N, H, Q, hd)
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v).transpose(1, 2).reshape(N, Q, D)
        return self.fc2(F.gelu(self.fc1(y)))
