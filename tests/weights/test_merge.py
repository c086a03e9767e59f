"""A run of --tune lora becomes a directory that needs nothing else; tests/test_lora.py merges one that was trained."""

import shutil

import pytest
import tiny
import torch

import lora
import weights.merge
from support.errors import BadInput
from text.tokenizer import Tokenizer
from weights.checkpoint import load, read_checked, save


def test_the_newest_checkpoint_is_merged_beside_the_run_and_nothing_is_written_over(tmp_path):
    base, run, out = (tmp_path / name for name in ("base", "run", "run/merged"))
    tokenizer = Tokenizer(tiny.TOKENIZER)
    save(base, tiny.model().bfloat16(), tokenizer)
    for step in (1, 2):
        m = lora.grow(load(base), 2, ["o"])
        for layer in m.llm.layers:
            torch.nn.init.constant_(layer.o.low.up.weight, step)
        save(run / f"step-0000000{step}", m, tokenizer, {"preset": "small", "steps": 9}, base=base)
    weights.merge.main([str(run)])
    shutil.rmtree(base)
    merged = load(out)
    assert merged.llm.layers[0].o.weight.dtype == torch.bfloat16
    for ours, layer in zip(merged.llm.layers, m.llm.layers):
        want = layer.o.weight.float() + 2 * layer.o.low.down.weight.sum(0)
        assert torch.allclose(ours.o.weight.float(), want, rtol=1e-2, atol=1e-3)
    assert Tokenizer(out).size == tokenizer.size
    assert read_checked(out, "config.json")["training"] == {"preset": "small"}
    with pytest.raises(BadInput, match="merged: is there already; remove it"):
        weights.merge.main([str(run)])
    with pytest.raises(BadInput, match="has no low-rank matrices to merge"):
        weights.merge.main([str(out), "--out", str(tmp_path / "x")])
