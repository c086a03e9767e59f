"""The rename tables against the real layouts, on the meta device; and weights of the released InfMLLM's kind."""

import json
import subprocess
import sys

import oracle
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import weights.infmllm
import weights.llama
import weights.llava
import weights.rename
import weights.towers
from model import EVA_G, IMAGE, PRESETS, Config, InfMLLM, Llama, ViT, ViTConfig, count, init
from model import LlamaConfig as OurLlamaConfig
from support.errors import BadInput

# as their config.json say on the hub
LLAMA2_7B = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    vocab_size=32000,
    model_type="llama",
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_scaling=None,
)
TINYLLAMA = LLAMA2_7B | dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    attention_bias=False,
)
CLIP_L_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
CLIP_TEXT = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
LLAVA_TEXT = dict(
    max_position_embeddings=4096, model_type="llama", rms_norm_eps=1e-5, vocab_size=32064
)
LLAVA_VISION = dict(
    hidden_size=1024,
    image_size=336,
    intermediate_size=4096,
    model_type="clip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=24,
    patch_size=14,
    projection_dim=768,
    vocab_size=32000,
)


def shapes_of(make):
    with torch.device("meta"):
        model = make()
    return {k: tuple(t.shape) for k, t in model.state_dict().items()}


def hf_config(cls, d):
    return cls(**{k: v for k, v in d.items() if k not in ("model_type", "rope_scaling")})


def eva_g(blocks=40, side=16):
    d, mlp = 1408, 6144
    block = {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.q_bias": (d,),
        "attn.v_bias": (d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
        "mlp.fc1.weight": (mlp, d),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (d, mlp),
        "mlp.fc2.bias": (d,),
    }
    return {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + side * side, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
        "patch_embed.proj.bias": (d,),
    } | {f"blocks.{i}.{k}": s for i in range(blocks) for k, s in block.items()}


def llama_published(config):
    shapes = shapes_of(lambda: LlamaForCausalLM(hf_config(LlamaConfig, config)))
    layers = range(config["num_hidden_layers"])
    return shapes | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in layers}


def places(shapes, table, model):
    """{their key: our names}, where every key is known, every tensor of ours filled, and every shape right."""
    matched = weights.rename.match(shapes, table)
    theirs = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert not list(weights.rename.faults(matched, theirs, dict(model.named_parameters())))
    return matched


def dropped(plan):
    return {key for key, names in plan.items() if not any(names)}


def used(plan, shapes):
    """How many numbers go into our model: a fused bias may hold some that do not."""
    total = 0
    for key, names in plan.items():
        kept = sum(name is not None for name in names)
        total += torch.Size(shapes[key]).numel() * kept // len(names)
    return total


@pytest.mark.parametrize("config", [LLAMA2_7B, TINYLLAMA])
def test_every_tensor_of_the_real_llamas_finds_its_place(config):
    ours = weights.rename.on_meta(Llama, c := weights.llama.llama_config(config, "config"))
    shapes = llama_published(config)
    plan = places(shapes, weights.llama.llama_table(c), ours)
    assert len(plan) == len(shapes)
    assert used(plan, shapes) == count(ours)
    assert dropped(plan) == {k for k in shapes if "inv_freq" in k}


def test_every_tensor_of_clip_finds_its_place_with_and_without_its_text_half():
    whole = shapes_of(
        lambda: CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_L_336))
    )
    whole |= {
        "vision_model.embeddings.position_ids": (1, 577),
        "text_model.embeddings.position_ids": (1, 77),
    }
    alone = shapes_of(lambda: CLIPVisionModel(hf_config(oracle.CLIPVisionConfig, CLIP_L_336)))
    c = weights.towers.vit_config(CLIP_L_336 | {"model_type": "clip_vision_model"}, "config")
    ours = weights.rename.on_meta(ViT, c)
    table = weights.towers.vit_table(weights.towers.TRANSFORMERS, c)
    for shapes in (whole, alone, {"vision_model." + k: s for k, s in alone.items()}):
        plan = places(shapes, table, ours)
        assert used(plan, shapes) == count(ours) == count(InfMLLM_on_meta("llava-7b").vit)


def InfMLLM_on_meta(preset):
    return weights.rename.on_meta(InfMLLM, PRESETS[preset]())


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "vision_tower."])
def test_every_tensor_of_llava_finds_its_place(prefix):
    config = LlavaConfig(
        vision_config=oracle.CLIPVisionConfig(**CLIP_L_336),
        text_config=hf_config(LlamaConfig, LLAMA2_7B | LLAVA_TEXT),
    )
    shapes = shapes_of(lambda: LlavaForConditionalGeneration(config))

    def published(k):
        if k == "lm_head.weight":
            return "language_model.lm_head.weight"
        k = k.removeprefix("model.")
        if k.startswith("language_model."):
            return k.replace("language_model.", "language_model.model.", 1)
        return k.replace("vision_tower.", prefix)

    shapes = {published(k): s for k, s in shapes.items()}
    c = Config(
        weights.towers.vit_config(LLAVA_VISION, ""),
        weights.llama.llama_config(LLAVA_TEXT, ""),
        adapter="mlp",
        ln_vision=False,
    )
    ours = weights.rename.on_meta(InfMLLM, c)
    plan = places(shapes, weights.llava.llava_table(c), ours)
    assert all(
        "encoder.layers.23." in k or "post_layernorm" in k or k.endswith("k_proj.bias")
        for k in dropped(plan)
    )
    assert used(plan, shapes) == count(ours) == count(InfMLLM_on_meta("llava-7b"))


def test_every_tensor_of_eva_g_and_of_the_released_infmllm_finds_its_place():
    shapes = eva_g() | {
        "norm.weight": (1408,),
        "norm.bias": (1408,),
        "head.weight": (1000, 1408),
        "head.bias": (1000,),
    }
    ours = weights.rename.on_meta(ViT, c := ViTConfig(224, **EVA_G))
    plan = places(shapes, weights.towers.vit_table(weights.towers.EVA, c), ours)
    assert dropped(plan) == {k for k in shapes if k.startswith(("blocks.39.", "norm.", "head."))}
    assert used(plan, shapes) == count(ours)

    shapes = (
        {"visual_encoder." + k: s for k, s in eva_g(39, 32).items()}
        | {"lm_model." + k: s for k, s in llama_published(LLAMA2_7B).items()}
        | {
            "ln_vision.weight": (1408,),
            "ln_vision.bias": (1408,),
            "pooler.mlp.0.weight": (4096, 1408),
            "pooler.mlp.0.bias": (4096,),
            "pooler.mlp.2.weight": (4096, 4096),
            "pooler.mlp.2.bias": (4096,),
        }
    )
    ours = InfMLLM_on_meta("infmllm-7b")
    plan = places(shapes, weights.infmllm.infmllm_table(ours.config), ours)
    assert used(plan, shapes) == count(ours)
    assert dropped(plan) == {k for k in shapes if "inv_freq" in k}


def test_the_presets_count_what_the_oracles_count():
    assert count(InfMLLM_on_meta("small").llm) == sum(
        torch.Size(s).numel()
        for s in shapes_of(lambda: LlamaForCausalLM(hf_config(LlamaConfig, TINYLLAMA))).values()
    )
    llama13 = LLAMA2_7B | dict(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
    for preset, config in (("infmllm-7b", LLAMA2_7B), ("infmllm-13b", llama13)):
        ours = InfMLLM_on_meta(preset)
        theirs = shapes_of(lambda: LlamaForCausalLM(hf_config(LlamaConfig, config)))  # noqa: B023
        assert count(ours.llm) == sum(torch.Size(s).numel() for s in theirs.values())
        assert count(ours.vit) == sum(torch.Size(s).numel() for s in eva_g(39, 32).values())


# ---------------------------------------------------------------------------------------------------------------------

TINY = dict(vit=ViTConfig(64, 8, 24, 2, 3, 40), llm=OurLlamaConfig(40, 32, 2, 4, 2, 48), grid=4)


def theirs_of(table, model):
    """{their key: our names for its blocks of rows}: a table's first line for each tensor, written out for a model."""
    keys, ours = {}, dict(model.named_parameters())
    for theirs, names in table.items():
        names = names if isinstance(names, tuple) else (names,)
        for number in range(40):
            for leaf in ("weight", "bias"):
                values = (number, leaf) if "{}." in theirs else (leaf,)
                filled = [name and name.format(*values) for name in names]
                if [name for name in filled if ours.pop(name, None) is not None]:
                    keys[theirs.format(*values)] = filled
    return keys


def released(model):
    """A state dict under the names of the released file, values from our model."""
    table, ours = weights.infmllm.infmllm_table(model.config), dict(model.named_parameters())
    state = {
        key: torch.cat([ours[name].detach() for name in names])
        for key, names in theirs_of(table, model).items()
    }
    state["visual_encoder.cls_token"] = state["visual_encoder.cls_token"][None, None]
    state["visual_encoder.pos_embed"] = state["visual_encoder.pos_embed"][None]
    return state


def test_the_released_layout_loads_and_its_visual_embeddings_are_the_formula(tmp_path):
    source = init(InfMLLM(Config(**TINY)), seed=3)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for p in source.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=rng))
    state = released(source)
    torch.save(
        {"model_state_dict": {"module." + k: v for k, v in state.items()}, "epoch": 3},
        tmp_path / "InfMLLM.pth",
    )
    model = weights.infmllm.load_infmllm(tmp_path / "InfMLLM.pth", Config(**TINY))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))

    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x, got = model.vit(images), model.encode_images(images)
    x = F.layer_norm(x, (24,), state["ln_vision.weight"], state["ln_vision.bias"], 1e-5)[
        :, 1:
    ]  # (2, 64, 24)
    for n in range(2):
        for row in range(4):
            for col in range(4):
                window = [(2 * row + i) * 8 + 2 * col + j for i in (0, 1) for j in (0, 1)]
                h = F.gelu(
                    state["pooler.mlp.0.weight"] @ x[n, window].mean(0) + state["pooler.mlp.0.bias"]
                )
                want = state["pooler.mlp.2.weight"] @ h + state["pooler.mlp.2.bias"]
                assert (got[n, 4 * row + col] - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda s: s.pop("ln_vision.bias"), "adapter.norm.bias: missing"),
        (lambda s: s.update({"lm_model.extra": torch.ones(2)}), "lm_model.extra: left over"),
        (
            lambda s: s.update({"pooler.mlp.0.weight": torch.ones(3, 3)}),
            "pooler.mlp.0.weight: misshapen",
        ),
        (
            lambda s: s.update({"lm_model.model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)}),
            "has no llm.layers.7",
        ),
    ],
)
def test_missing_left_over_and_misshapen_tensors_are_named(harm, says, tmp_path):
    state = released(InfMLLM(Config(**TINY)))
    harm(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(BadInput, match=says):
        weights.infmllm.load_infmllm(tmp_path / "x.pth", Config(**TINY))


def test_at_most_ten_wrong_tensors_are_listed(tmp_path):
    torch.save({f"wrong{i}": torch.ones(1) for i in range(30)}, tmp_path / "x.pth")
    with pytest.raises(BadInput) as e:
        weights.infmllm.load_infmllm(tmp_path / "x.pth", Config(**TINY))
    assert str(e.value).count(": left over") == 10 and "take the file" in str(e.value)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"x": Attack(tmp_path / "marker")}, tmp_path / "x.pth")
    with pytest.raises(BadInput, match="refused"):
        weights.infmllm.load_infmllm(tmp_path / "x.pth", Config(**TINY))
    assert not (tmp_path / "marker").exists()


def test_configs_that_are_not_llama_are_refused(tmp_path):
    for harm in (
        dict(model_type="mistral"),
        dict(attention_bias=True),
        dict(head_dim=64),
        dict(hidden_act="gelu"),
    ):
        with pytest.raises(BadInput, match="not LLaMA"):
            weights.llama.llama_config(LLAMA2_7B | harm, "config.json")
    yarn = dict(rope_scaling={"type": "yarn", "factor": 4.0})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B | yarn))
    with pytest.raises(BadInput, match="rope scaling 'yarn' is not one of"):
        weights.llama.load_llama(tmp_path)


def test_images_placeholder_is_not_a_token_id():
    assert IMAGE < 0


PEAK = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
import weights
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
weights.llama.load_llama({warm!r}, torch.bfloat16)
Path("/proc/self/clear_refs").write_text("5")          # the high-water mark starts again from what is held now
before = peak()
model = weights.llama.load_llama({path!r}, torch.bfloat16)
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_holds_at_most_a_sixth_more_than_the_weights(kind, tmp_path, request):
    config = dict(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(LlamaConfig(**config)).half()  # 170M parameters, 340 MB
    if kind == "safetensors":
        model.save_pretrained(tmp_path, max_shard_size="120MB")
    else:
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    oracle.folder(oracle.llama(), tmp_path / "warm", published=kind == "bin")
    code = PEAK.format(
        root=str(request.config.rootpath), warm=str(tmp_path / "warm"), path=str(tmp_path)
    )
    ratio = float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert 0.9 < ratio <= 1.15, ratio
