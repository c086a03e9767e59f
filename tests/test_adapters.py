"""Every adapter alike, adapter.py's and those of examples/: shapes, gradients, order, arithmetic."""

import math

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adapter
import pool_triton
from examples.abstractor import Abstractor
from examples.fourier import Fourier, low_pass
from examples.shuffle import Shuffle
from model import init
from support.plan import flops

OWN = {"Shuffle": Shuffle, "Fourier": Fourier, "Abstractor": Abstractor}
ALL = {"pool": adapter.PoolAdapter, "resampler": adapter.Resampler} | OWN


def made(kind, *sizes):
    """An adapter in fp64 in which nothing is 0 or 1."""
    m = ALL[kind](*sizes).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) / 2)
    return m


def patches(n, side, width):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, side**2, width, generator=rng, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("ln_vision", [True, False])
@pytest.mark.parametrize("s, P", [(4, 2), (8, 4), (12, 6), (6, 4), (5, 5), (3, 1)])
@pytest.mark.parametrize("kind", ALL)
def test_patches_become_visual_tokens_of_the_llms_width_in_any_precision(kind, s, P, ln_vision):
    if kind == "Shuffle" and s != 2 * P:
        with pytest.raises(AssertionError, match=f"--grid {P} needs {2 * P} patches per side"):
            made(kind, 8, 6, P)(patches(1, s, 8))
        return
    m = init(ALL[kind](32, 24, P, ln_vision)).double()
    x = torch.cat([patches(3, s, 32)[:, :1], patches(3, s, 32)], dim=1)[:, 1:]  # behind a CLS
    y = m(x)
    assert y.shape == (3, P * P, 24) and y.isfinite().all()
    torch.testing.assert_close(m.float()(x.float()), y.float(), rtol=1e-4, atol=1e-5)
    near = dict(rtol=0.05, atol=0.05 * y.abs().max().item(), check_dtype=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m(x.float()), y, **near)
    torch.testing.assert_close(m.bfloat16()(x.bfloat16()), y, **near)


@pytest.mark.parametrize("ln_vision", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_every_gradient_is_the_difference_quotient_in_float64(kind, ln_vision):
    m = made(kind, 8, 6, 2, ln_vision)
    names = [name for name, _ in m.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(m, dict(zip(names, parameters)), x)

    assert torch.autograd.gradcheck(call, (patches(2, 4, 8).requires_grad_(), *m.parameters()))


def near(row, column):
    """Where a patch at (2, 5) of 12 x 12 reaches through both convolutions: its neighbours' windows and theirs."""
    return row <= 2 and 1 <= column <= 4


PLACES = [(row, column) for row in range(6) for column in range(6)]
REACHED = {
    "pool": [(1, 2)],
    "Shuffle": [(1, 2)],
    "Abstractor": [place for place in PLACES if near(*place)],
    "Fourier": PLACES,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", REACHED)
def test_a_patch_is_seen_most_by_the_token_of_its_place(kind):
    m = made(kind, 16, 12, 6)
    x = patches(1, 12, 16)
    changed = x.clone()
    changed[0, 12 * 2 + 5] += torch.randn(16)  # row 2, column 5
    change = (m(changed) - m(x)).norm(dim=-1)[0]  # (P*P,)
    assert [place for place, c in zip(PLACES, change) if c > 1e-9] == REACHED[kind]
    assert PLACES[change.argmax()] == (1, 2)
    if kind in ("pool", "Shuffle"):  # where windows move, so do their tokens
        moved = m(x.view(12, 12, 16).roll((2, 4), (0, 1)).view(x.shape))
        torch.testing.assert_close(moved.view(6, 6, 12), m(x).view(6, 6, 12).roll((1, 2), (0, 1)))


@torch.no_grad()
def test_the_resampler_does_not_know_where_a_patch_lies():
    m = made("resampler", 16, 12, 6)
    x = patches(1, 12, 16)
    order = torch.randperm(144, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(m(x[:, order]), m(x))
    x[0, 29] += 1
    assert (m(x) != m(x[:, :-1])).any(-1).all()  # and every token sees every patch


@pytest.mark.parametrize("s, P", [(8, 4), (7, 3), (32, 16), (5, 5)])
def test_low_frequencies_stay_what_they_are_and_high_ones_vanish(s, P):
    here = (torch.arange(s) + 0.5) * math.pi / s
    there = (torch.arange(P) + 0.5) * math.pi / P
    for frequency in range(s):
        got = low_pass(s, P, "cpu") @ torch.cos(frequency * here)
        want = torch.cos(frequency * there) * (frequency < P)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("ln_vision", [True, False])
def test_fourier_filters_rows_and_columns_of_the_normalised_patches(ln_vision):
    m = made("Fourier", 8, 6, 3, ln_vision)
    x = patches(2, 7, 8)
    normed = F.layer_norm(x, (8,), m.norm.weight, m.norm.bias) if ln_vision else x
    low = low_pass(7, 3, "cpu").double()
    y = torch.einsum("pi, qj, nijd -> npqd", low, low, normed.view(2, 7, 7, 8)).flatten(1, 2)
    torch.testing.assert_close(m(x), m.fc2(F.gelu(m.fc1(y))))


@pytest.mark.parametrize("ln_vision", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", [*adapter.ADAPTERS, *OWN])
def test_the_plan_counts_an_adapter_as_torch_does(kind, stage, ln_vision, monkeypatch):
    for name, own in OWN.items():
        monkeypatch.setitem(adapter.ADAPTERS, name, own)
    m = tiny.network(adapter=kind, ln_vision=ln_vision).freeze(stage)
    for gradients in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            y = m.encode_images(tiny.pictures(1))
            if gradients:
                y.sum().backward()
        cost = flops(m.config, 9, 3, stage if gradients else None)
        assert counter.get_total_flops() == cost["vit"] + cost["adapter"]


def test_a_kernel_that_is_forced_is_not_asked_to_run_on_no_device(monkeypatch):
    monkeypatch.setenv("NANO_POOL", "triton")
    monkeypatch.setattr(pool_triton, "pool", None)  # in its interpreter it would run
    c = tiny.network(grid=1).config
    assert flops(c, 9, 3)["adapter"] == 2 * (24 * 32 + 32 * 32)
