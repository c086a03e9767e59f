"""The pool-adapter's LayerNorm and window mean in one pass over the ViT's output, forward and backward.

    y[n, (i, j)] = mean over the patches p of window (i, j) of (x[n, p] - mean_p) * rstd_p * weight + bias

Eager PyTorch reads and writes (N, s*s, D) for the LayerNorm, again for the copy that drops CLS, and reads it for the
mean. Here a program owns ROWS windows: it loads one patch of each, takes its statistics while the row lies in
registers, adds it to the window's fp32 sum, and writes the window once. CLS is never read: dropping it is an offset.

Bytes through memory (b the size of a number); a few operations a byte, so these bytes are the floor of the time:
    forward     b*N*s*s*D + b*N*P*P*D            x in, y out            + 8*N*s*s, mean and rstd, if a gradient follows
    backward    2b*N*s*s*D + b*N*P*P*D           x in, dx out, dy in    + 8*N*s*s
    x frozen    b*N*s*s*D + b*N*P*P*D            x in, dy in: dx is neither computed nor written

Window i covers the rows floor(i*s/P) .. ceil((i+1)*s/P), as adaptive_avg_pool2d does, so windows overlap where P does
not divide s. A patch then gathers its gradient from every window that covers it, and those are the windows
floor(r*P/s) .. ceil((r+1)*P/s): the same line with s and P exchanged. So nothing is scattered, no atomics are needed,
and the weight's gradient is summed per program, then over programs, in a fixed order: every run gives the same bits.

Names of dimensions: N images, s patches per side, P windows per side, D the ViT's width. An absent input or output is a
null pointer, and the code that it would need is not compiled.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = (
    triton.knobs.runtime.interpret
)  # TRITON_INTERPRET=1: the kernels run in numpy, on CPU tensors


@triton.jit
def forward_kernel(
    x_ptr,  # (N, 1+s*s, D), any strides
    w_ptr,
    b_ptr,  # (D,); null: no LayerNorm, no bias
    y_ptr,  # (N, P*P, D), contiguous
    mean_ptr,
    rstd_ptr,  # (N, s*s); null: no backward will follow
    xn,
    xt,
    xd,  # strides of x
    windows,
    eps,  # N*P*P
    s: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,  # patches along the side of the largest window
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    n, i, j = (window // (P * P)).to(tl.int64), window // P % P, window % P
    top, bottom = i * s // P, ((i + 1) * s + P - 1) // P
    left, right = j * s // P, ((j + 1) * s + P - 1) // P
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = col < D
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(
        0, K * K, num_stages=STAGES
    ):  # STAGES: the next patch loads while this one adds
        r, c = top + k // K, left + k % K
        live = (window < windows) & (r < bottom) & (c < right)  # ragged windows end early
        patch = (r * s + c).to(tl.int64)
        x = tl.load(
            x_ptr + (n * xn + (1 + patch) * xt)[:, None] + col * xd,
            live[:, None] & inside,
            other=0.0,
        )
        x = x.to(tl.float32)
        if w_ptr is not None:
            mean = tl.sum(x, 1) / D
            x = tl.where(inside, x - mean[:, None], 0.0)  # centred before squaring: no cancellation
            rstd = tl.where(live, tl.rsqrt(tl.sum(x * x, 1) / D + eps), 0.0)
            x *= rstd[:, None]
            if mean_ptr is not None:  # where windows overlap, both write the same bits
                tl.store(mean_ptr + n * s * s + patch, mean, live)
                tl.store(rstd_ptr + n * s * s + patch, rstd, live)
        total += x
    y = total * (1.0 / ((bottom - top) * (right - left)))[:, None]
    # the mean of affine images is the affine image of the mean: weight and bias once a window, not once a patch
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + col, inside, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + window.to(tl.int64)[:, None] * D + col, y, (window < windows)[:, None] & inside
    )


@triton.jit
def backward_kernel(
    dy_ptr,  # (N, P*P, D), any strides
    x_ptr,  # (N, 1+s*s, D), any strides; null: not needed
    w_ptr,  # (D,); null: no LayerNorm
    mean_ptr,
    rstd_ptr,  # (N, s*s); null as x
    dx_ptr,  # (N, 1+s*s, D), contiguous; null: not wanted
    dw_ptr,
    db_ptr,  # (programs, D), the sums of each program; null: not wanted
    yn,
    yt,
    yd,
    xn,
    xt,
    xd,  # strides of dy and x
    tiles,  # N*G*G * K*K//ROWS
    s: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,  # groups per side: a group is K*K patches under the same windows, with the same gradient
    V: tl.constexpr,  # windows over a group per side, at most
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    K: tl.constexpr = s // G
    PARTS: tl.constexpr = K * K // ROWS  # tiles of a group
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = col < D
    if w_ptr is not None:
        w = tl.load(w_ptr + col, inside, other=0.0).to(tl.float32)
    if dw_ptr is not None:
        dw = tl.zeros((1, BLOCK), tl.float32)
    if db_ptr is not None:
        db = tl.zeros((1, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        group = tile // PARTS
        n, top, left = (group // (G * G)).to(tl.int64), group // G % G * K, group % G * K
        g = tl.zeros((1, BLOCK), tl.float32)  # d loss / d any affine patch of this group
        for v in tl.static_range(V * V):
            i, j = top * P // s + v // V, left * P // s + v % V
            over = (i * s < (top + 1) * P) & (j * s < (left + 1) * P)
            size = (((i + 1) * s + P - 1) // P - i * s // P) * (
                ((j + 1) * s + P - 1) // P - j * s // P
            )
            row = n * yn + (i * P + j).to(tl.int64) * yt
            dy = tl.load(dy_ptr + row + col * yd, col < tl.where(over, D, 0), other=0.0)
            g += dy.to(tl.float32) * (1.0 / size)
        if db_ptr is not None:
            db += g
        k = tile % PARTS * ROWS + tl.arange(0, ROWS)  # (ROWS,) within the group
        patch = ((top + k // K) * s + left + k % K).to(tl.int64)
        dx = tl.broadcast_to(g, (ROWS, BLOCK))
        if x_ptr is not None:
            x = tl.load(
                x_ptr + n * xn + (1 + patch)[:, None] * xt + col * xd, inside, other=0.0
            ).to(tl.float32)
            mean, rstd = (
                tl.load(mean_ptr + n * s * s + patch)[:, None],
                tl.load(rstd_ptr + n * s * s + patch)[:, None],
            )
            x = (x - mean) * rstd  # normalised; past D not zero, but there g is
            if dw_ptr is not None:
                dw += g * tl.sum(x, 0)[None, :]
            h = g * w
            dx = (h - (tl.sum(h, 1) / D)[:, None] - x * (tl.sum(h * x, 1) / D)[:, None]) * rstd
        if dx_ptr is not None:
            image = dx_ptr + n * (1 + s * s) * D
            tl.store(image + (1 + patch)[:, None] * D + col, dx, inside)
            first = (
                tile % (G * G * PARTS) == 0
            )  # an image's first tile zeroes CLS, which had no part
            tl.store(image + col, tl.zeros_like(g), col < tl.where(first, D, 0))
    out = tl.program_id(0) * D + col
    if dw_ptr is not None:
        tl.store(dw_ptr + out, dw, inside)
    if db_ptr is not None:
        tl.store(db_ptr + out, db * ROWS, inside)


@cache
def processors(device):
    """Streaming multiprocessors; two for the interpreter, so that its programs loop as a GPU's do."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )


def tiling(D):
    """A row of D takes BLOCK lanes, 16 a thread: two 16-byte loads of bf16, and room for every array in 128 registers.
    D = 1408 leaves the lanes 1408..2047 idle: they cost registers, but no bytes."""
    block = triton.next_power_of_2(D)
    return dict(
        D=D, BLOCK=block, STAGES=3 if block <= 8192 else 1, num_warps=min(16, max(1, block // 512))
    )


def pointers(*tensors):
    assert all(t is None or t.is_cuda or INTERPRETED for t in tensors), (
        "the pooling kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported"
    )
    return tensors


def side(patches):
    s = round(patches**0.5)
    assert s * s == patches, f"{patches} patches do not form a square; the first token must be CLS"
    return s


def reach(s, P):
    """The most patches along one side of a window; with s and P exchanged, the most windows over one patch."""
    return max(-(-(i + 1) * s // P) - i * s // P for i in range(P))


# The two operators: torch.compile and the autograd engine see their names, shapes and gradients, and nothing inside.
# An operator's outputs cannot be optional, so what was not wanted comes back empty.
@torch.library.custom_op("infmllm::pool", mutates_args=())
def pool_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grid: int, eps: float, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 1+s*s, D) -> y (N, P*P, D), mean and rstd (N, s*s) in fp32, both empty unless `stats` and LayerNorm."""
    (N, tokens, D), P = x.shape, grid
    s, stats = side(tokens - 1), stats and weight is not None
    y = x.new_empty(N, P * P, D)
    mean, rstd = (x.new_empty(N if stats else 0, s * s, dtype=torch.float32) for _ in range(2))
    if y.numel():
        rows = (
            2 if N * P * P >= 8 * processors(x.device) else 1
        )  # few windows: rather more programs than larger ones
        with torch.cuda.device_of(x):
            forward_kernel[triton.cdiv(N * P * P, rows),](
                *pointers(x, weight, bias, y),
                *((mean, rstd) if stats else (None, None)),
                *x.stride(),
                N * P * P,
                eps,
                s=s,
                P=P,
                K=reach(s, P),
                ROWS=rows,
                **tiling(D),
            )
    return y, mean, rstd


@pool_forward.register_fake
def _(x, weight, bias, grid, eps, stats):
    N, tokens, D = x.shape
    stats = stats and weight is not None
    mean, rstd = (x.new_empty(N if stats else 0, tokens - 1, dtype=torch.float32) for _ in range(2))
    return x.new_empty(N, grid * grid, D), mean, rstd


@torch.library.custom_op("infmllm::pool_backward", mutates_args=())
def pool_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    tokens: int,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (N, P*P, D) -> dx (N, 1+s*s, D), dweight and dbias (D,) in fp32; empty what is not wanted."""
    (N, windows, D), s = dy.shape, side(tokens - 1)
    P = side(windows)
    G = P if s % P == 0 else s  # where windows overlap, every patch has a gradient of its own
    rows = 2 if s // G % 2 == 0 else 1
    shape, tiles = tiling(D), N * s * s // rows
    programs = min(
        tiles, processors(dy.device) * (16 // shape["num_warps"])
    )  # all that 128 registers let in
    dx = dy.new_empty(N if want_x else 0, tokens, D)
    dw, db = (
        dy.new_empty(programs, D if want else 0, dtype=torch.float32)
        for want in (want_weight, want_bias)
    )
    if programs and D:
        if not (weight is not None and (want_x or want_weight)):
            x = mean = rstd = None
        with torch.cuda.device_of(dy):
            backward_kernel[programs,](
                *pointers(dy, x, weight, mean, rstd),
                *(
                    t if want else None
                    for t, want in ((dx, want_x), (dw, want_weight), (db, want_bias))
                ),
                *dy.stride(),
                *(x.stride() if x is not None else (0, 0, 0)),
                tiles,
                s=s,
                P=P,
                G=G,
                V=reach(P, s),
                ROWS=rows,
                maxnreg=128,
                **shape,
            )
    return dx, dw.sum(0), db.sum(0)


@pool_backward.register_fake
def _(dy, x, weight, mean, rstd, tokens, want_x, want_weight, want_bias):
    N, _, D = dy.shape
    dw, db = (
        dy.new_empty(D if want else 0, dtype=torch.float32) for want in (want_weight, want_bias)
    )
    return dy.new_empty(N if want_x else 0, tokens, D), dw, db


def keep(ctx, inputs, output):
    x, weight, bias, _, _, stats = inputs
    _, mean, rstd = output
    ctx.tokens, ctx.norm, ctx.stats = x.shape[1], weight is not None, stats
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(
        *((x, weight, mean, rstd) if ctx.norm else (mean, rstd))
    )  # a plain mean needs no input


def backward(ctx, dy, *_):
    x, weight, mean, rstd = ctx.saved_tensors if ctx.norm else (None, None, *ctx.saved_tensors)
    want = ctx.needs_input_grad[:3]
    assert ctx.stats or not ctx.norm, "pool_forward(stats=False) has no gradient; call pool"
    grads = pool_backward(dy, x, weight, mean, rstd, ctx.tokens, *want)
    dtypes = (dy.dtype, *ctx.dtypes)
    return *(g.to(t) if w else None for g, w, t in zip(grads, want, dtypes)), None, None, None


pool_forward.register_autograd(backward, setup_context=keep)


def pool(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grid: int, eps: float = 1e-5
) -> Tensor:
    """(N, 1+s*s, D), CLS first, to (N, P*P, D) in x's dtype: LayerNorm (none if weight is None), then window means."""
    assert x.dtype in (torch.float32, torch.bfloat16, torch.float16), (
        f"the pooling kernel cannot compute in {x.dtype}"
    )
    assert bias is None or weight is not None, "a bias without a weight: LayerNorm or none"
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    return pool_forward(x, weight, bias, grid, eps, grad)[0]
