"""Configs from a stranger's config.json."""

import functools
from dataclasses import fields, is_dataclass

from model import LlamaConfig, frequencies
from support.errors import BadInput


def from_a_stranger(make):
    """The Config that make(d, what) finds in a config.json, or a sentence, whatever has been written there."""

    @functools.wraps(make)
    def checked(d, what):
        try:
            return sane(make(d, what))
        except BadInput:
            raise
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            AssertionError,
        ) as e:
            why = f"{type(e).__name__}: {str(e)[:100]}"
            raise BadInput(
                f"{what}: its config.json describes no model known here ({why}); take another"
            ) from None

    return checked


LIMITS = {"layers": 1000, "vocab": 2**24}  # of a config; its other numbers end at a million


def sane(config):
    """Numbers of the right kind, and such that nobody runs out of memory in building the model without its weights."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            sane(value)
            continue
        right = (int, float) if f.type is float else f.type
        wrong = f"{f.name} is {str(value)[:50]}"
        assert isinstance(value, right) and (f.type is bool or not isinstance(value, bool)), wrong
        if f.type is int:
            assert 1 <= value <= LIMITS.get(f.name, 2**20), wrong
        if f.type is float:
            assert 0 < value < 1e12, wrong
    if isinstance(config, LlamaConfig):
        assert config.width // config.heads % 2 == 0, "half a pair to rotate"
        assert sum(map(len, config.branches.values())) <= LIMITS["layers"], "too many inner layers"
        assert frequencies(config, "cpu").isfinite().all(), f"rope {str(config.rope)[:80]}"
    return config
