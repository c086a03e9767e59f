"""A module that a fork puts in the place of an nn.Linear acts everywhere, and what trains follows the swap."""

import copy

import pytest
import tiny
import torch

import sample
from model import IMAGE

FAST = ["--workers", "0", "--batch", "8", "--log-every", "1", "--eval-every", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def inputs():
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    tokens = [[1, *[IMAGE] * 4, 7, 8, 9], [1, *[IMAGE] * 4, 11, 12]]
    return images.byte(), tokens


def strong(seed=0):
    """A tiny model whose every part matters to its answers."""
    model = tiny.model(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model.eval()


@torch.no_grad()
def merged(model, name):
    """The swapped model's function with plain Linears."""
    plain = copy.deepcopy(model)
    parent, _, leaf = name.rpartition(".")
    owner = plain.get_submodule(parent)
    low = getattr(owner, leaf)
    low.base.weight += low.up.weight @ low.down.weight
    setattr(owner, leaf, low.base)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.SWAPPED)
def test_it_acts_in_a_forward_pass_in_greedy_decoding_and_in_beams(name):
    torch.manual_seed(1)
    images, tokens = inputs()
    base = strong()
    swapped = tiny.swap(copy.deepcopy(base), [name])
    low = swapped.get_submodule(name)
    low.up.weight.normal_(0, 4)
    plain = merged(swapped, name)
    ids = torch.tensor(tokens[0])[None]
    logits = swapped(images[:1], ids)
    assert (logits - base(images[:1], ids)).abs().max() > 1e-2
    assert (logits - plain(images[:1], ids)).abs().max() < 1e-3 * logits.abs().max()
    targets = torch.full_like(ids, 5)
    assert swapped(images[:1], ids, targets) == pytest.approx(
        plain(images[:1], ids, targets).item(), rel=1e-4
    )
    for beams in (1, 3):
        said = [
            sample.generate_ids(m, images, tokens, max_new_tokens=12, eos=2, beams=beams)
            for m in (base, swapped, plain)
        ]
        assert said[1] == said[2] != said[0], beams


@pytest.mark.parametrize("stage", [2, 3])
def test_its_own_weights_train_and_its_base_stays(stage):
    before = {n for n, p in tiny.model().freeze(stage).named_parameters() if p.requires_grad}
    model = tiny.swap(tiny.model()).freeze(stage)
    after = {n for n, p in model.named_parameters() if p.requires_grad}
    for name in tiny.SWAPPED:
        own = {f"{name}.down.weight", f"{name}.up.weight"}
        trained = f"{name}.weight" in before
        assert own <= after if trained else not own & after, name
        assert not any(n.startswith(f"{name}.base.") for n in after), name
    rest = {n for n in before if not n.startswith(tuple(f"{name}." for name in tiny.SWAPPED))}
    assert rest <= after


def test_it_trains_alike_on_one_process_under_ddp_and_sharded(world, tmp_path):
    losses = {}
    for name, world_size, *more in (
        ("plain", 1, False),
        ("one", 1, True),
        ("ddp", 2, True),
        ("shard", 2, True, "--shard"),
    ):
        swapped, flags = more[0], more[1:]
        argv = ["--stage", 3, "--init", world / "start", "--data", world / "out/toy/stage3.toml"]
        argv += ["--out", tmp_path / name, "--steps", 4, "--dtype", "fp64", *FAST, *flags]
        codes = tiny.finish(tiny.start(tmp_path, *argv, world=world_size, swapped=swapped))
        assert codes == [0] * world_size, tiny.said(tmp_path)[-3000:]
        losses[name] = list(tiny.losses(tmp_path / name).values())
    assert losses["ddp"] == pytest.approx(losses["one"], rel=1e-9)
    assert losses["shard"] == pytest.approx(losses["one"], rel=1e-9)
    assert abs(losses["one"][0] - losses["plain"][0]) > 1e-6
    assert losses["one"][-1] < losses["one"][0]


def test_the_rule_is_one_attribute():
    model = tiny.model()
    model.llm.layers[0].q.frozen = True
    trained = {n for n, p in model.freeze(3).named_parameters() if p.requires_grad}
    assert "llm.layers.0.q.weight" not in trained and "llm.layers.1.q.weight" in trained
