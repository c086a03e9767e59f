"""transformers' models with random weights at tiny sizes, saved as a user's folder: as it writes them today, and with
keys and config renamed to the generation that is on the hub."""

import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

transformers.utils.logging.disable_progress_bar()


def exact_norm(self, x):
    """transformers rounds RMSNorms to fp32 whatever the dtype: noise of 1e-6 that hides our errors in float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(x.dtype)


for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
    norm.forward = exact_norm


def assert_close(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert 0.3 < theirs.std() < 3, f"the oracle's outputs are not of order 1: {theirs.std()}"
    gap = (ours - theirs).abs().max().item()
    assert gap <= (1e-10 if ours.dtype == torch.float64 else 2e-5), gap


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
            elif any(part in name for part in ("embed", "class", "lm_head")):
                p.copy_(0.07 * noise)
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
TOWER = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)


def llama(kind="llama", **changed):
    """A language model of that model_type."""
    config = AutoConfig.for_model(kind, **LLAMA | changed)
    return randomise(AutoModelForCausalLM.from_config(config))


def clip():
    return randomise(CLIPVisionModel(CLIPVisionConfig(**TOWER)))


def siglip(**changed):
    return randomise(SiglipVisionModel(SiglipVisionConfig(**TOWER | changed)))


def whole_siglip(tower):
    """SigLIP around that tower: a text half."""
    text = dict(vocab_size=96, hidden_size=48, num_hidden_layers=5, num_attention_heads=4)
    config = SiglipConfig(vision_config=tower.config.to_dict(), text_config=text)
    whole = randomise(SiglipModel(config))
    whole.vision_model.load_state_dict(tower.state_dict())
    return whole


def blip2():
    return randomise(Blip2VisionModel(Blip2VisionConfig(**TOWER)))


def whole_blip2(tower):
    """BLIP-2 around that tower: a Q-Former and an LLM."""
    former = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80)
    former = Blip2QFormerConfig(vocab_size=96, encoder_hidden_size=48, **former)
    parts = dict(
        vision_config=tower.config, qformer_config=former, text_config=LlamaConfig(**LLAMA)
    )
    config = Blip2Config(**parts, image_token_index=95)
    whole = randomise(Blip2ForConditionalGeneration(config))
    whole.vision_model.load_state_dict(tower.state_dict())
    return whole


def llava(**changed):
    text = LlamaConfig(**LLAMA | dict(vocab_size=104) | changed)  # the image's id is 100
    vision = CLIPVisionConfig(**TOWER)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=100)
    return randomise(LlavaForConditionalGeneration(config))


def folder(model, path, published=False):
    model.save_pretrained(path)
    if published:
        publish(path)
    return path


def publish(folder):
    """Rename a saved folder's keys and config to the generation of the hub; sharded .bin."""
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind in ("llama", "mistral"):
        for layer in range(config["num_hidden_layers"]):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if kind == "llava":
        old = "vision_tower."
        state = {key.replace(old, old + "vision_model."): t for key, t in state.items()}
    if kind == "clip_vision_model":  # the hub's folder is the whole CLIP, text half and all
        state = {"vision_model." + key: t for key, t in state.items()} | {
            "vision_model.embeddings.position_ids": torch.arange(17)[None],
            "logit_scale": torch.ones(()),
            "text_projection.weight": torch.ones(8, 8),
            "visual_projection.weight": torch.ones(8, 48),
        }
        config = {"model_type": "clip", "text_config": {"hidden_size": 8}, "vision_config": config}
    if kind == "siglip":  # the hub's says what is not its class's default
        config["vision_config"] = {
            key: value
            for key, value in config["vision_config"].items()
            if value != getattr(SiglipVisionConfig(), key, None)
        }
    for part in (config, config.get("text_config", {})):
        rope = part.pop("rope_parameters", None)
        if rope:
            part["rope_theta"] = rope.pop("rope_theta")
            if rope["rope_type"] == "linear":
                rope["type"] = rope.pop("rope_type")
            part["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    for number in range(2):
        shard = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({key: state[key] for key in names[number::2]}, folder / shard)
