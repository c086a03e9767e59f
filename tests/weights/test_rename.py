"""A table of names: what does not fit a model is named."""

import layouts
import pytest
import tiny
import torch
from safetensors.torch import save_file

import weights.infmllm
import weights.rename
from support.errors import BadInput


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("ln_vision.bias", None, "adapter.norm.bias: missing"),
        ("lm_model.extra", torch.ones(2), "lm_model.extra: left over"),
        ("pooler.mlp.0.weight", torch.ones(3, 3), "pooler.mlp.0.weight: misshapen"),
        ("ln_vision.bias", torch.ones(24).int(), "ln_vision.bias: misshapen, .24. of torch.int32"),
        ("adapter.norm.bias", torch.ones(24), "adapter.norm.bias is already filled"),
        ("visual_encoder.pos_embed", torch.ones(16, 24), "pos_embed: misshapen"),  # no CLS
        ("a\n\x1b[2Jb", torch.ones(1), r"\(a  \[2Jb: left over"),  # no commands to a terminal
    ],
)
def test_tensors_that_do_not_fit_are_named(key, value, says, tmp_path):
    ours = tiny.network()
    state = layouts.released(ours) | {key: value}
    if value is None:
        del state[key]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(BadInput, match=says):
        weights.infmllm.load_infmllm(tmp_path / "x.pth", ours.config)


def test_shards_of_two_savings_in_one_folder_are_not_mixed(tmp_path):
    for n in (2, 3):
        save_file(tiny.network().state_dict(), tmp_path / f"model-00001-of-0000{n}.safetensors")
    with pytest.raises(BadInput, match="two of its files hold one tensor"):
        weights.rename.fill(tiny.network(), tmp_path, {}, None)


def test_of_very_many_wrong_tensors_ten_are_listed(tmp_path):
    torch.save({f"wrong{i}": torch.ones(1) for i in range(30)}, tmp_path / "x.pth")
    with pytest.raises(BadInput, match="take the file") as e:
        weights.infmllm.load_infmllm(tmp_path / "x.pth", tiny.network().config)
    assert str(e.value).count(": left over") == 10
