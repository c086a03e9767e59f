"""The fused LayerNorm and window mean. On a GPU the kernel, in bf16; on a CPU its reference, in fp32."""

from functools import partial

import torch
from torch.nn import functional as F

import adapter
from tools.measure import Table, copy_bandwidth, typical

# N, s, P, D
ON_CPU = [
    (64, 8, 4, 128),
    (64, 8, 8, 128),
    (8, 24, 8, 1024),
    (8, 24, 12, 1024),
    (8, 24, 24, 1024),
    (2, 32, 16, 1408),
]
EVA = [(16, 8, 1408), (16, 16, 1408), (32, 8, 1408), (32, 16, 1408), (32, 32, 1408)]
CLIP = [(24, 8, 1024), (24, 12, 1024), (24, 24, 1024)]
ON_GPU = [(N, *tower) for tower in EVA + CLIP for N in (16, 256)]


def eager(x, weight, bias, grid, eps=1e-5):
    """What one writes first: LayerNorm, bring each window's patches together (a copy), mean over them."""
    N, patches, D = x.shape
    P, w = grid, adapter.side(patches) // grid
    y = F.layer_norm(x, (D,), weight.to(x.dtype), bias.to(x.dtype), eps)
    y = y.view(N, P, w, P, w, D).transpose(2, 3).flatten(3, 4)  # (N, P, P, w*w, D)
    return y.mean(3).flatten(1, 2)


def least_bytes(N, s, P, D, width, backward):
    """What must move: x in, y out; for a gradient also x and dy in, dx out, and mean and rstd (fp32) out and in."""
    forward = width * N * D * (s * s + P * P)
    if not backward:
        return forward
    return 2 * forward + width * N * D * s * s + 16 * N * s * s


def times(functions, N, s, P, D, dtype, device):
    """Of forward and of forward + backward: {name: seconds}, all on the same contiguous patches."""
    x = torch.randn(N, s * s, D, device=device, dtype=dtype, requires_grad=True)
    weight = torch.rand(D, device=device, requires_grad=True)
    bias = torch.rand(D, device=device, requires_grad=True)
    dy = torch.randn(N, P * P, D, device=device, dtype=dtype)

    def forward(f):
        with torch.no_grad():
            f(x, weight, bias, P)

    def both(f):
        torch.autograd.grad(f(x, weight, bias, P), (x, weight, bias), dy)

    def clock(run):
        if device == "cpu":
            return typical(run, repeat=15, warmup=2)
        from triton.testing import do_bench  # device events; the L2 cache is flushed between runs

        return do_bench(run, return_mode="median") / 1e3

    return [
        {name: clock(partial(run, f)) for name, f in functions.items()} for run in (forward, both)
    ]


def pool(args):
    if args.device == "cuda":
        import pool_triton

        torch._dynamo.config.recompile_limit = 256  # one graph a shape
        compiled = torch.compile(adapter.pool_reference, dynamic=False)
        functions = {"eager": eager, "compiled": compiled, "ours": pool_triton.pool}
        dtype, shapes = torch.bfloat16, ON_GPU
    else:
        functions = {"eager": eager, "ours": adapter.pool_reference}
        dtype, shapes = torch.float32, ON_CPU
    copy = copy_bandwidth(args.device)
    print(f"a copy on this device: {copy / 1e9:.0f} GB/s, read + write. {least_bytes.__doc__}")
    milliseconds = [f"{name} ms" for name in functions]
    table = Table("N", "s", "P", "D", "pass", "GB", "GB/s", "of copy", *milliseconds)
    for shape in shapes:
        for backward, took in enumerate(times(functions, *shape, dtype, args.device)):
            size = least_bytes(*shape, dtype.itemsize, backward)
            rate = size / took["ours"]
            name = "fwd + bwd" if backward else "forward"
            ms = [1e3 * t for t in took.values()]
            table.add(*shape, name, size / 1e9, rate / 1e9, rate / copy, *ms)
    return {"dtype": str(dtype), "copy GB/s": copy / 1e9, "rows": table.rows}
