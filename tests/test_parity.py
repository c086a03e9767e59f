"""Both towers, the language model and the whole, against transformers' on the same weights, by the user's loaders."""

import oracle
import pytest
import torch
import transformers

import weights.llama
import weights.llava
import weights.rename
import weights.towers
from model import IMAGE, ViT

ROPE = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "theta": {"rope_type": "default", "rope_theta": 1e6},
}
LLAMAS = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "theta 1e6": dict(rope_parameters=ROPE["theta"]),
    "linear": dict(rope_parameters=ROPE["linear"]),
    "llama3": dict(rope_parameters=ROPE["llama3"]),
}


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers rounds LLaMA's norms to fp32 whatever the dtype: 1e-6 of noise that hides our own errors in float64.
    With that cast gone the two agree to 1e-14, so the bound can be that of the other towers."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", forward)


def assert_close(ours, theirs, dtype, tight):
    assert 0.3 < theirs.std() < 3, f"the oracle's outputs are not of order 1: {theirs.std()}"
    gap = (ours - theirs).abs().max().item()
    assert gap <= (tight if dtype == torch.float64 else 2e-5), gap


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LLAMAS)
def test_llama_gives_the_logits_of_transformers(kind, dtype, published, tmp_path, exact_norms):
    theirs = oracle.llama(**LLAMAS[kind])
    ours = weights.llama.load_llama(oracle.folder(theirs, tmp_path, published)).to(dtype)
    tokens = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(ours.head(ours(tokens)), theirs.to(dtype)(tokens).logits, dtype, 1e-10)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [56, 84, 42])
def test_clip_gives_hidden_state_minus_2_at_its_own_and_other_resolutions(
    size, dtype, published, tmp_path
):
    theirs = oracle.clip()
    if dtype == torch.float64:
        theirs = theirs.double()  # saved as float64: resized positions must not pass fp32
    folder = oracle.folder(theirs, tmp_path, published)
    ours = weights.towers.load_vit(folder, None if size == 56 else size, dtype=dtype)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        want = theirs(
            images, output_hidden_states=True, interpolate_pos_encoding=size != 56
        ).hidden_states[-2]
        assert_close(ours(images), want, dtype, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_eva_tower_equals_blip2s_up_to_its_last_block(dtype, tmp_path):
    theirs = oracle.blip2()
    ours = weights.towers.load_vit(oracle.folder(theirs, tmp_path)).to(dtype)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(dtype)
    last = []
    theirs.encoder.layers[-1].register_forward_hook(lambda module, inputs, out: last.append(out))
    with torch.no_grad():
        theirs.to(dtype)(images)
        assert_close(ours(images), last[0], dtype, 1e-10)


def test_an_eva_file_gives_what_blip2_gives(tmp_path):
    """eva_vit_g.pth has other names, q and v bias apart, one block too many and a head."""
    theirs = oracle.blip2()
    state = {}
    for key, t in theirs.state_dict().items():
        if "post_layernorm" in key:
            continue
        for old, new in (
            ("embeddings.class_embedding", "cls_token"),
            ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("encoder.layers", "blocks"),
            ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn", "attn"),
        ):
            key = key.replace(old, new)
        if key.endswith("qkv.bias"):
            (
                state[key.replace("qkv.bias", "q_bias")],
                _,
                state[key.replace("qkv.bias", "v_bias")],
            ) = t.clone().chunk(3)
        else:
            state[key] = t
    extra = {
        k.replace("blocks.0.", "blocks.4."): t
        for k, t in state.items()
        if k.startswith("blocks.0.")
    }
    torch.save(
        state | extra | {"head.weight": torch.ones(3, 48), "norm.bias": torch.ones(48)},
        tmp_path / "eva.pth",
    )
    config = weights.towers.vit_config(theirs.config.to_dict(), "a BLIP-2 tower")
    table = weights.towers.vit_table(weights.towers.EVA, config)
    ours = weights.rename.on_meta(ViT, config)
    weights.rename.fill(ours, tmp_path / "eva.pth", table, torch.float32)
    again = weights.towers.load_vit(oracle.folder(theirs, tmp_path / "blip2"))
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_llava_end_to_end_with_unequal_lengths_gives_its_logits(
    dtype, published, tmp_path, exact_norms
):
    theirs = oracle.llava(num_key_value_heads=2)
    ours = weights.llava.load_llava(oracle.folder(theirs, tmp_path, published)).to(dtype)
    theirs, rng = theirs.to(dtype), torch.Generator().manual_seed(1)
    lengths, starts = (
        [40, 31, 60, 12],
        [[2], [5], [1, 30], []],
    )  # one image, one, two, none: 16 placeholders each
    tokens, mask = (
        torch.randint(1, 96, (4, 60), generator=rng),
        torch.zeros(4, 60, dtype=torch.long),
    )
    for row, (length, at) in enumerate(zip(lengths, starts)):
        mask[row, :length] = 1
        for a in at:
            tokens[row, a : a + 16] = 100
    images = torch.randn(4, 3, 56, 56, generator=rng).to(dtype)
    with torch.no_grad():
        want = theirs(input_ids=tokens, attention_mask=mask, pixel_values=images).logits
        got = ours(images, tokens.masked_fill(tokens == 100, IMAGE))
    assert_close(got[mask.bool()], want[mask.bool()], dtype, 1e-10)
