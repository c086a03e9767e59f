"""The released IAA: its layout, and loading it."""

import oracle
import pytest
import tiny
import torch

import support.start
import weights
import weights.checkpoint
import weights.iaa
from model import IMAGE
from support.errors import BadInput

TOWER = oracle.TOWER | dict(image_size=28, num_hidden_layers=2)


def published(llama):
    """LLaMA-3, LLaVA's tower, and two branches of two layers each, with random weights."""
    state = llama.state_dict()
    shapes = {}
    for end, head, projector in (
        ("", "condtion", "mm_projector"),  # as the released code spells it
        ("_grounding", "condition_grounding", "mm_projector_G"),
    ):
        for key, t in state.items():
            _, layer, name = key.rpartition("layers.1.")
            if layer:
                shapes[f"model.condition_layers{end}.0.{name}"] = t.shape
                shapes[f"model.condition_layers{end}.1.{name}"] = t.shape
        shapes |= {
            f"model.embed_tokens_condition{end}.weight": (96, 48),
            f"model.norm_condition{end}.weight": (48,),
            f"lm_head_{head}.weight": (96, 48),
            f"model.{projector}.0.weight": (48, 48),
            f"model.{projector}.0.bias": (48,),
            f"model.{projector}.2.weight": (48, 48),
            f"model.{projector}.2.bias": (48,),
        }
    tower = oracle.CLIPVisionModel(oracle.CLIPVisionConfig(**TOWER))
    state |= {
        f"model.vision_tower.vision_tower.vision_model.{key}": t
        for key, t in tower.state_dict().items()
    }
    return state | {key: torch.randn(shape) for key, shape in shapes.items()}


@torch.no_grad()
def test_the_released_iaa_loads_and_says_what_prompting_it_needs_and_is_refused_for_a_chat(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(weights.iaa, "IAA_INNER", [0, 2])
    small = dict(image_size=28, width=48, heads=4, mlp=96, layers=1)
    monkeypatch.setattr(weights.iaa, "CLIP_L", weights.iaa.CLIP_L | small)
    llama = oracle.llama(num_hidden_layers=3, num_key_value_heads=2)
    state = published(llama)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = llama.config.to_dict() | {"model_type": "IAA"}
    weights.checkpoint.write_json(tmp_path / "config.json", config)
    models = weights.load_iaa(tmp_path)
    assert "LLaMA-3's tokenizer, which this program does not read" in capsys.readouterr().err
    mm, grounding = models["mm"], models["grounding"]
    for name, key in {
        "branch.layers.1.up.weight": "model.condition_layers_grounding.1.mlp.up_proj.weight",
        "branch.lm_head.weight": "lm_head_condition_grounding.weight",
        "branch.adapter.fc2.bias": "model.mm_projector_G.2.bias",
        "base.llm.layers.2.up.weight": "model.layers.2.mlp.up_proj.weight",
    }.items():
        assert torch.equal(grounding.get_parameter(name), state[key]), name
    assert torch.equal(mm.adapter.fc2.bias, state["model.mm_projector.2.bias"])
    assert mm.base is grounding.base

    weights.save(tmp_path / "base", mm.base)
    weights.save(tmp_path / "g", grounding, base=tmp_path / "base")
    assert tiny.same(weights.load(tmp_path / "g"), grounding)
    grounding(torch.zeros(1, 3, 28, 28), torch.tensor([[1] + [IMAGE] * 4 + [5]]))
    with pytest.raises(BadInput, match="LLaMA-3's tokenizer"):
        support.start.load_model(tmp_path)
