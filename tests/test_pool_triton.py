"""The pooling kernel against its definition in float64: in Triton's interpreter, or on the GPU where there is one."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from pooling import KINDS, SHAPES, check, definition, make, run

import adapter
from pool_triton import INTERPRETED, pool

DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device, and TRITON_INTERPRET unset")


@pytest.mark.parametrize("dtype, affine", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_every_gradient_equal_the_definition_in_float64(shape, dtype, affine):
    check(pool, *shape, dtype=dtype, affine=affine, N=1 if shape[0] > 4 else 2, device=DEVICE)


@on_gpu
def test_so_do_those_of_real_towers():
    for shape in ((16, 8, 1408), (32, 16, 1408), (16, 16, 1408), (24, 12, 1024), (9, 3, 1001)):
        for dtype, affine in KINDS:
            check(pool, *shape, dtype=dtype, affine=affine, device=DEVICE)


def test_without_images_and_with_many_tiles_to_a_program():
    check(pool, 4, 2, 6, N=0, device=DEVICE)
    check(pool, 4, 2, 1100, N=3, device=DEVICE)  # 24 tiles, 8 programs


def test_a_large_mean_does_not_cancel():
    *inputs, dy = make(2, 1, 64, device=DEVICE)
    inputs[0] += 1000
    for got, want in zip(run(pool, inputs, dy, 1), run(definition, inputs, dy, 1)):
        assert (got - want).abs().max() < 1e-3  # E[x*x] - E[x]**2 in fp32 would be off by 1e-2


@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb", "xb"])
def test_a_gradient_that_is_not_wanted_is_none_and_the_others_stay_the_same(wanted):
    *inputs, dy = make(2, 1, 4, device=DEVICE)
    _, *want = run(pool, inputs, dy, 1)
    for name, t in zip("xwb", inputs):
        t.requires_grad_(name in wanted)
    x, *affine = inputs
    pool(x[:, 1:], *affine, 1).backward(dy)
    for name, t, g in zip("xwb", inputs, want):
        assert torch.equal(t.grad, g) if name in wanted else t.grad is None


@pytest.mark.parametrize("dtype, loose", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_adapter_compiles_in_one_graph(dtype, loose, monkeypatch):
    monkeypatch.setenv("NANO_POOL", "triton")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapter.PoolAdapter(64, 128, 2).to(DEVICE)
    x = torch.randn(2, 16, 64, device=DEVICE, dtype=dtype)
    inputs = [*model.parameters()]
    if dtype == torch.float32:  # else as in stage 1, where the ViT is frozen
        inputs.append(x.requires_grad_())

    def results(f):
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
            y = f(x)
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    backend = "aot_eager" if INTERPRETED else "inductor"
    compiled = results(torch.compile(model, fullgraph=True, backend=backend))
    for p, c in zip(results(model), compiled):  # a compiler that fuses rounds less often
        assert (c - p).norm() <= loose * p.norm()


@on_gpu
@pytest.mark.parametrize("s, P", [(32, 16), (24, 12)])
def test_a_hundred_runs_give_the_same_bits(s, P):
    *inputs, dy = make(s, P, 1408, torch.bfloat16, N=16, device=DEVICE)
    first = run(pool, inputs, dy, P)
    for _ in range(99):
        assert all(map(torch.equal, first, run(pool, inputs, dy, P)))


@on_gpu
def test_offsets_beyond_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    D, P = 1408, 16
    N = 2**31 // (1025 * D) + 2
    x = torch.zeros(N, 1025, D, dtype=torch.bfloat16, device=DEVICE)
    x[-1].normal_()
    affine = torch.ones(D, device=DEVICE), torch.zeros(D, device=DEVICE)
    dy = x[-1:, :1].expand(N, P * P, D)
    got = run(pool, (x, *affine), dy, P)
    want = run(definition, (x[-1:], *affine), dy[-1:], P)
    for g, w in zip(got[:2], want):  # y and dx
        assert (g[-1:] - w).abs().max() < 2e-2


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
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", HOPPER]
    out = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    wide = {line.split()[0]: int(line.split()[2]) for line in out.stdout.splitlines()}
    assert wide["forward_kernel"] >= 4 and wide["backward_kernel"] >= 4, out.stdout
