"""The pool-adapter's LayerNorm and window mean in one pass over the ViT's output, forward and backward.

    y[n, (i, j)] = mean over the patches p of window (i, j) of (x[n, p] - mean_p) * rstd_p * weight + bias

Eager PyTorch reads and writes (N, s*s, D) for the LayerNorm and reads it again for the mean. Here a program owns ROWS
windows: it loads one patch of each, takes its statistics while the row lies in registers, adds it to the window's fp32
sum, and writes the window once. x may be a view of any strides, so that CLS is dropped without a copy.

Bytes through memory (b the size of a number); a few operations a byte, so these bytes are the floor of the time:
    forward     b*N*s*s*D + b*N*P*P*D            x in, y out            + 8*N*s*s, mean and rstd, if a gradient follows
    backward    2b*N*s*s*D + b*N*P*P*D           x in, dx out, dy in    + 8*N*s*s
    x frozen    b*N*s*s*D + b*N*P*P*D            x in, dy in: dx is neither computed nor written

A window is K x K patches: P divides s. Where it does not, windows overlap as in adaptive average pooling, and adapter.py
takes the reference. A patch lies in one window, so nothing is scattered and no atomics are needed; the weight's gradient
is summed per program, then over programs, in a fixed order: every run gives the same bits.

Names of dimensions: N images, s patches per side, P windows per side, D the ViT's width. An absent input or output is a
null pointer, and the code that it would need is not compiled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter import side

# TRITON_INTERPRET=1: the kernels run in numpy, on CPU tensors
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def forward_kernel(
    x_ptr,  # (N, s*s, D), any strides
    w_ptr,  # (D,); null: no LayerNorm
    b_ptr,  # (D,); null: no bias
    y_ptr,  # (N, P*P, D), contiguous
    mean_ptr,  # (N, s*s); null: no backward will follow
    rstd_ptr,  # (N, s*s); null as mean_ptr
    xn,  # the three strides of x
    xt,
    xd,
    windows,  # N*P*P
    eps,
    s: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    K: tl.constexpr = s // P  # patches along the side of a window
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    live = window < windows
    n = (window // (P * P)).to(tl.int64)
    top = window // P % P * K
    left = window % P * K
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = col < D
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    # with STAGES > 1 the next patch loads while this one is added
    for k in tl.range(0, K * K, num_stages=STAGES):
        patch = ((top + k // K) * s + left + k % K).to(tl.int64)
        row = x_ptr + (n * xn + patch * xt)[:, None]
        x = tl.load(row + col * xd, live[:, None] & inside, other=0.0).to(tl.float32)
        if w_ptr is not None:
            mean = tl.sum(x, 1) / D
            # centred before it is squared: E[x*x] - E[x]**2 would cancel
            x = tl.where(inside, x - mean[:, None], 0.0)
            rstd = tl.where(live, tl.rsqrt(tl.sum(x * x, 1) / D + eps), 0.0)
            x *= rstd[:, None]
            if mean_ptr is not None:
                tl.store(mean_ptr + n * s * s + patch, mean, live)
                tl.store(rstd_ptr + n * s * s + patch, rstd, live)
        total += x
    y = total * (1.0 / (K * K))
    # the mean is affine in the patches: weight and bias once a window, not once a patch
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + col, inside, other=0.0).to(tl.float32)
    y_row = y_ptr + window.to(tl.int64)[:, None] * D
    tl.store(y_row + col, y, live[:, None] & inside)


@triton.jit
def backward_kernel(
    dy_ptr,  # (N, P*P, D), any strides
    x_ptr,  # (N, s*s, D), any strides; null: not needed
    w_ptr,  # (D,); null: no LayerNorm
    mean_ptr,  # (N, s*s); null as x_ptr
    rstd_ptr,
    dx_ptr,  # (N, s*s, D), contiguous; null: not wanted
    dw_ptr,  # (programs, D), the sum of each program; null: not wanted
    db_ptr,  # (programs, D), as dw_ptr
    yn,  # the three strides of dy
    yt,
    yd,
    xn,  # the three strides of x
    xt,
    xd,
    tiles,  # N*s*s // ROWS
    s: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    K: tl.constexpr = s // P
    TILES: tl.constexpr = K * K // ROWS  # of a window
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = col < D
    if w_ptr is not None:
        w = tl.load(w_ptr + col, inside, other=0.0).to(tl.float32)
    dw = tl.zeros((1, BLOCK), tl.float32)
    db = tl.zeros((1, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        window = tile // TILES
        n = (window // (P * P)).to(tl.int64)
        i = window // P % P
        j = window % P
        # the gradient with respect to any affine patch of this window
        row = dy_ptr + n * yn + (i * P + j).to(tl.int64) * yt
        g = tl.load(row + col * yd, inside, other=0.0).to(tl.float32) * (1.0 / (K * K))
        if db_ptr is not None:
            db += g
        k = tile % TILES * ROWS + tl.arange(0, ROWS)  # (ROWS,) within the window
        patch = ((i * K + k // K) * s + j * K + k % K).to(tl.int64)
        dx = tl.broadcast_to(g, (ROWS, BLOCK))
        if x_ptr is not None:
            row = x_ptr + n * xn + patch[:, None] * xt
            x = tl.load(row + col * xd, inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + n * s * s + patch)[:, None]
            rstd = tl.load(rstd_ptr + n * s * s + patch)[:, None]
            x = (x - mean) * rstd  # normalised; past D not zero, but there g is
            if dw_ptr is not None:
                dw += g * tl.sum(x, 0)[None, :]
            h = g * w
            dx = (h - (tl.sum(h, 1) / D)[:, None] - x * (tl.sum(h * x, 1) / D)[:, None]) * rstd
        if dx_ptr is not None:
            tl.store(dx_ptr + (n * s * s + patch)[:, None] * D + col, dx, inside)
    sums = tl.program_id(0) * D + col
    if dw_ptr is not None:
        tl.store(dw_ptr + sums, dw, inside)
    if db_ptr is not None:
        tl.store(db_ptr + sums, db * ROWS, inside)


def processors(device):
    """Streaming multiprocessors; two for the interpreter, so that its programs loop as a GPU's do."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tiling(D):
    """A row of D takes BLOCK lanes, 16 a thread: two 16-byte loads of bf16, and room for every array in
    128 registers. D = 1408 leaves the lanes 1408..2047 idle: they cost registers, but no bytes."""
    block = triton.next_power_of_2(D)
    stages = 3 if block <= 8192 else 1
    return dict(D=D, BLOCK=block, STAGES=stages, num_warps=min(16, max(1, block // 512)))


def forward_rows(windows, device):
    """Windows of a program. Where there are few: rather more programs than larger ones."""
    return 2 if windows >= 8 * processors(device) else 1


def backward_rows(K):
    """Patches of a window that are taken at once."""
    return 2 if K % 2 == 0 else 1


# Two operators: torch.compile and the autograd engine see names, shapes and gradients, and nothing inside.
# Each stands under the function that says what it returns. An output cannot be optional: what is not wanted
# comes back empty.


def forward_outputs(x, weight, bias, grid, eps, keep_stats):
    """y (N, P*P, D) in x's dtype, mean and rstd (N, s*s) in fp32, or (0, s*s) where they are not kept."""
    N, patches, D = x.shape
    y = x.new_empty(N, grid * grid, D)
    kept = N if keep_stats and weight is not None else 0
    mean = x.new_empty(kept, patches, dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


@torch.library.custom_op("infmllm::pool", mutates_args=())
def pool_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grid: int, eps: float, keep_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = forward_outputs(x, weight, bias, grid, eps, keep_stats)
    N, patches, D = x.shape
    windows = N * grid * grid
    if windows == 0:
        return y, mean, rstd
    rows = forward_rows(windows, x.device)
    with torch.cuda.device_of(x):
        forward_kernel[triton.cdiv(windows, rows),](
            x,
            weight,
            bias,
            y,
            mean if len(mean) else None,
            rstd if len(mean) else None,
            *x.stride(),
            windows,
            eps,
            s=side(patches),
            P=grid,
            ROWS=rows,
            **tiling(D),
        )
    return y, mean, rstd


def backward_outputs(dy, x, weight, mean, rstd, want_x, want_weight, want_bias):
    """dx (N, s*s, D) in dy's dtype, dweight and dbias (D,) in fp32."""
    N, _, D = dy.shape
    dx = dy.new_empty(N if want_x else 0, mean.shape[1], D)
    dw = dy.new_empty(D if want_weight else 0, dtype=torch.float32)
    db = dy.new_empty(D if want_bias else 0, dtype=torch.float32)
    return dx, dw, db


@torch.library.custom_op("infmllm::pool_backward", mutates_args=())
def pool_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (want_x, want_weight, want_bias)
    dx, dw, db = backward_outputs(dy, x, weight, mean, rstd, *wanted)
    N, windows, D = dy.shape
    s, P = side(mean.shape[1]), side(windows)
    rows = backward_rows(s // P)
    tiles = N * s * s // rows
    if tiles == 0:
        return dx, dw.zero_(), db.zero_()
    shape = tiling(D)
    # as many as fit at once, with 128 registers a thread
    programs = min(tiles, processors(dy.device) * (16 // shape["num_warps"]))
    dw = dw.new_empty(programs, len(dw))
    db = db.new_empty(programs, len(db))
    if weight is None or not (want_x or want_weight):
        x = mean = rstd = None
    strides = (0, 0, 0) if x is None else x.stride()
    with torch.cuda.device_of(dy):
        backward_kernel[programs,](
            dy,
            x,
            weight,
            mean,
            rstd,
            dx if want_x else None,
            dw if want_weight else None,
            db if want_bias else None,
            *dy.stride(),
            *strides,
            tiles,
            s=s,
            P=P,
            ROWS=rows,
            maxnreg=128,
            **shape,
        )
    return dx, dw.sum(0), db.sum(0)


def setup_context(ctx, inputs, output):
    x, weight, bias, grid, eps, keep_stats = inputs
    y, mean, rstd = output
    assert keep_stats, "pool_forward(keep_stats=False) has no gradient; call pool"
    ctx.mark_non_differentiable(mean, rstd)
    if weight is None:
        x = None  # a plain mean is linear: its gradient needs no input
    ctx.save_for_backward(x, weight, mean, rstd)


def backward(ctx, dy, *_):
    wanted = ctx.needs_input_grad[:3]
    grads = pool_backward(dy, *ctx.saved_tensors, *wanted)
    dx, dw, db = (grad if want else None for grad, want in zip(grads, wanted))
    return dx, dw, db, None, None, None


pool_forward.register_fake(forward_outputs)
pool_backward.register_fake(backward_outputs)
pool_forward.register_autograd(backward, setup_context=setup_context)


def pool(x, weight, bias, grid, eps=1e-5):
    """(N, s*s, D) to (N, P*P, D) in x's dtype: LayerNorm (none if weight is None), then window means."""
    assert x.is_cuda or INTERPRETED, (
        "the pooling kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported"
    )
    assert x.dtype in (torch.float32, torch.bfloat16, torch.float16), (
        f"the pooling kernel cannot compute in {x.dtype}"
    )
    assert bias is None or weight is not None, "a bias without a weight: LayerNorm or none"
    assert side(x.shape[1]) % grid == 0, f"{grid} windows do not divide {side(x.shape[1])} patches"
    inputs = [t for t in (x, weight, bias) if t is not None]
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, _, _ = pool_forward(x, weight, bias, grid, eps, trains)
    return y
