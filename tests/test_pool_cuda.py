"""What test_pool.py proves in the interpreter, on the GPU itself; and what only a GPU can show."""

import pytest
import torch
from test_pool import CASES, check, loops, make, opcheck, run, whole_adapter

import adapter
import pool_triton

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or pool_triton.INTERPRETED,
    reason="needs a CUDA device (and TRITON_INTERPRET unset); none is here",
)
WIDE = [
    (16, 8, 1408),
    (32, 16, 1408),
    (32, 8, 1408),
    (16, 16, 1408),
    (24, 8, 1024),
    (24, 12, 1024),
    (24, 16, 1024),
    (7, 3, 1001),
]
WIDE_CASES = [
    (*shape, dtype, affine)
    for shape in WIDE
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for affine in (False, True)
]


@pytest.mark.parametrize("s,P,D,dtype,affine", CASES + WIDE_CASES, ids=str)
def test_kernel_and_every_gradient_equal_float64_loops_on_the_device(s, P, D, dtype, affine):
    check(adapter.pool, s, P, D, dtype, affine, "cuda")


def test_operators_pass_opcheck_on_the_device():
    opcheck("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s,P", [(4, 2), (4, 4), (5, 3)])
def test_the_adapter_compiles_in_one_graph(dtype, s, P):
    torch._dynamo.reset()
    eager, compiled, again = whole_adapter(
        "cuda", lambda f: torch.compile(f, fullgraph=True), dtype, s, P, 64
    )
    loose = (
        2e-2 if dtype == torch.bfloat16 else 1e-5
    )  # the compiler fuses the GELU, and rounds less often
    for a, b, c in zip(eager, compiled, again):
        assert (b - a).norm() <= loose * a.norm() and torch.equal(c, a)


@pytest.mark.parametrize("s,P", [(32, 16), (24, 12)])
def test_a_hundred_runs_give_the_same_bits(s, P):
    *inputs, dy = make(s, P, 1408, torch.bfloat16, True, "cuda", N=16)
    first = run(pool_triton.pool, inputs, dy, P)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(pool_triton.pool, inputs, dy, P)))


def test_offsets_beyond_two_to_the_31():
    need = 20 << 30
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of free device memory")
    D, P = 1408, 16
    N = 2**31 // (1025 * D) + 2
    x = torch.zeros(N, 1025, D, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(1025, D, device="cuda")
    weight, bias = torch.ones(D, device="cuda"), torch.zeros(D, device="cuda")
    dy = torch.randn(D, dtype=torch.bfloat16, device="cuda").expand(N, P * P, D)
    y, dx, *_ = run(pool_triton.pool, (x, weight, bias), dy, P)
    want = run(loops, (x[-1:], weight, bias), dy[-1:], P)
    assert (y[-1:] - want[0]).abs().max() < 2e-2 and (dx[-1:] - want[1]).abs().max() < 2e-2
