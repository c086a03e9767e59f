"""The released InfMLLM: its file, and its visual embeddings by the paper's formula."""

import layouts
import oracle
import torch
from tiny import network, pictures, same
from torch.nn import functional as F

import weights.infmllm


@torch.no_grad()
def test_the_released_file_loads_and_its_visual_embeddings_are_the_formula(tmp_path):
    source = oracle.randomise(network())
    state = layouts.released(source)
    saved = {"module." + key: t for key, t in state.items()}
    torch.save({"model_state_dict": saved, "epoch": 3}, tmp_path / "InfMLLM.pth")
    model = weights.infmllm.load_infmllm(tmp_path / "InfMLLM.pth", source.config)
    assert same(model, source)

    images = pictures(2) / 255.0
    patches = model.vit(images)[:, 1:]  # (2, 16, 24)
    patches = F.layer_norm(patches, (24,), state["ln_vision.weight"], state["ln_vision.bias"])
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    x = patches[:, torch.tensor(windows)].mean(2)  # (2, 4, 24)
    x = F.linear(x, state["pooler.mlp.0.weight"], state["pooler.mlp.0.bias"])
    x = F.linear(F.gelu(x), state["pooler.mlp.2.weight"], state["pooler.mlp.2.bias"])
    assert torch.allclose(model.encode_images(images), x, atol=1e-5)
