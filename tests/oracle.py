"""transformers' models with random weights at tiny sizes, saved as a user's folder: as it writes them today, and with
keys and config renamed to the generation that is on the hub."""

import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

transformers.utils.logging.disable_progress_bar()


def randomise(model, seed=0):
    """Weights large enough that every part matters and outputs are of order 1; norms near one, biases not zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.ndim == 1 and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif p.ndim == 1:
                p.copy_(0.1 * noise)
            elif "embed" in name or "class" in name:
                p.copy_(0.07 * noise)
            elif "lm_head" in name:
                p.copy_(0.07 * noise)  # logits of order 1
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return model.eval()


LLAMA = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=6,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
)
CLIP = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)


def llama(**changed):
    return randomise(LlamaForCausalLM(LlamaConfig(**LLAMA | changed)))


def clip():
    return randomise(CLIPVisionModel(CLIPVisionConfig(**CLIP)))


def blip2():
    return randomise(Blip2VisionModel(Blip2VisionConfig(**CLIP)))


def llava(**changed):
    text = LlamaConfig(
        **LLAMA | dict(vocab_size=104) | changed
    )  # 104 rows, the image's id among the last
    return randomise(
        LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**CLIP), text_config=text, image_token_index=100
            )
        )
    )


def publish(folder, sparse=False):
    """Rename a saved folder's keys and config to the generation of the hub; sharded .bin with an index."""
    state, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    kind = config["model_type"]

    def old(name):
        if kind == "clip_vision_model":
            return "vision_model." + name
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    state = {old(k): v for k, v in state.items()}
    if kind == "clip_vision_model":  # the hub's folder is the whole CLIP, text half and all
        state |= {
            "vision_model.embeddings.position_ids": torch.arange(17)[None],
            "logit_scale": torch.ones(()),
            "text_model.final_layer_norm.weight": torch.ones(8),
            "text_projection.weight": torch.ones(8, 8),
            "visual_projection.weight": torch.ones(8, 48),
        }
        config = {"model_type": "clip", "text_config": {"hidden_size": 8}, "vision_config": config}
    for c in (config, config.get("text_config", {})):
        if rope := c.pop("rope_parameters", None):
            c["rope_theta"] = rope.pop("rope_theta")
            c["rope_scaling"] = (
                None
                if rope["rope_type"] == "default"
                else {
                    "type" if (k, v) == ("rope_type", "linear") else k: v for k, v in rope.items()
                }
            )
    if kind == "llama":
        state |= {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)
        }
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for shard, keys in shards.items():
        torch.save({k: state[k] for k in keys}, folder / shard)
    index = {"weight_map": {k: shard for shard, keys in shards.items() for k in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def folder(model, path, published=False):
    model.save_pretrained(path)
    if published:
        publish(path)
    return path
