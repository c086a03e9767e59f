"""The pooling kernel (in Triton's interpreter) and its reference against float64 loops that share no line with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapter
import pool_triton

SHAPES = [
    (1, 1, 5),
    (2, 1, 8),
    (2, 2, 16),
    (3, 2, 7),
    (4, 2, 33),
    (6, 2, 12),
    (6, 3, 1),
    (4, 3, 12),
    (5, 3, 1),
    (2, 3, 6),
]  # s, P, D; the last three overlap
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    (*shape, dtype, affine) for shape in SHAPES for dtype in DTYPES for affine in (False, True)
]
STEP = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # one rounding
interpreted = pytest.mark.skipif(
    not pool_triton.INTERPRETED, reason="a GPU is here: test_pool_cuda.py runs the kernel"
)


def loops(x, weight, bias, P, eps=1e-5):
    """The definition in float64: normalise every patch, then take each window's mean, one window at a time."""
    x = x.double()
    s = int(x.shape[1] ** 0.5)
    if weight is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        if bias is not None:
            x = x + bias.double()
    x = x.reshape(-1, s, s, x.shape[-1])
    edge = [(i * s // P, -(-(i + 1) * s // P)) for i in range(P)]
    return torch.stack([x[:, a:b, c:d].mean((1, 2)) for a, b in edge for c, d in edge], 1)


def layout(t, kind):
    """The same numbers (N, T, D) elsewhere: as they are, inside a larger tensor, or with D not the last in memory."""
    if kind == 0:
        return t.clone()
    if kind == 1:
        wide = t.new_full((2 * t.shape[0], t.shape[1] + 3, t.shape[2] + 2), float("nan"))
        return wide[::2, 2:-1, 1:-1].copy_(t)
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def make(s, P, D, dtype, affine, device="cpu", N=None, bias=True):
    N = N or (2 if s < 5 else 1)  # the interpreter is slow
    seed = torch.Generator().manual_seed(1000 * s + 100 * P + D)
    draw = lambda *size: torch.randn(*size, generator=seed).to(device)
    kind = (s + P + D + DTYPES.index(dtype) + affine) % 3  # every layout meets every dtype
    x = layout((2 * draw(N, 1 + s * s, D) + 1).to(dtype), kind)
    dy = (
        layout(draw(N, P * P, D).to(dtype), (kind + 1) % 3)
        if D % 2
        else draw(D).to(dtype).expand(N, P * P, D)
    )
    return x, *((1 + draw(D), draw(D) if bias else None) if affine else (None, None)), dy


def run(function, inputs, dy, P):
    """Output and gradients of `function` on the patches of x, a view of what a ViT returns: CLS stands in front."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, weight, bias = inputs
    y = function(x[:, 1:], weight, bias, P)
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy.to(y.dtype))


def close(got, want, dtype):
    assert got.shape == want.shape and got.dtype == dtype
    error, scale = (got.double() - want).abs(), want.abs().clamp(min=1)
    assert (error <= STEP[dtype] * scale).all(), f"off by {error.max():.2g} (NaN: never written)"


def check(function, s, P, D, dtype, affine, device="cpu", **how):
    """Output and every gradient of `function`, all memory it may have left unwritten being NaN."""
    *inputs, dy = make(s, P, D, dtype, affine, device, **how)
    want = run(loops, inputs, dy, P)
    torch.use_deterministic_algorithms(True)  # which fills every empty tensor with NaN
    try:
        got = run(function, inputs, dy, P)
    finally:
        torch.use_deterministic_algorithms(False)
    for g, w, t in zip(got, want, (dtype, dtype, torch.float32, torch.float32)):
        close(g, w, t)
    assert (got[1][:, 0] == 0).all(), "CLS is not in the view: its gradient is zero"


@interpreted
@pytest.mark.parametrize("s,P,D,dtype,affine", CASES, ids=str)
def test_kernel_and_every_gradient_equal_float64_loops(s, P, D, dtype, affine, monkeypatch):
    monkeypatch.setenv("NANO_POOL", "triton")  # overlapping windows: the reference all the same
    check(adapter.pool, s, P, D, dtype, affine)


@interpreted
def test_the_kernel_refuses_windows_that_overlap():
    x, weight, bias, _ = make(4, 3, 12, torch.float32, True)
    with pytest.raises(AssertionError, match="3 windows do not divide 4 patches"):
        pool_triton.pool(x[:, 1:], weight, bias, 3)


@pytest.mark.parametrize("s,P,D,dtype,affine", CASES, ids=str)
def test_reference_and_every_gradient_equal_float64_loops(s, P, D, dtype, affine):
    check(adapter.pool_reference, s, P, D, dtype, affine)


def test_reference_stays_in_float64():
    x, weight, bias, dy = make(6, 3, 9, torch.float32, True)
    got, want = (
        run(f, (x.double(), weight.double(), bias.double()), dy, 3)
        for f in (adapter.pool_reference, loops)
    )
    for g, w in zip(got, want):
        close(g, w, torch.float64)


@interpreted
def test_weight_without_bias():
    check(pool_triton.pool, 4, 2, 6, torch.float32, True, bias=False)
    check(adapter.pool_reference, 4, 2, 6, torch.float32, True, bias=False)


@interpreted
def test_many_tiles_to_a_program():
    check(pool_triton.pool, 4, 2, 1100, torch.float32, True, N=3)  # 24 tiles, 8 programs


@interpreted
def test_a_large_mean_does_not_cancel():
    x, weight, bias, dy = make(2, 1, 64, torch.float32, True)
    got, want = (run(f, (x + 1000, weight, bias), dy, 1) for f in (pool_triton.pool, loops))
    for g, w in zip(got, want):
        assert (g - w).abs().max() < 1e-3  # E[x*x] - E[x]**2 in fp32 would be off by 1e-2


class Spy:
    """A kernel that notes which of its pointers were null."""

    def __init__(self, kernel):
        self.kernel, self.null = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.null = {name for name, value in zip(self.kernel.arg_names, args) if value is None}
            self.kernel[grid](*args, **constants)

        return launch


@interpreted
@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb", "xb", ""])
def test_what_needs_no_gradient_is_not_computed(wanted, monkeypatch):
    there, back = Spy(pool_triton.forward_kernel), Spy(pool_triton.backward_kernel)
    monkeypatch.setattr(pool_triton, "forward_kernel", there)
    monkeypatch.setattr(pool_triton, "backward_kernel", back)
    x, weight, bias, dy = make(2, 1, 4, torch.float32, True)
    inputs = {"x": x, "w": weight, "b": bias}
    for name in wanted:
        inputs[name].requires_grad_()
    y = pool_triton.pool(x[:, 1:], weight, bias, 1)
    assert ("mean_ptr" in there.null) == (not wanted)
    if wanted:
        y.backward(dy)
        assert {name for name in "xwb" if f"d{name}_ptr" not in back.null} == set(wanted)
        assert ("x_ptr" in back.null) == (wanted == "b")  # dbias is a sum of dy: x is not even read
    assert all((t.grad is not None) == (name in wanted) for name, t in inputs.items())


@interpreted
@pytest.mark.parametrize("affine", [False, True])
def test_no_images_give_no_output_and_zero_gradients(affine):
    inputs = [
        t if t is None else t[:0] if t.dim() == 3 else t
        for t in make(4, 2, 6, torch.float32, affine)
    ]
    y, dx, *affines = run(pool_triton.pool, inputs[:3], inputs[3], 2)
    assert y.shape == (0, 4, 6) and dx.shape == (0, 17, 6) and all((g == 0).all() for g in affines)


def opcheck(device, s=2, P=1):
    x, weight, bias, dy = make(s, P, 4, torch.float32, True, device)
    x = x[:, 1:]
    for inputs in [(x, weight, bias), (x, None, None)]:
        inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
        torch.library.opcheck(pool_triton.pool_forward, (*inputs, P, 1e-5, True))
    _, mean, rstd = pool_triton.pool_forward(x, weight, bias, P, 1e-5, True)
    for want in [(True, True, True), (False, True, False)]:
        torch.library.opcheck(pool_triton.pool_backward, (dy, x, weight, mean, rstd, *want))


@interpreted
def test_operators_pass_opcheck():
    opcheck("cpu")


def whole_adapter(device, compiled, dtype=torch.float32, s=4, P=2, D=8):
    """Output and gradients of a PoolAdapter, as it is, compiled, and under activation checkpointing."""
    torch.manual_seed(0)
    model = adapter.PoolAdapter(D, 2 * D, P).to(device)
    x = torch.randn(2, s * s, D, device=device, dtype=dtype).requires_grad_()
    again = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    results = []
    for f in (model, compiled(model), again):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            y = f(x)
        results.append(
            [y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]
        )
    return results


@interpreted
def test_the_adapter_compiles_in_one_graph_and_recomputes(monkeypatch):
    monkeypatch.setenv("NANO_POOL", "triton")
    calls = []
    real = pool_triton.pool_forward
    monkeypatch.setattr(pool_triton, "pool_forward", lambda *a: calls.append(1) or real(*a))
    eager, *others = whole_adapter(
        "cpu", lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    )
    assert calls, "NANO_POOL=triton did not choose the kernel"
    for other in others:
        for a, b in zip(eager, other):
            torch.testing.assert_close(a, b)


HOPPER = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import pool_triton as p
class Recorder:                 # stands for the kernel: compiles for sm_90 what the launcher would launch there
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return self.launch
    def launch(self, *args, num_warps, maxnreg=None, **constants):
        names = self.kernel.arg_names
        kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
        given = {n: a for n, a in zip(names, args)}
        constants |= {n: a for n, a in given.items() if a is None or n in ("xd", "yd")}
        signature = {n: "constexpr" if n in constants else kind[given[n].dtype] if isinstance(given[n], torch.Tensor)
                     else "fp32" if n == "eps" else "i32" for n in names}
        aligned = [i for i, n in enumerate(names) if signature[n] not in ("constexpr", "fp32")]
        attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(self.kernel, signature, {(names.index(n),): a for n, a in constants.items()}, attrs)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps)).asm["ptx"]
        loads = [line for line in ptx.splitlines() if "ld.global" in line or "cp.async.c" in line]
        print(self.kernel.__name__, "wide", sum(".v4" in line or "0x10" in line for line in loads), flush=True)
p.INTERPRETED = True
p.forward_kernel, p.backward_kernel = Recorder(p.forward_kernel), Recorder(p.backward_kernel)
x = torch.randn(1, 1 + 16 * 16, 1408, dtype=torch.bfloat16, requires_grad=True)
p.pool(x[:, 1:], torch.ones(1408, requires_grad=True), torch.zeros(1408, requires_grad=True), 8).sum().backward()
"""


def test_kernels_compile_for_hopper_without_one_and_load_16_bytes_at_a_time(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    root = Path(pool_triton.__file__).parent
    out = subprocess.run(
        [sys.executable, "-c", HOPPER],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    wide = {line.split()[0]: int(line.split()[2]) for line in out.stdout.splitlines()}
    assert wide["forward_kernel"] >= 4 and wide["backward_kernel"] >= 4, out.stdout
