"""InfMLLM from pixels to a loss: a ViT, the pool-adapter (adapter.py) and a LLaMA decoder.

    python model.py              # the presets: parameters per part, visual tokens per image, FLOPs per pair

The classes stand in the order in which the data flows. Names of dimensions, used in every shape comment:
    N images in a batch         S pixels per side         s patches per side (S / patch)     P pooled cells per side
    B rows of text              T tokens in a row         V vocabulary                       M supervised positions
    D width of the LLM          Dv width of the ViT       H heads, K key-value heads         hd width of a head
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adapter import ADAPTERS

IMAGE = -1  # the token id that holds the place of one visual embedding
IGNORE = -100  # a target that does not count
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's, which EVA-CLIP shares
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]
LOGITS = 2**23  # numbers in the largest chunk of logits that the loss makes at once: 32 MB in fp32
ACTS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),  # SigLIP's
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
}


@dataclass
class ViTConfig:  # by default EVA-CLIP's ViT-g
    image_size: int = 448
    patch: int = 14
    width: int = 1408
    layers: int = 39  # that run: EVA's 40th is dropped, CLIP stops at hidden state -2 (23 of 24)
    heads: int = 16
    mlp: int = 6144
    act: str = "gelu"  # a name in ACTS
    eps: float = 1e-6
    patch_bias: bool = True
    pre_norm: bool = False  # CLIP's LayerNorm between the embeddings and the first block
    prefix: int = 1  # tokens in front of the patches: CLS or none
    post_norm: bool = False  # SigLIP's LayerNorm behind the last block
    pixel_mean: list = field(default_factory=PIXEL_MEAN.copy)  # what pixels of 0 to 1 are
    pixel_std: list = field(default_factory=PIXEL_STD.copy)  # normalised with

    def __post_init__(self):
        assert self.width % self.heads == 0, (
            f"ViT width {self.width} is not divisible by {self.heads} heads"
        )
        assert self.act in ACTS, f"the ViT's activation is {', '.join(ACTS)}, not {self.act}"

    @property
    def side(self):  # pixels that fill no patch are not seen
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
    rope: dict = field(default_factory=dict)  # {} or Hugging Face's scaling: linear or llama3
    tied: bool = False  # the head is the embedding matrix
    head_dim: int = 0  # of a head; 0: width / heads
    qkv_bias: bool = False  # Qwen2 has these; LLaMA's attention_bias is o's as well
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3's RMSNorm of each head of q and k

    def __post_init__(self):
        self.head_dim = self.head_dim or self.width // self.heads
        assert self.heads % self.kv_heads == 0, (
            f"{self.heads} heads do not share {self.kv_heads} key-value heads"
        )


@dataclass
class Config:
    vit: ViTConfig
    llm: LlamaConfig
    grid: int = 16  # P; nothing is pooled in front of the mlp adapter: there it is s
    adapter: str = "pool"  # a name in adapter.ADAPTERS
    ln_vision: bool = True  # LayerNorm in front of the pooling; LLaVA has none
    image_mark: str = "<image><ImageHere>"  # what a conversation's `<image>` becomes
    template: str = "vicuna"  # the turns that it is asked in: a name in text.templates.TEMPLATES

    def __post_init__(self):
        if isinstance(self.vit, dict):
            self.vit = ViTConfig(**self.vit)
        if isinstance(self.llm, dict):
            self.llm = LlamaConfig(**self.llm)
        assert self.adapter in ADAPTERS, (
            f"adapter is {', '.join(ADAPTERS)}, not {self.adapter}; "
            f"name your own with --adapter FILE.py:{self.adapter}"
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
SIGLIP_BASE = dict(
    image_size=256,
    patch=16,
    width=768,
    layers=12,
    heads=12,
    mlp=3072,
    act="gelu_pytorch_tanh",
    prefix=0,
    post_norm=True,
    pixel_mean=[0.5] * 3,
    pixel_std=[0.5] * 3,
)
PRESETS = {  # functions, so that nobody changes a shared default
    "toy": lambda: Config(
        ViTConfig(image_size=64, patch=8, width=128, layers=4, heads=4, mlp=512),
        LlamaConfig(vocab=640, width=128, layers=4, heads=4, kv_heads=4, mlp=352, context=512),
        grid=4,
    ),
    "nano": lambda: Config(  # SigLIP2-base-patch16-256 and SmolLM2-135M-Instruct
        ViTConfig(**SIGLIP_BASE),
        LlamaConfig(
            vocab=49152,
            width=576,
            layers=30,
            heads=9,
            kv_heads=3,
            mlp=1536,
            context=8192,
            theta=1e5,
            tied=True,
        ),
        grid=8,
    ),
    "small": lambda: Config(  # SigLIP2-so400m-patch14-384 and Qwen3-0.6B
        ViTConfig(
            **SIGLIP_BASE
            | dict(image_size=384, patch=14, width=1152, layers=27, heads=16, mlp=4304)
        ),
        LlamaConfig(
            vocab=151936,
            width=1024,
            layers=28,
            heads=16,
            kv_heads=8,
            head_dim=128,
            mlp=3072,
            context=40960,
            eps=1e-6,
            theta=1e6,
            tied=True,
            qk_norm=True,
        ),
        grid=9,
    ),
    "llava-7b": lambda: Config(
        ViTConfig(**CLIP_L),
        LlamaConfig(vocab=32064),
        adapter="mlp",
        ln_vision=False,
        image_mark="<ImageHere>",
    ),
    "infmllm-7b": lambda: Config(ViTConfig(), LlamaConfig()),
    "infmllm-13b": lambda: Config(
        ViTConfig(), LlamaConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp=13824)
    ),
}


# ---------------------------------------------------------------------------------------------------
# The vision tower


class LayerNorm(nn.LayerNorm):
    """Statistics in fp32, output in the input's dtype.

    Autocast alone would return fp32 and keep an fp32 copy of every activation."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP, as in EVA-CLIP, CLIP and SigLIP.

    K has no bias: it would add the same number to all scores of a query, and the softmax cancels
    that. Checkpoints that store one lose nothing when it is dropped."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads = c.heads
        self.act = ACTS[c.act]
        self.norm1 = LayerNorm(c.width, eps=c.eps)
        self.q = nn.Linear(c.width, c.width)
        self.k = nn.Linear(c.width, c.width, bias=False)
        self.v = nn.Linear(c.width, c.width)
        self.proj = nn.Linear(c.width, c.width)
        self.norm2 = LayerNorm(c.width, eps=c.eps)
        self.fc1 = nn.Linear(c.width, c.mlp)
        self.fc2 = nn.Linear(c.mlp, c.width)

    def forward(self, x):  # (N, L, Dv), L = prefix + s*s
        N, L, Dv = x.shape
        h = self.norm1(x)
        q = self.q(h).view(N, L, self.heads, -1).transpose(1, 2)  # (N, H, L, hd)
        k = self.k(h).view(N, L, self.heads, -1).transpose(1, 2)
        v = self.v(h).view(N, L, self.heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, H, L, hd)
        x = x + self.proj(y.transpose(1, 2).reshape(N, L, Dv))
        h = self.act(self.fc1(self.norm2(x)))  # (N, L, mlp)
        return x + self.fc2(h)


class ViT(nn.Module):
    """(N,3,S,S) normalised pixels -> (N,prefix+s*s,Dv). Of CLIP and EVA without the norm at their end:
    the adapter has its own."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.config = c
        self.recompute = False  # activation checkpointing, a block at a time
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch, bias=c.patch_bias)
        self.cls = nn.Parameter(torch.zeros(c.width)) if c.prefix else None
        self.positions = nn.Parameter(torch.zeros(c.prefix + c.side**2, c.width))  # CLS first
        self.pre_norm = LayerNorm(c.width, eps=c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(c) for _ in range(c.layers))
        self.post_norm = LayerNorm(c.width, eps=c.eps) if c.post_norm else nn.Identity()

    def forward(self, images):
        N, S = images.shape[0], self.config.image_size
        assert images.shape[1:] == (3, S, S), (
            f"this ViT takes (N, 3, {S}, {S}), not {tuple(images.shape)}"
        )
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (N, s*s, Dv)
        if self.cls is not None:
            cls = self.cls.to(x.dtype).expand(N, 1, -1)
            x = torch.cat((cls, x), dim=1)  # (N, 1+s*s, Dv)
        x = self.pre_norm(x + self.positions.to(x.dtype))
        for block in self.blocks:
            if self.recompute and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.post_norm(x)

    def resize(self, image_size):
        """Take images of another size from now on: the grid of positions is resized."""
        if image_size == self.config.image_size:
            return
        self.config = replace(self.config, image_size=image_size)
        positions = resize_positions(self.positions.detach(), self.config.side)
        self.positions = nn.Parameter(positions, requires_grad=self.positions.requires_grad)


def resize_positions(positions, side):
    """(prefix+s*s, Dv) -> (prefix+side*side, Dv): bicubic between two square grids; CLS keeps its own."""
    old = math.isqrt(len(positions))
    prefix = len(positions) - old * old  # 1 where CLS stands in front, else 0
    if old == side:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    grid = wide[prefix:].view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, Dv, s, s)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat((wide[:prefix], grid.flatten(2)[0].T)).to(positions.dtype)


# ---------------------------------------------------------------------------------------------------
# The language model


class RMSNorm(nn.Module):
    """Statistics in fp32, output in the input's dtype, as LayerNorm above."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary(positions, c: LlamaConfig, dtype):
    """Positions (B,T), or (1,T) for all rows -> cos and sin, (B,1,T,hd) each."""
    angles = positions[:, None, :, None] * frequencies(c, positions.device)  # (B, 1, T, hd/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, hd)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def frequencies(c: LlamaConfig, device):
    """Radians per position of each pair of dimensions, (hd/2,), under the config's rope scaling."""
    f = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim
    f = 1.0 / c.theta**f
    kind = c.rope.get("rope_type", c.rope.get("type", "default"))
    if kind == "default":
        return f
    assert kind in ("linear", "llama3"), (
        f"rope scaling '{kind}' is not one of default, linear, llama3"
    )
    factor = c.rope["factor"]
    if kind == "linear":
        return f / factor
    turns = c.rope["original_max_position_embeddings"] * f / (2 * math.pi)  # in the old context
    low, high = c.rope["low_freq_factor"], c.rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: turns fast, left alone; 0: slowed
    return f * keep + f / factor * (1 - keep)


def rotate(x, cos, sin):
    """Hugging Face's layout: dimension i turns with dimension i + hd/2, not with its neighbour."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class KVCache:
    """Keys and values that generation has computed so far; `length` positions of each row are filled.

    A layer's tensors are allocated when it first writes, with `room` positions."""

    def __init__(self, room):
        self.room = room
        self.length = 0
        self.layers = {}

    def append(self, layer, k, v):
        """Write k and v (B,K,T,hd) behind what is there; returns all so far, (B,K,length+T,hd)."""
        if layer not in self.layers:
            B, K, _, hd = k.shape
            room = (B, K, self.room, hd)
            self.layers[layer] = (k.new_zeros(room), v.new_zeros(room))
        end = self.length + k.shape[2]
        assert end <= self.room, f"the cache holds {self.room} positions and {end} are asked for"
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class LlamaLayer(nn.Module):
    """Of LLaMA, Mistral, Qwen2 and Qwen3, which differ in their config alone."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.attn_norm = RMSNorm(c.width, c.eps)
        self.q = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        norm = RMSNorm if c.qk_norm else nn.Identity
        self.q_norm = norm(c.head_dim, c.eps)
        self.k_norm = norm(c.head_dim, c.eps)
        self.o = nn.Linear(c.heads * c.head_dim, c.width, bias=c.o_bias)
        self.mlp_norm = RMSNorm(c.width, c.eps)
        self.gate = nn.Linear(c.width, c.mlp, bias=c.mlp_bias)
        self.up = nn.Linear(c.width, c.mlp, bias=c.mlp_bias)
        self.down = nn.Linear(c.mlp, c.width, bias=c.mlp_bias)

    def forward(self, x, cos, sin, mask=None, cache=None):  # (B, T, D)
        B, T, _ = x.shape
        h = self.attn_norm(x)
        q = self.q_norm(self.q(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, hd)
        k = self.k_norm(self.k(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, hd)
        v = self.v(h).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self, k, v)
        causal = mask is None and T > 1
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )  # (B, H, T, hd)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, -1))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Tokens (B,T) or embeddings (B,T,D) -> hidden (B,T,D) after the final norm.

    Rows that are padded on the right need no mask, as no token looks to its right. Where positions do
    not simply count on (padding on the left, beams that share a prompt), the caller brings `positions`
    (B,T) and `mask` (B,1,T,length+T), True where a query may look."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        self.recompute = False  # activation checkpointing, a layer at a time
        # without the random values of nn.Embedding: init() or a file fills it
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.vocab, c.width), freeze=False)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)
        self.lm_head = None if c.tied else nn.Linear(c.width, c.vocab, bias=False)

    def forward(self, x, positions=None, mask=None, cache=None):
        if not x.is_floating_point():
            x = self.embed(x)
        T = x.shape[1]
        start = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + T, device=x.device)[None]  # (1, T)
        if mask is None and start > 0 and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        cos, sin = rotary(positions, self.config, x.dtype)
        for layer in self.layers:
            if self.recompute and x.requires_grad:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def head(self, hidden):
        """(..., D) -> logits (..., V)"""
        if self.lm_head is None:
            return F.linear(hidden, self.embed.weight)
        return self.lm_head(hidden)


# ---------------------------------------------------------------------------------------------------
# The whole

TUNE = {1: "none", 2: "qv", 3: "full"}  # what of the LLM trains in each stage
PARTS = ("vit", "adapter", "llm")  # a learning rate each


def part_of(name):
    """The part that a parameter of this name belongs to; `base.` is what a branch is added to."""
    return name.removeprefix("base.").split(".")[0]


class InfMLLM(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.vit = ViT(c.vit)
        self.adapter = ADAPTERS[c.adapter](c.vit.width, c.llm.width, c.grid, c.ln_vision)
        self.llm = Llama(c.llm)

    @property
    def text_model(self):
        """The model that answers what is asked without a picture; an IAA branch has its base for it."""
        return self

    def encode_images(self, images):
        """(N,3,S,S) -> (N,P*P,D). uint8 is normalised here; float is taken as normalised already."""
        if images.dtype == torch.uint8:
            c = self.config.vit
            normal = torch.tensor([c.pixel_mean, c.pixel_std], device=images.device)
            mean, std = normal.view(2, 3, 1, 1)
            images = (images - 255 * mean) / (255 * std)
        features = self.vit(images.to(self.vit.patch_embed.weight.dtype))  # (N, prefix+s*s, Dv)
        patches = features[:, self.config.vit.prefix :]  # (N, s*s, Dv), a view
        return self.adapter(patches)

    def embed(self, images, tokens, image_positions=None):
        """Token embeddings (B,T,D) in which the placeholders are overwritten by the images'.

        image_positions (N*P*P,): the place of each visual embedding in tokens.flatten(), -1 for
        nowhere. Without it the placeholders are looked for, which waits for the device.
        """
        B, T = tokens.shape
        cells = self.config.visual_tokens
        flat = tokens.flatten()
        if image_positions is None:
            image_positions = (flat == IMAGE).nonzero()[:, 0]
            if len(images) == 0:  # a blank one that goes nowhere: the same graph on every rank
                images = images.new_zeros(1, *images.shape[1:])
                image_positions = image_positions.new_full((cells,), -1)
        assert len(image_positions) == len(images) * cells, (
            f"{len(images)} images need {len(images) * cells} placeholders ({cells} each), "
            f"and the text has {len(image_positions)}"
        )
        visual = self.encode_images(images).flatten(0, 1)  # (N*P*P, D)
        flat = F.pad(flat, (0, 1))  # one place more, for embeddings that go nowhere
        x = self.llm.embed(flat.clamp(min=0))  # (B*T+1, D)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        places = torch.where(image_positions < 0, B * T, image_positions)
        x = x.index_copy(0, places, visual.to(x.dtype))
        return x[:-1].view(B, T, -1)

    def forward(self, images, tokens, targets=None, image_positions=None, target_positions=None):
        """The cross-entropy summed over targets != IGNORE, in fp32; logits (B,T,V) without targets.

        targets[b,t] is what should follow tokens[b,t]. target_positions (M,): the places in
        targets.flatten() that are supervised, -1 for padding. Without it they are looked for, which
        waits for the device.
        """
        x = self.embed(images, tokens, image_positions)  # (B, T, D)
        hidden = self.llm(x)  # (B, T, D)
        if targets is None:
            return self.llm.head(hidden)
        targets = targets.flatten()
        if target_positions is None:
            target_positions = (targets != IGNORE).nonzero()[:, 0]
        places = target_positions.clamp(min=0)
        supervised = torch.where(target_positions < 0, IGNORE, targets[places])  # (M,)
        return self.summed_loss(hidden.flatten(0, 1)[places], supervised)

    def summed_loss(self, hidden, targets):
        """Cross-entropy of hidden (M,D) against targets (M,), summed.

        The logits of a 7B model's batch would be its largest tensor. They are made in chunks of rows,
        and made again in the backward pass, so that one chunk at a time is in memory.
        """
        rows = max(1, LOGITS // self.config.llm.vocab)
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for h, t in zip(hidden.split(rows), targets.split(rows)):
            loss = loss + checkpoint(self.chunk_loss, h, t, use_reentrant=False)
        return loss

    def chunk_loss(self, hidden, targets):
        logits = self.llm.head(hidden)  # (m, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    def freeze(self, stage, tune=None):
        """Let exactly the parts train that InfMLLM trains in this stage (paper, section 3.2).

        The adapter trains in every stage, the ViT in stage 2, and of the LLM what `tune` says: none,
        qv, full, or the stage's own. A swapped module trains like the one it replaces; what of it
        must stay as it is says so by `module.frozen = True`.
        """
        assert stage in TUNE, f"stage is 1, 2 or 3, not {stage!r}"
        self.requires_grad_(False)
        for module in self.trained_modules(stage, tune or TUNE[stage]):
            module.requires_grad_(True)
        for module in self.modules():
            if getattr(module, "frozen", False):
                module.requires_grad_(False)
        return self

    def trained_modules(self, stage, tune):
        modules = [self.adapter]
        if stage == 2:
            modules.append(self.vit)
        if tune == "full":
            modules.append(self.llm)
        if tune == "qv":
            modules += [m for layer in self.llm.layers for m in (layer.q, layer.v)]
        return modules

    def resize(self, image_size, grid=None):
        """Take images of another size; as many visual tokens, unless nothing is pooled or `grid` says."""
        self.vit.resize(image_size)
        self.config = replace(self.config, vit=self.vit.config, grid=grid or self.config.grid)
        self.adapter.grid = self.config.grid
        return self


@torch.no_grad()
def init(model, seed=0):
    """Random weights for a model or any part of it, the same for the same seed.

    matrices, convolutions, embeddings          normal, 0.02
    the matrix that ends a residual branch      normal, 0.02 / sqrt(2 * layers)
    positions, cls, queries                     normal, 0.02
    biases 0, norm weights 1
    """
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        leaf = name.split(".")[-1]
        if p.ndim > 1 or leaf == "cls":
            p.copy_(torch.randn(p.shape, generator=rng) * 0.02)
        else:
            p.fill_(1.0 if leaf == "weight" else 0.0)
    for kind, ends in ((ViTBlock, ("proj", "fc2")), (LlamaLayer, ("o", "down"))):
        layers = [module for module in model.modules() if isinstance(module, kind)]
        for layer in layers:
            for end in ends:
                getattr(layer, end).weight.div_(math.sqrt(2 * len(layers)))
    return model


# ---------------------------------------------------------------------------------------------------
# What others ask of a model


def every_layer(model):
    """All blocks and layers: what is compiled and sharded one by one."""
    return [m for m in model.modules() if isinstance(m, (ViTBlock, LlamaLayer))]


def count(module):
    return sum(p.numel() for p in module.parameters())


def main():
    from support.plan import flops  # which knows this module

    text, supervised = 64, 16
    print(
        f"{'preset':<13}{'ViT':>9}{'adapter':>9}{'LLM':>9}{'total':>9}   image  patches  visual tokens"
        "   forward   GFLOPs: ViT + adapter + LLM + head"
    )
    for name, make in PRESETS.items():
        c = make()
        with torch.device("meta"):
            model = InfMLLM(c)
        parts = (model.vit, model.adapter, model.llm, model)
        sizes = "".join(f"{count(part) / 1e6:>8.1f}M" for part in parts)
        cost = [x / 1e9 for x in flops(c, text, supervised).values()]
        print(
            f"{name:<13}{sizes}{c.vit.image_size:>8}{c.vit.side:>6}x{c.vit.side:<3}"
            f"{c.visual_tokens:>12}{sum(cost):>12.1f}   " + " + ".join(f"{x:.1f}" for x in cost)
        )
    print(
        f"forward: one image, {text} text tokens, {supervised} of them supervised; "
        "a multiply-add counts as two"
    )


if __name__ == "__main__":
    main()
