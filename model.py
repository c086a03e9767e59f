"""InfMLLM from pixels to a loss: a ViT, the pool-adapter (adapter.py) and a LLaMA decoder, in the order the data flows.

    python model.py              # the presets: parameters per part, visual tokens per image, FLOPs per pair

Names of dimensions, used in every shape comment:
    N images in a batch         S pixels per side         s patches per side (S / patch)     P pooled cells per side
    B rows of text              T tokens in a row         V vocabulary                       M supervised positions
    D width of the LLM          Dv width of the ViT       H heads, K key-value heads, hd head width
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adapter import PoolAdapter, Resampler

IMAGE = -1  # the token id that holds the place of one visual embedding

IGNORE = -100  # a target that does not count

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which EVA-CLIP shares

PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class ViTConfig:
    image_size: int = 448
    patch: int = 14
    width: int = 1408
    layers: int = (
        39  # blocks that run: EVA's 40th is dropped, CLIP stops at hidden state -2 (23 of 24)
    )
    heads: int = 16
    mlp: int = 6144
    act: str = "gelu"  # gelu (exact) or quick_gelu (CLIP: x * sigmoid(1.702 x))
    eps: float = 1e-6
    patch_bias: bool = True
    pre_norm: bool = False  # CLIP's LayerNorm between the embeddings and the first block

    def __post_init__(self):
        assert self.image_size % self.patch == 0, (
            f"image size {self.image_size} is no multiple of patch {self.patch}"
        )
        assert self.width % self.heads == 0, (
            f"ViT width {self.width} is not divisible by {self.heads} heads"
        )
        assert self.act in ("gelu", "quick_gelu"), (
            f"the ViT's activation is gelu or quick_gelu, not {self.act}"
        )

    @property
    def side(self):
        return self.image_size // self.patch


@dataclass
class LlamaConfig:
    vocab: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32  # fewer than heads: grouped-query attention
    mlp: int = 11008
    context: int = 4096  # the longest row it was trained for
    eps: float = 1e-5
    theta: float = 1e4
    rope: dict = field(
        default_factory=dict
    )  # {} or the scaling of a Hugging Face config: rope_type linear | llama3
    tied: bool = False  # the head is the embedding matrix
    branches: dict = field(
        default_factory=dict
    )  # inner adaptors: {branch: the layers after which one of its runs}

    def __post_init__(self):
        assert self.width % self.heads == 0, (
            f"LLM width {self.width} is not divisible by {self.heads} heads"
        )
        assert self.heads % self.kv_heads == 0, (
            f"{self.heads} heads do not share {self.kv_heads} key-value heads"
        )
        for name, inner in self.branches.items():
            assert name.isidentifier(), f"a branch's name is a word such as mm, not {name!r}"
            fits = (
                inner
                and list(inner) == sorted(set(inner))
                and inner[0] >= 0
                and inner[-1] < self.layers
            )
            assert fits, (
                f"branch {name}: {inner} are not layers from 0 to {self.layers - 1}, each once and in order"
            )


@dataclass
class Config:
    vit: ViTConfig
    llm: LlamaConfig
    grid: int = 16  # P; the mlp adapter has no pooling, so there it is s whatever one asks for
    adapter: str = "pool"  # pool, resampler or mlp
    ln_vision: bool = True  # LayerNorm in front of the pooling; LLaVA has none
    image_mark: str = "<image><ImageHere>"  # what `<image>` in a conversation becomes; <ImageHere> alone for LLaVA

    def __post_init__(self):
        if isinstance(self.vit, dict):
            self.vit = ViTConfig(**self.vit)
        if isinstance(self.llm, dict):
            self.llm = LlamaConfig(**self.llm)
        assert self.adapter in ("pool", "resampler", "mlp"), (
            f"adapter is pool, resampler or mlp, not {self.adapter}"
        )
        if self.adapter == "mlp":
            self.grid = self.vit.side
        assert 1 <= self.grid <= self.vit.side, (
            f"grid {self.grid} is not within the ViT's {self.vit.side} patches"
        )

    @property
    def visual_tokens(self):
        return self.grid**2

    def to_dict(self):
        return asdict(self)


EVA_G = dict(patch=14, width=1408, layers=39, heads=16, mlp=6144)

CLIP_L = dict(
    image_size=336,
    patch=14,
    width=1024,
    layers=23,
    heads=16,
    mlp=4096,
    act="quick_gelu",
    eps=1e-5,
    patch_bias=False,
    pre_norm=True,
)

LLAMA_13B = dict(width=5120, layers=40, heads=40, kv_heads=40, mlp=13824)

PRESETS = {  # functions, so that nobody changes a shared default
    "toy": lambda: Config(
        ViTConfig(64, 8, 128, 4, 4, 512), LlamaConfig(640, 128, 4, 4, 4, 352, context=512), grid=4
    ),
    "small": lambda: Config(
        ViTConfig(**CLIP_L),  # TinyLlama-1.1B
        LlamaConfig(32000, 2048, 22, 32, 4, 5632, context=2048),
        grid=12,
    ),
    "llava-7b": lambda: Config(
        ViTConfig(**CLIP_L),
        LlamaConfig(vocab=32064),
        adapter="mlp",
        ln_vision=False,
        image_mark="<ImageHere>",
    ),
    "infmllm-7b": lambda: Config(ViTConfig(448, **EVA_G), LlamaConfig()),
    "infmllm-13b": lambda: Config(ViTConfig(448, **EVA_G), LlamaConfig(**LLAMA_13B)),
}


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention: q (B,H,T,hd), k and v (B,K,S,hd) -> (B,H,T,hd)."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


# ---------------------------------------------------------------------------------------------------------------------
# The vision tower
class LayerNorm(nn.LayerNorm):
    """Statistics in fp32, output in the input's dtype: autocast would keep an fp32 copy of every activation."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(
                x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP (EVA-CLIP in BLIP-2; CLIP). K has no bias: it would add one number to all scores of a
    query, which the softmax cancels, so checkpoints that store one lose nothing when it is dropped."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads, self.act = c.heads, c.act
        self.norm1 = LayerNorm(c.width, eps=c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(c.width))
        self.v_bias = nn.Parameter(torch.zeros(c.width))
        self.proj = nn.Linear(c.width, c.width)
        self.norm2 = LayerNorm(c.width, eps=c.eps)
        self.fc1 = nn.Linear(c.width, c.mlp)
        self.fc2 = nn.Linear(c.mlp, c.width)

    def forward(self, x):  # (N, 1+s*s, Dv)
        N, L, Dv = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(self.norm1(x), self.qkv.weight, bias)  # (N, L, 3*Dv)
        q, k, v = qkv.view(N, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (N, H, L, hd)
        x = x + self.proj(attend(q, k, v).transpose(1, 2).reshape(N, L, Dv))
        h = self.fc1(self.norm2(x))
        h = (
            F.gelu(h) if self.act == "gelu" else F.silu(1.702 * h).div_(1.702)
        )  # h * sigmoid(1.702 h)
        return x + self.fc2(h)


class ViT(nn.Module):
    """(N,3,S,S) normalised pixels -> (N,1+s*s,Dv), CLS first. No norm at the end: the adapter brings its own."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.config, self.recompute = (
            c,
            False,
        )  # recompute: activation checkpointing, a block at a time
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch, bias=c.patch_bias)
        self.cls = nn.Parameter(torch.zeros(c.width))
        self.positions = nn.Parameter(torch.zeros(1 + c.side**2, c.width))  # CLS first
        self.pre_norm = LayerNorm(c.width, eps=c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(c) for _ in range(c.layers))

    def forward(self, images):
        N, S = images.shape[0], self.config.image_size
        assert images.shape[1:] == (3, S, S), (
            f"this ViT takes (N, 3, {S}, {S}), not {tuple(images.shape)}"
        )
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (N, s*s, Dv)
        x = torch.cat((self.cls.to(x.dtype).expand(N, 1, -1), x), dim=1)  # (N, 1+s*s, Dv)
        x = self.pre_norm(x + self.positions.to(x.dtype))
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.recompute and x.requires_grad
                else block(x)
            )
        return x

    def resize(self, image_size):
        """Take images of another size from now on: the grid of positions is resized bicubically, CLS keeps its own."""
        if image_size == self.config.image_size:
            return
        self.config = ViTConfig(**{**asdict(self.config), "image_size": image_size})
        self.positions = nn.Parameter(
            resize_positions(self.positions.detach(), self.config.side),
            requires_grad=self.positions.requires_grad,
        )


def resize_positions(positions, side):
    """(1+s*s, Dv) -> (1+side*side, Dv), for any two square grids."""
    old = math.isqrt(len(positions) - 1)
    assert old * old == len(positions) - 1, (
        f"{len(positions)} positions are not CLS and a square grid"
    )
    if old == side:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    grid = wide[1:].view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, Dv, s, s)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat((wide[:1], grid.flatten(2)[0].T)).to(positions.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The language model
class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(
        self, x
    ):  # fp32 inside the kernel, the input's dtype outside; autocast would return fp32
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Cache:
    """Keys and values of all layers in one allocation; `length` positions of every row are filled."""

    def __init__(
        self, c: LlamaConfig, rows, room, device, dtype, inner=0
    ):  # inner: layers of a branch
        hd = c.width // c.heads
        self.kv = torch.zeros(
            c.layers + inner, 2, rows, c.kv_heads, room, hd, device=device, dtype=dtype
        )
        self.length, self.room = 0, room
        self.layers = [kv.unbind() for kv in self.kv]  # views, each (rows, K, room, hd)

    def update(self, layer, k, v):
        """Append k and v (B,K,T,hd) behind what is there and return the whole."""
        (K, V), T = self.layers[layer], k.shape[2]
        K.narrow(2, self.length, T).copy_(k)  # a slice in brackets takes Python twice as long
        V.narrow(2, self.length, T).copy_(v)
        return K.narrow(2, 0, self.length + T), V.narrow(2, 0, self.length + T)


class LlamaLayer(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads, self.hd = c.heads, c.kv_heads, c.width // c.heads
        self.attn_norm = RMSNorm(c.width, c.eps)
        self.q = nn.Linear(c.width, c.heads * self.hd, bias=False)
        self.k = nn.Linear(c.width, c.kv_heads * self.hd, bias=False)
        self.v = nn.Linear(c.width, c.kv_heads * self.hd, bias=False)
        self.o = nn.Linear(c.heads * self.hd, c.width, bias=False)
        self.mlp_norm = RMSNorm(c.width, c.eps)
        self.gate = nn.Linear(c.width, c.mlp, bias=False)
        self.up = nn.Linear(c.width, c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.width, bias=False)

    def forward(self, x, rotary, mask=None, cache=None, index=0):  # (B, T, D)
        B, T, _ = x.shape
        h = self.attn_norm(x)
        q = rotate(
            self.q(h).view(B, T, self.heads, self.hd).transpose(1, 2), *rotary
        )  # (B, H, T, hd)
        k = rotate(
            self.k(h).view(B, T, self.kv_heads, self.hd).transpose(1, 2), *rotary
        )  # (B, K, T, hd)
        v = self.v(h).view(B, T, self.kv_heads, self.hd).transpose(1, 2)
        causal = mask is None and T > 1
        if cache is not None:
            k, v = cache.update(index, k, v)
        y = attend(q, k, v, mask, causal).transpose(1, 2).reshape(B, T, -1)  # (B, T, H*hd)
        x = x + self.o(y)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):
    """Rotary positions in Hugging Face's layout: dimension i turns with dimension i + hd/2, not with its neighbour."""
    return torch.addcmul(
        x * cos, x.roll(x.shape[-1] // 2, -1), sin
    )  # cos, sin: (T, hd) or (B, 1, T, hd)


def places(start, T, pad, device):
    """Positions start ... start+T-1, (T,), or counted from each row's first real token, (B, 1, T)."""
    at = torch.arange(start, start + T, device=device)
    return at if pad is None else (at - pad[:, None, None]).clamp(min=0)


def angles(at, frequencies, dtype):
    """cos and sin, (..., hd) each, at these positions; sin is negative in its first half."""
    angle = at[..., None] * frequencies  # (..., hd/2)
    angle = torch.cat((-angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def frequencies(c: LlamaConfig, device):
    """Radians per position of each pair of dimensions, (hd/2,) fp32, under the scaling that the config names."""
    hd = c.width // c.heads
    f = 1.0 / c.theta ** (torch.arange(0, hd, 2, device=device, dtype=torch.float32) / hd)
    kind = c.rope.get("rope_type", c.rope.get("type", "default"))
    if kind == "default":
        return f
    factor = c.rope["factor"]
    if kind == "linear":
        return f / factor
    assert kind == "llama3", f"rope scaling '{kind}' is not one of default, linear, llama3"
    turns = (
        c.rope["original_max_position_embeddings"] * f / (2 * math.pi)
    )  # in the original context
    low, high = c.rope["low_freq_factor"], c.rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(
        0, 1
    )  # 0: slow, slowed by factor; 1: fast, left alone
    return f * keep + f / factor * (1 - keep)


class Branch(nn.Module):
    """What one workflow adds to a frozen LLM (IAA, arXiv 2408.12902): whole decoder layers, each running after a chosen
    layer of the base and replacing the hidden state, between an embedding, a norm, a head and a visual adapter of the
    branch's own. There is no gate: see InfMLLM.grow for how it begins."""

    def __init__(self, c: LlamaConfig, inner, adapter=None):
        super().__init__()
        self.after = {layer: n for n, layer in enumerate(inner)}
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.vocab, c.width), freeze=False)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in inner)
        self.norm = RMSNorm(c.width, c.eps)
        if not c.tied:
            self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        self.adapter = adapter


class Llama(nn.Module):
    """Tokens (B,T) or embeddings (B,T,D) -> hidden (B,T,D) after the final norm; `head` makes logits of them.

    Padding on the right needs no mask: nothing looks that far. Padding on the left, `pad` (B,) positions of each row,
    is for generation, where all rows end at the same place.
    With `tree`, (position, mask (B,1,T,S)), the tokens of a row are T ways to go on at that one position, each of which
    looks at the S positions of the cache, its own included, where the mask says: beams, which share their prompt.
    `active` names the branch that runs; None is the base alone, untouched by whatever branches it has.
    """

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config, self.recompute, self.rotary_base, self.active = c, False, None, None
        # empty: init() or a file fills it, and on the meta device its own normal_ would import torch's compiler, 1.5 s
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.vocab, c.width), freeze=False)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)
        if not c.tied:
            self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        self.branches = nn.ModuleDict(
            {name: Branch(c, inner) for name, inner in c.branches.items()}
        )

    @property
    def ends(self):
        """Whose embedding, norm and head are in use: the active branch's, or the base's."""
        return self.branches[self.active] if self.active else self

    @property
    def inner(self):
        return len(self.ends.layers) if self.active else 0

    def stack(self):
        """(layer, its place in the cache) in the order in which they run: h <- L_i(h), in a branch h <- A_i(L_i(h))."""
        for i, layer in enumerate(self.layers):
            yield layer, i
            if self.active and i in self.ends.after:
                n = self.ends.after[i]
                yield self.ends.layers[n], len(self.layers) + n

    def forward(self, x, cache=None, pad=None, tree=None):
        if not x.is_floating_point():
            x = self.ends.embed(x)
        start, T = (cache.length if cache else 0), x.shape[1]
        room = cache.room if cache else T
        assert start + T <= room, f"the cache holds {room} positions and {start + T} are asked for"
        mask = tree[1] if tree else attention_mask(start, T, pad, x.device)
        rotary = self.rotary(x, *((tree[0], 1) if tree else (start, T)), pad)
        for layer, i in self.stack():
            args = x, rotary, mask, cache, i
            x = (
                checkpoint(layer, *args, use_reentrant=False)
                if self.recompute and x.requires_grad
                else layer(*args)
            )
        if cache:
            cache.length += T
        return self.ends.norm(x)

    def head(self, hidden):
        if self.config.tied:
            return F.linear(hidden, self.ends.embed.weight)
        return self.ends.lm_head(hidden)

    def rotary(self, x, start, T, pad):
        """cos and sin for positions start ... start+T-1, counted from each row's first real token."""
        if self.rotary_base is None or self.rotary_base.device != x.device:
            self.rotary_base = frequencies(
                self.config, x.device
            )  # no buffer: .to(bf16) would round its positions
        return angles(places(start, T, pad, x.device), self.rotary_base, x.dtype)


def attention_mask(start, T, pad, device):
    """True where a query may look; None where SDPA's own causal path (or no mask, for one token) says the same."""
    if pad is None and (start == 0 or T == 1):
        return None
    key = torch.arange(start + T, device=device)  # (S,)
    query = key[start:, None]  # (T, 1)
    if pad is None:
        return key <= query  # (T, S)
    # a query in the padding may look at itself, as a softmax over nothing is NaN; nobody looks at it
    return (key <= query) & ((key >= pad[:, None, None, None]) | (key == query))  # (B, 1, T, S)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
CHUNK = 2**23  # elements of a chunk of logits: 32 MB in fp32


def summed_cross_entropy(head, hidden, targets, vocab):
    """Cross-entropy of head(hidden) (M,V) against targets (M,), summed in fp32 or wider, a few rows at a time.

    The logits of a 7B model's batch would be its largest tensor: a chunk of them is dropped at once and made again in
    the backward pass.
    """

    def of_chunk(hidden, targets):
        logits = head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORE, reduction="sum")

    rows = max(1, CHUNK // vocab)
    chunks = zip(hidden.split(rows), targets.split(rows))
    return sum(checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in chunks)


# ---------------------------------------------------------------------------------------------------------------------
# The whole
BRANCHES = "llm.branches."  # what the names of a branch's parameters begin with


class InfMLLM(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c, dv, d = config, config.vit.width, config.llm.width
        self.vit = ViT(c.vit)
        kind = Resampler if c.adapter == "resampler" else PoolAdapter
        self.adapter = kind(dv, d, c.grid, c.ln_vision)
        self.llm = Llama(c.llm)
        for branch in self.llm.branches.values():
            branch.adapter = kind(dv, d, c.grid, c.ln_vision)

    @torch.no_grad()
    def grow(self, name, inner):
        """Add a branch that computes the base's function and take it: everything is a copy of the base's, and with o
        and down at zero an inner layer, a copy of the one that it follows, adds nothing to the hidden state yet."""
        llm, c = self.llm, self.llm.config
        replace(c, branches={name: inner})  # complains if they cannot be
        c.branches[name] = list(inner)
        with torch.device("meta"):
            branch = llm.branches[name] = Branch(c, inner)
        branch.layers = copy.deepcopy(nn.ModuleList(llm.layers[i] for i in inner))
        for layer in branch.layers:
            layer.o.weight.zero_(), layer.down.weight.zero_()
        for part in ("embed", "norm", "lm_head")[: 2 if c.tied else 3]:
            setattr(branch, part, copy.deepcopy(getattr(llm, part)))
        branch.adapter = copy.deepcopy(self.adapter)
        return self.use(name)

    def use(self, branch):
        """Answer and train through this branch from now on; None: the base alone."""
        assert branch is None or branch in self.llm.branches, (
            f"no branch {branch}; there is {list(self.llm.branches)}"
        )
        self.llm.active = branch
        return self

    @contextmanager
    def using(self, branch):
        before = self.llm.active
        try:
            yield self.use(branch)
        finally:
            self.llm.active = before

    @property
    def front(self):
        """The adapter in use: the active branch's, or the base's."""
        return self.llm.ends.adapter if self.llm.active else self.adapter

    def see(self, images):
        """(N,3,S,S) -> (N,1+s*s,Dv). uint8 is normalised here; float is taken as normalised already."""
        if images.dtype == torch.uint8:
            mean, std = (
                torch.tensor(t, device=images.device).view(3, 1, 1) * 255
                for t in (PIXEL_MEAN, PIXEL_STD)
            )
            images = (images - mean) / std
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.vit.parameters())
        with torch.set_grad_enabled(trains):
            return self.vit(images.to(self.vit.patch_embed.weight.dtype))

    def encode_images(self, images):
        return self.front(self.see(images))  # (N,3,S,S) -> (N,P*P,D)

    def embed(self, images, tokens, image_at=None):
        """Token embeddings with the placeholders overwritten by the images', (B,T,D).

        image_at (N*P*P,): where in tokens.flatten() each visual embedding goes, -1 for nowhere. Without it the
        placeholders are looked for, which waits for the device.
        """
        B, T = tokens.shape
        cells = self.config.visual_tokens
        if image_at is None:
            image_at = (tokens.flatten() == IMAGE).nonzero()[:, 0]
            if (
                len(images) == 0
            ):  # one blank image that goes nowhere: every rank builds the same graph
                images, image_at = (
                    images.new_zeros(1, *images.shape[1:]),
                    image_at.new_full((cells,), -1),
                )
        N = len(images)
        assert len(image_at) == N * cells, (
            f"{N} images need {N * cells} placeholders ({cells} each), and the text "
            f"has {len(image_at)}"
        )
        visual = self.encode_images(images).flatten(0, 1)  # (N*P*P, D)
        flat = F.pad(tokens.flatten(), (0, 1))  # one place more, for embeddings that go nowhere
        x = self.llm.ends.embed(flat.clamp(min=0))  # (B*T+1, D)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.index_copy(0, torch.where(image_at < 0, B * T, image_at), visual.to(x.dtype))
        return x[:-1].view(B, T, -1)

    def forward(self, images, tokens, targets=None, image_at=None, target_at=None):
        """The cross-entropy summed over targets != IGNORE in fp32; logits (B,T,V) where no targets are given.

        targets[b,t] is what should follow tokens[b,t]. target_at (M,): where in targets.flatten() something is
        supervised, -1 for padding; without it these are looked for, which waits for the device.
        """
        x = self.embed(images, tokens, image_at)  # (B, T, D)
        if targets is None:
            return self.llm.head(self.llm(x))
        targets = targets.flatten()
        if target_at is None:
            target_at = (targets != IGNORE).nonzero()[:, 0]
        at = target_at.clamp(min=0)
        wanted = torch.where(target_at < 0, IGNORE, targets[at])  # (M,)
        hidden = self.llm(x).flatten(0, 1)[at]  # (M, D)
        return summed_cross_entropy(self.llm.head, hidden, wanted, self.llm.config.vocab)

    def freeze(self, stage, tune=None):
        """Let exactly the parts train that InfMLLM trains in this stage (paper, section 3.2; FACTS table)."""
        for name, p in self.named_parameters():
            p.requires_grad_(trains(name, stage, tune, self.llm.active))
        return self

    def resize(self, image_size):
        """Take images of another size from now on; the number of visual tokens stays unless nothing is pooled."""
        self.vit.resize(image_size)
        self.config.vit = self.vit.config
        self.config.__post_init__()
        for adapter in (self.adapter, *(b.adapter for b in self.llm.branches.values())):
            adapter.grid = self.config.grid
        return self


TUNE = {
    1: "none",
    2: "qv",
    3: "full",
}  # what of the LLM trains in a stage: alignment, multitask, instructions


def trains(name, stage, tune=None, branch=None):
    """Whether the parameter of this name is trained: the adapter in every stage, the ViT in stage 2, and of the LLM
    what `tune` says (none, qv, full; the stage's own by default), or the whole of a branch and nothing else (inner)."""
    if stage not in TUNE:
        raise ValueError(f"stage is 1, 2 or 3, not {stage!r}")
    tune = tune or TUNE[stage]
    if tune == "inner":
        return name.startswith(f"{BRANCHES}{branch}.")
    part = name.split(".")[0]
    if part != "llm":
        return part == "adapter" or stage == 2
    if name.startswith(BRANCHES):
        return False
    return tune == "full" or tune == "qv" and name.endswith((".q.weight", ".v.weight"))


def part_of(name):
    """vit, adapter or llm, for learning rates and tables; a branch's adapter is an adapter."""
    return "adapter" if name.startswith(BRANCHES) and ".adapter." in name else name.split(".")[0]


@torch.no_grad()
def init(model, seed=0):
    """Random weights for a model or any part of it, the same for the same seed.

    matrices, convolutions, embeddings     normal, 0.02
    the matrix that ends a residual branch normal, 0.02 / sqrt(2 * layers)     (proj, fc2; o, down)
    positions, cls, queries                normal, 0.02
    biases 0, norm weights 1
    """
    rng = torch.Generator().manual_seed(seed)
    layers = {
        kind: sum(isinstance(m, kind) for m in model.modules()) for kind in (ViTBlock, LlamaLayer)
    }
    ends = {"proj": ViTBlock, "fc2": ViTBlock, "o": LlamaLayer, "down": LlamaLayer}
    for name, p in model.named_parameters():
        owner, leaf = ([""] + name.split("."))[-2:]
        if p.ndim == 1 and leaf not in ("cls",):
            p.fill_(1.0 if leaf == "weight" else 0.0)
        else:
            block = model.get_submodule(
                name.rpartition(".")[0].rpartition(".")[0]
            )  # the adapter has an fc2 as well
            std = (
                0.02 / math.sqrt(2 * layers[type(block)])
                if ends.get(owner) is type(block)
                else 0.02
            )
            p.copy_(torch.randn(p.shape, generator=rng) * std)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What it costs
def flops(c: Config, text, supervised, stage=None, tune=None, branch=None):
    """FLOPs of one image-text pair by part: the forward pass, and with a stage also the gradients that it needs.

    A multiply-add is two. Causal attention is counted at the half that it needs. Gradients: as much as the forward
    pass for what flows through (dX), as much again for weights that train (dW). Recomputation is not counted.
    """
    v, l, L, T = c.vit, c.llm, 1 + c.vit.side**2, c.visual_tokens + text
    patches = 2 * v.side**2 * 3 * v.patch**2 * v.width
    vit = patches + v.layers * (
        2 * L * (4 * v.width**2 + 2 * v.width * v.mlp) + 4 * L * L * v.width
    )
    adapter_in = 2 * c.visual_tokens * v.width * l.width
    adapter_out = 2 * c.visual_tokens * l.width**2
    kv = l.width * l.kv_heads // l.heads
    qv, k, rest = l.width * (l.width + kv), l.width * kv, l.width * (l.width + 3 * l.mlp)
    inner = l.branches[branch] if branch else []
    layers = l.layers + len(inner)
    llm_qv = 2 * T * l.layers * qv
    llm = 2 * T * layers * (qv + k + rest)
    llm_inner = 2 * T * len(inner) * (qv + k + rest)
    llm_attention = layers * 2 * T * T * l.width
    head = 2 * supervised * l.width * l.vocab
    parts = {
        "vit": vit,
        "adapter": adapter_in + adapter_out,
        "llm": llm + llm_attention,
        "head": head,
    }
    if stage is None:
        return parts
    tune = tune or TUNE[stage]
    sees = stage == 2 and tune != "inner"
    if sees:
        parts["vit"] = 3 * vit - patches  # pixels need no gradient
    parts["adapter"] += 2 * adapter_out + adapter_in * (2 if sees or c.ln_vision else 1)
    parts["llm"] += (
        llm + 2 * llm_attention + {"none": 0, "qv": llm_qv, "full": llm, "inner": llm_inner}[tune]
    )
    parts["head"] += head + (head if tune in ("full", "inner") else 0)
    return parts


def every_layer(model):
    """All blocks and layers, a branch's too: what is compiled, sharded and counted one by one."""
    return [m for m in model.modules() if isinstance(m, (ViTBlock, LlamaLayer))]


def count(module):
    return sum(p.numel() for p in module.parameters())


def main():
    text, supervised = 64, 16
    print(
        f"{'preset':<13}{'ViT':>9}{'adapter':>9}{'LLM':>9}{'total':>9}   image  patches  visual tokens"
        f"   forward   GFLOPs: ViT + adapter + LLM + head"
    )
    for name, make in PRESETS.items():
        c = make()
        with torch.device("meta"):
            m = InfMLLM(c)
        sizes = [count(part) / 1e6 for part in (m.vit, m.adapter, m.llm, m)]
        cost = [x / 1e9 for x in flops(c, text, supervised).values()]
        print(
            f"{name:<13}" + "".join(f"{n:>8.1f}M" for n in sizes) + f"{c.vit.image_size:>8}"
            f"{c.vit.side:>6}x{c.vit.side:<3}{c.visual_tokens:>12}{sum(cost):>12.1f}   "
            + " + ".join(f"{x:.1f}" for x in cost)
        )
    print(
        f"forward: one image, {text} text tokens, {supervised} of them supervised; a multiply-add counts as two"
    )


if __name__ == "__main__":
    main()
