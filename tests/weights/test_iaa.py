"""The released IAA: its layout, and loading it."""

import bpe
import oracle
import pytest
import tiny
import torch
import transformers
from bpe import LLAMA_3, PICTURE

import sample
import weights
import weights.checkpoint
import weights.iaa
from model import IMAGE
from text.templates import SYSTEM

GROUND = "Please provide the bounding box coordinate of the region this sentence describes: "
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
            f"model.embed_tokens_condition{end}.weight": state["lm_head.weight"].shape,
            f"model.norm_condition{end}.weight": (48,),
            f"lm_head_{head}.weight": state["lm_head.weight"].shape,
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


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The tensors of a folder as IAA was released, at a tiny size, with LLaMA-3's tokenizer."""
    monkeypatch.setattr(weights.iaa, "IAA_INNER", [0, 2])
    small = dict(image_size=28, width=48, heads=4, mlp=96, layers=1)
    monkeypatch.setattr(weights.iaa, "CLIP_L", weights.iaa.CLIP_L | small)
    sizes = dict(vocab_size=910, max_position_embeddings=512)
    llama = oracle.llama(num_hidden_layers=3, num_key_value_heads=2, **sizes)
    state = published(llama)
    torch.save(state, tmp_path / "pytorch_model.bin")
    bpe.folder(
        tmp_path, bpe.HEADERS, bos="<|begin_of_text|>", eos="<|eot_id|>", expression="llama-3"
    )
    ids = {"bos_token_id": 900, "eos_token_id": [901, 904]}
    config = llama.config.to_dict() | {"model_type": "IAA"} | ids
    weights.checkpoint.write_json(tmp_path / "config.json", config)
    return state


@torch.no_grad()
def test_the_released_iaa_loads(tmp_path, state):
    models = weights.load_iaa(tmp_path)
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


def test_each_branch_is_asked_as_it_was_trained(tmp_path, state, made, monkeypatch, capsys):
    asked = []

    def recorded(model, images, tokens, **settings):
        asked.append((getattr(model, "branch", None), len(images), tokens, settings))
        return [[5, 6]] * len(tokens)

    monkeypatch.setattr(sample, "generate_ids", recorded)
    picture = f"--image {made}/photos/wide.png "
    for flags in (
        picture + "--branch grounding --task ground --prompt cat",
        picture + "--prompt cat?",
        picture + "--branch none --prompt cat?",
    ):
        argv = f"--ckpt {tmp_path} --device cpu {flags}".split()
        sample.main(argv)
    assert [branch and branch.name for branch, *_ in asked] == ["grounding", "mm", None]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = LLAMA_3
    for (_, images, [ids], settings), question in zip(asked, (GROUND + "cat", "cat?", "cat?")):
        talk = [
            {"role": "system", "content": SYSTEM.strip()},
            {"role": "user", "content": f"{PICTURE}\n{question}"},
        ]
        how = dict(tokenize=True, add_generation_prompt=True, return_dict=False)
        want = theirs.apply_chat_template(talk, **how)
        place = want.index(theirs.convert_tokens_to_ids(PICTURE))
        assert ids == want[:place] + [IMAGE] * 4 + want[place + 1 :] and images == 1
        assert settings["eos"] == (904, 901) and settings["max_new_tokens"] == 1024
        assert "beams" not in settings
