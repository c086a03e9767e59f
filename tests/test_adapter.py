"""Pooling in plain PyTorch against its definition in float64, and the resampler head by head."""

import pytest
import torch
from pooling import KINDS, SHAPES, check, make
from torch.nn import functional as F

import adapter
import pool_triton


@pytest.mark.parametrize("dtype, affine", [*KINDS, (torch.float64, 2)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 3, 7), (2, 3, 6)])  # windows of the last overlap
def test_the_reference_and_every_gradient_equal_the_definition_in_float64(shape, dtype, affine):
    check(adapter.pool_reference, *shape, dtype=dtype, affine=affine)


def test_the_kernel_pools_where_it_is_chosen_and_can(monkeypatch):
    monkeypatch.setattr(pool_triton, "pool", lambda *inputs: "kernel")
    x, *affine, _ = make(4, 2, 6)
    x = x[:, 1:]
    assert adapter.pool_path("cuda") == "triton" and adapter.pool_path("cpu") == "torch"
    monkeypatch.setenv("NANO_POOL", "torch")
    assert adapter.pool_path("cuda") == "torch"
    monkeypatch.setenv("NANO_POOL", "triton")
    assert adapter.pool(x, *affine, 2) == "kernel"
    for given, grid in ((x.double(), 2), (x, 3)):  # float64; windows that overlap
        assert adapter.pool(given, *affine, grid).shape == (2, grid**2, 6)
    monkeypatch.setenv("NANO_POOL", "cuda")
    with pytest.raises(AssertionError, match="NANO_POOL is triton or torch"):
        adapter.pool(x, *affine, 2)


@torch.no_grad()
@pytest.mark.parametrize("ln_vision", [True, False])
def test_each_query_of_the_resampler_attends_to_all_patches_one_head_after_the_other(ln_vision):
    m = adapter.Resampler(24, 128, 2, ln_vision).double()
    for p in m.parameters():
        p.normal_()
    patches = torch.randn(2, 16, 24, dtype=torch.float64)
    normed = F.layer_norm(patches, (24,), m.norm.weight, m.norm.bias) if ln_vision else patches
    queries, (keys, values) = m.q(m.queries), m.kv(normed).split(128, dim=-1)
    seen = []
    for head in (slice(0, 64), slice(64, 128)):
        scores = queries[:, head] @ keys[..., head].mT / 8
        seen.append(scores.softmax(-1) @ values[..., head])
    torch.testing.assert_close(m(patches), m.fc2(F.gelu(m.fc1(torch.cat(seen, dim=-1)))))
