"""The network's own promises: caching, splicing, the loss, what trains, how it begins."""

import pytest
import torch
from tiny import IMG, TODAY, batch, network, pictures, rows, text
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import model as models
from model import IGNORE, IMAGE, InfMLLM, KVCache, LlamaConfig, ViTConfig


def kept(run):
    """How many numbers autograd keeps for the backward pass of `run`."""
    sizes = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        run()
    return sum(sizes)


@torch.no_grad()
@pytest.mark.parametrize("backbones", [{}, TODAY])
def test_cached_decoding_equals_uncached_at_every_step(backbones):
    llm = network(**backbones).llm
    tokens = rows(text(20), text(20, 2))
    cache = KVCache(20)
    turns = tokens.split((7, 1, 1, 1, 10), dim=1)  # a prompt, single steps, another turn
    got = [llm(turn, cache=cache) for turn in turns]
    assert (torch.cat(got, 1) - llm(tokens)).abs().max() < 1e-5


def test_a_wrong_number_of_placeholders_is_one_clear_sentence():
    with pytest.raises(AssertionError, match="2 images need 8 placeholders .* the text has 4"):
        network()(pictures(2), rows([1] + IMG + text(3)))


HALF = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "vit, mean, std",
    [
        ({}, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        (dict(pixel_mean=HALF, pixel_std=HALF), HALF, HALF),
    ],
)
def test_bytes_are_normalised_as_the_config_says_and_floats_are_taken_as_they_come(vit, mean, std):
    m, images = network(vit=vit), pictures(2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    normalised = (images / 255 - mean) / std
    assert (m.encode_images(images) - m.encode_images(normalised)).abs().max() < 1e-5


def test_the_chunked_loss_equals_that_of_full_logits_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(models, "LOGITS", 50 * 5)  # of 12 supervised rows five a chunk
    m = network().double()
    images, tokens, targets = batch()
    logits = m(images, tokens).flatten(0, 1)
    full = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    got, want = (
        (loss, *torch.autograd.grad(loss, list(m.parameters())))
        for loss in (m(images, tokens, targets), full)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_of_the_logits_of_32000_words_at_most_a_quarter_is_there_at_once():
    m, made = network(), []
    m.config.llm.vocab = 32000
    m.llm.lm_head = nn.Linear(32, 32000)
    m.llm.lm_head.register_forward_hook(lambda module, inputs, out: made.append(out.numel()))
    hidden, targets = torch.randn(2048, 32), torch.randint(32000, (2048,))
    saved = kept(lambda: m.summed_loss(hidden, targets))
    assert max(*made, saved) <= 2048 * 32000 / 4


def test_counted_positions_give_what_looking_for_them_gives_and_padding_counts_nothing():
    m = network()
    images, tokens, targets = batch()
    targets[:, 0] = targets[:, -1] = 7  # where padding would do harm
    image_at = (tokens.flatten() == IMAGE).nonzero()[:, 0]
    image_at = F.pad(image_at, (0, 4), value=-1)  # of one more, which goes nowhere
    target_at = F.pad((targets.flatten() != IGNORE).nonzero()[:, 0], (0, 9), value=-1)
    want = m(images, tokens, targets).item()
    got = m(torch.cat((images, pictures(1, 9))), tokens, targets, image_at, target_at)
    assert got.item() == pytest.approx(want, rel=1e-6)


TRAINS = {1: ("adapter.",), 2: ("adapter.", "vit."), 3: ("adapter.", "llm.")}
Q_AND_V = {f"llm.layers.{layer}.{x}.weight" for layer in (0, 1) for x in "qv"}


@pytest.mark.parametrize("adapter", ["pool", "resampler", "mlp"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_trains_its_parts_and_a_batch_without_images_reaches_them_all(stage, adapter):
    m = network(adapter=adapter).freeze(stage)
    names = {name for name, _ in m.named_parameters() if name.startswith(TRAINS[stage])}
    if stage == 2:
        names |= Q_AND_V
    _, tokens, targets = batch()
    m(pictures(0), tokens[2:], targets[2:]).backward()
    for name, p in m.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (name in names), name
        if p.requires_grad:
            assert p.grad.any() if name.startswith("llm.") else (p.grad == 0).all(), name


def test_stage_2_trains_q_and_v_with_their_biases_and_not_their_norms():
    m = network(**TODAY).freeze(2)
    names = {name for name, p in m.llm.layers[0].named_parameters() if p.requires_grad}
    assert names == {"q.weight", "q.bias", "v.weight", "v.bias"}


def test_recomputed_activations_are_not_kept():
    m = network().freeze(2)
    whole = kept(lambda: m(*batch()))
    m.vit.recompute = m.llm.recompute = True
    assert kept(lambda: m(*batch())) < whole / 2


@pytest.mark.parametrize(
    "adapter, grid, cells", [("pool", None, 4), ("pool", 3, 9), ("mlp", None, 64)]
)
def test_a_model_resized_has_as_many_visual_tokens_unless_nothing_is_pooled(adapter, grid, cells):
    m = network(adapter=adapter).resize(64, grid)
    assert m.config.visual_tokens == cells
    assert m.encode_images(torch.zeros(1, 3, 64, 64)).shape == (1, cells, 32)


def test_pixels_that_fill_no_patch_are_not_seen():
    m = network(**TODAY).resize(30)  # of patches of 8 px three a side
    images = torch.randn(1, 3, 30, 30)
    seen = m.vit(images)
    images[:, :, 24:] = images[:, :, :, 24:] = 9.0
    assert seen.shape == (1, 9, 24) and torch.equal(m.vit(images), seen)


@torch.no_grad()
def test_a_seed_gives_the_same_weights_and_every_kind_its_size():
    config = network(adapter="resampler").config
    first, again, other = (models.init(InfMLLM(config), seed).state_dict() for seed in (0, 0, 1))
    ends = "proj.weight", "0.fc2.weight", "1.fc2.weight", ".o.weight", ".down.weight"  # of branches
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if p.ndim > 1 or name == "vit.cls":
            size = 0.01 if name.endswith(ends) else 0.02
            assert p.std() == pytest.approx(size, rel=0.4) and not torch.equal(p, other[name]), name
        else:
            assert (p == name.endswith("weight")).all(), name


def test_inconsistent_configs_are_refused_with_a_sentence():
    for make, says in (
        (
            lambda: network(vit=dict(act="relu")),
            "activation is gelu, gelu_pytorch_tanh, quick_gelu",
        ),
        (lambda: ViTConfig(heads=7), "not divisible"),
        (lambda: network(grid=5), "grid 5 is not within the ViT's 4 patches"),
        (lambda: LlamaConfig(kv_heads=5), "do not share"),
        (lambda: network(adapter="qformer"), "adapter is pool, mlp, resampler"),
    ):
        with pytest.raises(AssertionError, match=says):
            make()


def test_every_preset_is_printed(capsys):
    models.main()
    out = capsys.readouterr().out
    assert all(name in out for name in models.PRESETS) and "256" in out
