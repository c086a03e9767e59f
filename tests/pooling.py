"""Pooling by its definition, and inputs of every shape, dtype and layout in memory to hold it against."""

import torch
from torch.nn import functional as F

SHAPES = [(5, 5, 6), (4, 2, 33), (6, 2, 12), (6, 3, 1)]  # s, P, D
KINDS = [  # dtype, and how many of weight and bias there are
    (torch.float32, 2),
    (torch.float32, 0),
    (torch.bfloat16, 2),
    (torch.float16, 1),
]
STEP = {  # one rounding
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


def definition(x, weight, bias, P):
    """In float64: normalise every patch, then take the mean of each window."""
    s = int(x.shape[1] ** 0.5)
    x = x.double()
    if weight is not None:
        bias = None if bias is None else bias.double()
        x = F.layer_norm(x, x.shape[-1:], weight.double(), bias)
    square = x.unflatten(1, (s, s)).movedim(-1, 1)
    return F.adaptive_avg_pool2d(square, P).flatten(2).mT


def make(s, P, D, dtype=torch.float32, affine=2, N=2, device="cpu"):
    """What a ViT returns, CLS in front; weight and bias; the gradient of the output. Strides of every kind."""
    torch.manual_seed(D)
    x = 2 * torch.randn(N, 1 + s * s, D, dtype=dtype, device=device) + 1
    dy = torch.randn(N, P * P, D, dtype=dtype, device=device)
    if D % 2:
        dy = dy.mT.contiguous().mT
    else:
        x, dy = x.mT.contiguous().mT, dy[:1, :1].expand(N, P * P, D)
    weight, bias = torch.randn(2, D, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return x, weight if affine else None, bias if affine > 1 else None, dy


def run(function, inputs, dy, P):
    """Output of `function` on the patches, and the gradients of all inputs that there are."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, weight, bias = inputs
    y = function(x[:, 1:], weight, bias, P)
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy.to(y.dtype))


def check(function, *shape, dtype=torch.float32, **how):
    """Output and every gradient of `function`, where all memory it may leave unwritten is NaN."""
    *inputs, dy = make(*shape, dtype, **how)
    want = run(definition, inputs, dy, shape[1])
    torch.use_deterministic_algorithms(True)  # which fills every empty tensor with NaN
    try:
        got = run(function, inputs, dy, shape[1])
    finally:
        torch.use_deterministic_algorithms(False)
    wide = torch.promote_types(dtype, torch.float32)
    for g, w, kind in zip(got, want, (dtype, dtype, wide, wide)):
        assert g.dtype == kind
        torch.testing.assert_close(g.double(), w.double(), rtol=STEP[kind], atol=STEP[kind])
    assert (got[1][:, 0] == 0).all(), "CLS is not in the view: its gradient is zero"
