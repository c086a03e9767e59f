"""A module that a fork puts in the place of an nn.Linear acts everywhere, and what trains follows the swap."""

import copy

import pytest
import tiny
import torch

import sample
import weights


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.SWAPPED)
def test_it_acts_in_a_forward_pass_in_greedy_decoding_and_in_beams(name):
    torch.manual_seed(1)
    base = tiny.network()
    swapped = tiny.swap(copy.deepcopy(base), [name])
    low = swapped.get_submodule(name)
    low.up.weight.normal_(0, 4)
    plain = copy.deepcopy(base)  # the same function with plain Linears
    plain.get_submodule(name).weight += low.up.weight @ low.down.weight
    images, tokens, targets = tiny.batch()
    loss = swapped(images, tokens, targets).item()
    assert loss == pytest.approx(plain(images, tokens, targets).item(), rel=1e-4)
    prompts = [[1, *tiny.IMG, 7, 8, 9], [1, *tiny.IMG, 11, 12]]
    for beams in (1, 3):
        before, said, wanted = (
            sample.generate_ids(m, images, prompts, max_new_tokens=12, eos=2, beams=beams)
            for m in (base, swapped, plain)
        )
        assert said == wanted != before, beams


@pytest.mark.parametrize("stage", [2, 3])
def test_its_own_weights_train_where_the_replaced_ones_did_and_what_is_frozen_stays(stage):
    trained = lambda m: {n for n, p in m.freeze(stage).named_parameters() if p.requires_grad}
    plain = tiny.model()
    before = trained(plain)
    want = set(before)
    for name in tiny.SWAPPED:
        if f"{name}.weight" in before:
            want |= {f"{name}.down.weight", f"{name}.up.weight"}
        want -= {f"{name}.weight", f"{name}.bias"}
    assert trained(tiny.swap(tiny.model())) == want
    plain.llm.layers[0].q.frozen = True  # the rule is one attribute
    assert trained(plain) == before - {"llm.layers.0.q.weight"}


def test_it_trains_alike_on_one_process_under_ddp_and_sharded(world, tmp_path):
    losses = {}
    for name, ranks, *more in (("one", 1), ("ddp", 2), ("shard", 2, "--shard")):
        argv = ["--stage", 3, "--init", world / "start", "--data", world / "out/toy/stage3.toml"]
        argv += ["--out", tmp_path / name, "--steps", 4, "--dtype", "fp64", "--workers", 0]
        argv += ["--batch", 8, "--log-every", 1, "--eval-every", 0, *more]
        codes = tiny.finish(tiny.start(tmp_path, *argv, world=ranks, swapped=True))
        assert codes == [0] * ranks, tiny.said(tmp_path)[-3000:]
        saved = weights.load_tensors(weights.find(tmp_path / name) / "model.safetensors")
        assert saved["llm.lm_head.up.weight"].any(), "it has left its zeros"
        losses[name] = list(tiny.losses(tmp_path / name).values())
    for name in ("ddp", "shard"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-9)
