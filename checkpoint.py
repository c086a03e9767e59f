"""Weights in and out: our own checkpoint directory, and the files that others publish.

    save(dir, model, tokenizer, ...)     config.json, model.safetensors, tokenizer.model, and what resuming needs
    load(dir) -> InfMLLM                 no flags: the architecture travels with the weights
    load_llama, load_vit, load_llava, load_infmllm, load_iaa, export_llama

The checkpoint of a branch (IAA) holds the branch's tensors alone and names its base; load() brings both, and
add_branch(model, dir) puts further branches beside it.

A foreign file is read through a table: its names on the left, ours on the right. `{}` is a number, `*` any ending,
None means dropped on purpose, a tuple takes a matrix apart by rows, and `name[1/3]` is the second of three row blocks
of ours. A key that no line names, a tensor of ours that no key fills, or a shape that differs is an error.
No file is unpickled but by torch.load(weights_only=True), which builds tensors and nothing else.
"""
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import BadInput
from model import (
    BRANCHES, CLIP_L, EVA_G, Config, InfMLLM, Llama, LlamaConfig, ViT, ViTConfig, frequencies, resize_positions,
)

# ---------------------------------------------------------------------------------------------------------------------
# Their names and ours

LLAMA = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.o.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.up.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.down.weight",
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,         # computed from the config
    "model.rotary_emb.inv_freq": None,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
EVA = {      # eva_vit_g.pth and the visual_encoder of InfMLLM_7B
    "cls_token": "cls",
    "pos_embed": "positions",
    "patch_embed.proj.weight": "patch_embed.weight",
    "patch_embed.proj.bias": "patch_embed.bias",
    "blocks.{}.norm1.weight": "blocks.{}.norm1.weight",
    "blocks.{}.norm1.bias": "blocks.{}.norm1.bias",
    "blocks.{}.attn.qkv.weight": "blocks.{}.qkv.weight",
    "blocks.{}.attn.q_bias": "blocks.{}.q_bias",
    "blocks.{}.attn.v_bias": "blocks.{}.v_bias",
    "blocks.{}.attn.proj.weight": "blocks.{}.proj.weight",
    "blocks.{}.attn.proj.bias": "blocks.{}.proj.bias",
    "blocks.{}.norm2.weight": "blocks.{}.norm2.weight",
    "blocks.{}.norm2.bias": "blocks.{}.norm2.bias",
    "blocks.{}.mlp.fc1.weight": "blocks.{}.fc1.weight",
    "blocks.{}.mlp.fc1.bias": "blocks.{}.fc1.bias",
    "blocks.{}.mlp.fc2.weight": "blocks.{}.fc2.weight",
    "blocks.{}.mlp.fc2.bias": "blocks.{}.fc2.bias",
    "norm.*": None, "fc_norm.*": None, "head.*": None,             # what EVA was trained with and BLIP-2 leaves out
}
TOWER = {    # the lines that transformers' CLIP and BLIP-2 towers share
    "embeddings.class_embedding": "cls",
    "embeddings.patch_embedding.weight": "patch_embed.weight",
    "embeddings.position_ids": None,
    "encoder.layers.{}.layer_norm1.weight": "blocks.{}.norm1.weight",
    "encoder.layers.{}.layer_norm1.bias": "blocks.{}.norm1.bias",
    "encoder.layers.{}.layer_norm2.weight": "blocks.{}.norm2.weight",
    "encoder.layers.{}.layer_norm2.bias": "blocks.{}.norm2.bias",
    "encoder.layers.{}.mlp.fc1.weight": "blocks.{}.fc1.weight",
    "encoder.layers.{}.mlp.fc1.bias": "blocks.{}.fc1.bias",
    "encoder.layers.{}.mlp.fc2.weight": "blocks.{}.fc2.weight",
    "encoder.layers.{}.mlp.fc2.bias": "blocks.{}.fc2.bias",
    "post_layernorm.*": None,
}
CLIP = TOWER | {
    "embeddings.position_embedding.weight": "positions",
    "pre_layrnorm.weight": "pre_norm.weight",                      # their spelling
    "pre_layrnorm.bias": "pre_norm.bias",
    "encoder.layers.{}.self_attn.q_proj.weight": "blocks.{}.qkv.weight[0/3]",
    "encoder.layers.{}.self_attn.k_proj.weight": "blocks.{}.qkv.weight[1/3]",
    "encoder.layers.{}.self_attn.v_proj.weight": "blocks.{}.qkv.weight[2/3]",
    "encoder.layers.{}.self_attn.q_proj.bias": "blocks.{}.q_bias",
    "encoder.layers.{}.self_attn.k_proj.bias": None,               # cancels in the softmax
    "encoder.layers.{}.self_attn.v_proj.bias": "blocks.{}.v_bias",
    "encoder.layers.{}.self_attn.out_proj.weight": "blocks.{}.proj.weight",
    "encoder.layers.{}.self_attn.out_proj.bias": "blocks.{}.proj.bias",
}
CLIP_TEXT = {"text_model.*": None, "text_projection.weight": None, "visual_projection.weight": None,
             "logit_scale": None}
BLIP2 = TOWER | {
    "embeddings.position_embedding": "positions",
    "embeddings.patch_embedding.bias": "patch_embed.bias",
    "encoder.layers.{}.self_attn.qkv.weight": "blocks.{}.qkv.weight",
    "encoder.layers.{}.self_attn.qkv.bias": ("blocks.{}.q_bias", None, "blocks.{}.v_bias"),
    "encoder.layers.{}.self_attn.projection.weight": "blocks.{}.proj.weight",
    "encoder.layers.{}.self_attn.projection.bias": "blocks.{}.proj.bias",
}


def prefixed(table, theirs, ours=""):
    """The same table for tensors that stand one floor deeper, there and here."""
    def put(name): return tuple(put(n) for n in name) if isinstance(name, tuple) else name and ours + name
    return {theirs + key: put(name) for key, name in table.items()}


def clip(config):
    """CLIP's table, without the last block: LLaVA reads hidden state -2."""
    return {f"encoder.layers.{config.layers}.*": None} | CLIP


def eva(config):
    """EVA's table; block 39 of the published file does not run."""
    return {f"blocks.{config.layers}.*": None} | EVA


def llama(config):
    return LLAMA | ({"lm_head.weight": None} if config.tied else {})


def llava(c):        # transformers 5 leaves `vision_model.` out where the published files have it
    projector = {f"multi_modal_projector.linear_{i}.{leaf}": f"adapter.fc{i}.{leaf}"
                 for i in (1, 2) for leaf in ("weight", "bias")}
    vit = clip(c.vit)
    return (prefixed(llama(c.llm), "language_model.", "llm.") | projector
            | prefixed(vit, "vision_tower.vision_model.", "vit.") | prefixed(vit, "vision_tower.", "vit."))


def infmllm(c):
    ends = [(f"ln_vision.{leaf}", f"adapter.norm.{leaf}") for leaf in ("weight", "bias")]
    ends += [(f"pooler.mlp.{2 * i - 2}.{leaf}", f"adapter.fc{i}.{leaf}") for i in (1, 2) for leaf in ("weight", "bias")]
    return prefixed(eva(c.vit), "visual_encoder.", "vit.") | prefixed(llama(c.llm), "lm_model.", "llm.") | dict(ends)


IAA = {"mm": "", "grounding": "_grounding"}        # our branches, and how their names end in the released file ...
IAA_INNER = [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]         # ... whose layers run after these of 32
LLAMA_3 = "the released IAA is prompted with LLaMA-3's tokenizer, which this program does not read"


def iaa(c):
    """The released IAA: LLaMA-3's names, LLaVA's for its tower, and two branches."""
    table = prefixed(llama(c.llm), "", "llm.") | prefixed(clip(c.vit), "model.vision_tower.vision_tower.vision_model.",
                                                          "vit.")
    layer = {k.removeprefix("model.layers.{}."): v and v.removeprefix("layers.{}.") for k, v in LLAMA.items()
             if k.startswith("model.layers.")}
    for name, end in IAA.items():
        ours = f"{BRANCHES}{name}."
        table |= prefixed(layer, f"model.condition_layers{end}.{{}}.", ours + "layers.{}.")
        table |= {f"model.embed_tokens_condition{end}.weight": ours + "embed.weight",
                  f"model.norm_condition{end}.weight": ours + "norm.weight"}
        for head in ("condtion", "condition"):                     # the first is how the released code spells it
            table[f"lm_head_{head}{end}.weight"] = ours + "lm_head.weight"
        # the text path has no projector: ours of the base is that of mm, one module under two names
        ours, theirs = ("adapter.", "mm_projector") if name == "mm" else (ours + "adapter.", "mm_projector_G")
        table |= {f"model.{theirs}.{2 * i - 2}.{leaf}": f"{ours}fc{i}.{leaf}"
                  for i in (1, 2) for leaf in ("weight", "bias")}
    return table


# ---------------------------------------------------------------------------------------------------------------------
# From a table and the shapes on both sides to a list of moves

def targets_of(key, table):
    """Our names for their key, one per row block that it is taken apart into (None: dropped). KeyError if unknown."""
    for theirs, ours in table:
        if match := theirs.fullmatch(key):
            number = match[1] if match.groups() else ""
            return [name and name.replace("{}", number) for name in (ours if isinstance(ours, tuple) else (ours,))]
    raise KeyError(key)


def moves(model, shapes, table, what):
    """[(their key, [(our name, row block, of how many), None if dropped, ...])]; an error lists all that is wrong."""
    table = [(re.compile(re.escape(k).replace(r"\{\}", r"(\d+)").replace(r"\*", ".*")), v) for k, v in table.items()]
    ours, filled, plan, wrong = dict(model.named_parameters()), {}, [], []
    for key, shape in shapes.items():
        if len(wrong) > 100: break                                 # a stranger's file may have a million names
        try: names = targets_of(key, table)
        except KeyError: wrong.append(f"{key}: left over, no tensor of this name is known"); continue
        targets = []
        for name in names:
            if name is None: targets.append(None); continue
            name, block, of = re.fullmatch(r"(.*?)(?:\[(\d)/(\d)\])?", name).groups()
            block, of = int(block or 0), int(of or 1)
            if name not in ours: wrong.append(f"{key}: left over, this model has no {name}"); continue
            want, have = list(ours[name].shape), list(shape)
            while len(have) > len(want) and have[0] == 1: have = have[1:]              # cls_token (1,1,D) is our (D)
            have = [have[0] * of // len(names), *have[1:]]
            grid = name.endswith("positions") and have[1:] == want[1:] and math.isqrt(have[0] - 1) ** 2 == have[0] - 1
            if have != want and not grid: wrong.append(f"{key}: misshapen, {list(shape)} for our {name} {want}")
            if (name, block) in filled: wrong.append(f"{key}: {name} is already filled by {filled[name, block]}")
            filled[name, block] = key
            targets.append((name, block, of))
        plan.append((key, targets))
    full = {name: sum(1 for n, _ in filled if n == name) for name, _ in filled}
    blocks = {name: of for _, targets in plan for name, _, of in filter(None, targets)}
    wrong += [f"{name}: missing, nothing in the file fills it" for name in ours
              if full.get(name, 0) < blocks.get(name, 1)]
    if wrong:
        raise BadInput(f"{what}: {len(wrong)} tensors do not fit this model ({', '.join(wrong[:10])}"
                       f"{', ...' if len(wrong) > 10 else ''}); take the file and the config.json that belong together")
    return plan


def fill(model, files, table, what, dtype):
    """Give a model on the meta device its weights, a tensor at a time: never more than one beyond what stays."""
    where = {key: file for file in files for key in file.shapes}
    shapes = {key: shape for file in files for key, shape in file.shapes.items()}
    for key, targets in moves(model, shapes, table, what):
        if not any(targets): continue
        for part, target in zip(where[key].read(key).chunk(len(targets)), targets):
            if target: put(model, *target, part, dtype)
    return model


def put(model, name, block, of, tensor, dtype):
    path, leaf = name.rpartition(".")[::2]
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    if leaf == "positions": tensor = resize_positions(tensor.reshape(-1, old.shape[1]), math.isqrt(len(old) - 1))
    if old.is_meta:        # never an alias of the file: that would keep all of it in memory
        new = nn.Parameter(torch.empty(old.shape, dtype=dtype or tensor.dtype), requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
        old = new
    old.data.chunk(of)[block].copy_(tensor.reshape(old.data.chunk(of)[block].shape))


# ---------------------------------------------------------------------------------------------------------------------
# Files of tensors

NUMBERS = ("F16", "BF16", "F32", "F64")


class Safetensors:
    def __init__(self, path):
        self.path = path
        try:
            with safe_open(path, "pt") as f:
                parts = {k: f.get_slice(k) for k in f.keys()}
                self.shapes = {k: part.get_shape() for k, part in parts.items()}
                odd = [f"{k} of {part.get_dtype()}" for k, part in parts.items() if part.get_dtype() not in NUMBERS]
        except (SafetensorError, OSError, ValueError) as e: raise BadInput(unreadable(path, e)) from None
        if odd: raise BadInput(unreadable(path, f"{odd[0]}, where {', '.join(NUMBERS)} are known"))

    def read(self, key):       # opened for each tensor: pages of a mapped file count as ours until it is closed
        with safe_open(self.path, "pt") as f: return f.get_tensor(key)


class Pickled:
    """.bin, .pth, .pt through weights_only=True, which builds tensors and refuses anything that would run.

    A file of the newer zip kind is mapped, anew for each tensor (as above); an older one has to be read whole.
    """
    def __init__(self, path):
        self.path, self.state = path, None
        try: shapes = self.open()
        except RuntimeError: shapes = self.state = self.open(mmap=False)
        self.shapes = {k: tuple(t.shape) for k, t in shapes.items()}

    def open(self, mmap=True):
        try: state = torch.load(self.path, weights_only=True, map_location="cpu", mmap=mmap)
        except Exception as e:          # torch.load raises whatever its reading of a broken file stumbles over
            if "nsupported" in str(e) or "weights_only" in str(e).lower():
                raise BadInput(f"{self.path}: holds more than tensors and was refused, as reading it could run code; "
                               "have its author save a plain state dict") from None
            if mmap and isinstance(e, RuntimeError) and "mmap" in str(e): raise
            raise BadInput(unreadable(self.path, e)) from None
        for wrap in ("model_state_dict", "state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrap), dict): state = state[wrap]
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise BadInput(f"{self.path}: is not a state dict (names with their tensors); save one with torch.save")
        return {str(k).removeprefix("module."): t for k, t in state.items()}

    def read(self, key): return (self.state or self.open())[key]


def unreadable(path, e):
    why = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
    return f"{path}: cannot be read as weights ({why}); download or copy it again"


def weight_files(path):
    """All files of tensors of a folder (sharded with an index, or single) or the one file that was named."""
    path = Path(path)
    if path.is_file(): return [Safetensors(path) if path.suffix == ".safetensors" else Pickled(path)]
    for stem, suffix, kind in (("model", "safetensors", Safetensors), ("pytorch_model", "bin", Pickled)):
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict): raise BadInput(f"{index}: has no weight_map; download it again")
            for name in set(listed.values()):
                if not isinstance(name, str) or Path(name).name != name or not os.path.isfile(path / name):
                    raise BadInput(f"{index}: names the shard {str(name)[:80]!r}, which is not in the folder; "
                                   "download it again")
            return [kind(path / name) for name in sorted(set(listed.values()))]
        if single.is_file(): return [kind(single)]
    raise BadInput(f"{path}: no model.safetensors, no pytorch_model.bin and no index of shards; "
                   "name the folder that holds the weights")


def read_json(path):
    try: value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError: raise BadInput(f"{path}: no such file; it belongs beside the weights") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: is not readable JSON ({str(e)[:100]}); download or copy it again") from None
    if not isinstance(value, dict): raise BadInput(f"{path}: is not a JSON object; download or copy it again")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Their configs; a key that a published config.json leaves out has transformers' default

def from_a_stranger(make):
    """The Config that make(d, what) finds in a config.json, or a sentence, whatever has been written there."""
    @functools.wraps(make)
    def checked(d, what):
        try: return sane(make(d, what))
        except BadInput: raise
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, AssertionError) as e:
            why = f"{type(e).__name__}: {str(e)[:100]}"
            raise BadInput(f"{what}: its config.json describes no model known here ({why}); take another") from None
    return checked


LIMITS = {"layers": 1000, "vocab": 2 ** 24}        # of a config; its other numbers end at a million


def sane(config):
    """Numbers of the right kind, and such that nobody runs out of memory in building the model without its weights."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value): sane(value); continue
        right = (int, float) if f.type is float else f.type
        wrong = f"{f.name} is {str(value)[:50]}"
        assert isinstance(value, right) and (f.type is bool or not isinstance(value, bool)), wrong
        if f.type is int: assert 1 <= value <= LIMITS.get(f.name, 2 ** 20), wrong
        if f.type is float: assert 0 < value < 1e12, wrong
    if isinstance(config, LlamaConfig):
        assert config.width // config.heads % 2 == 0, "half a pair to rotate"
        assert sum(map(len, config.branches.values())) <= LIMITS["layers"], "too many inner layers"
        assert frequencies(config, "cpu").isfinite().all(), f"rope {str(config.rope)[:80]}"
    return config


@from_a_stranger
def llama_config(d, what):
    ours = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    refused = [f"{key}={d[key]!r}" for key, only in ours.items() if d.get(key, only) != only]
    width, heads = d.get("hidden_size", 4096), d.get("num_attention_heads", 32)
    if (d.get("head_dim") or width // heads) != width // heads: refused.append(f"head_dim={d['head_dim']}")
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"): refused.append(f"rope scaling {kind!r}")
    if refused: raise BadInput(f"{what}: {', '.join(refused)} is not LLaMA as built here; take LLaMA or Vicuna")
    theta = rope.get("rope_theta", d.get("rope_theta", 1e4))
    scaling = {} if kind == "default" else {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    if scaling: scaling["rope_type"] = kind
    return LlamaConfig(d.get("vocab_size", 32000), width, d.get("num_hidden_layers", 32), heads,
                       d.get("num_key_value_heads") or heads, d.get("intermediate_size", 11008),
                       d.get("max_position_embeddings", 2048), d.get("rms_norm_eps", 1e-6), theta, scaling,
                       d.get("tie_word_embeddings", False))


@from_a_stranger
def clip_config(d, what):
    if d.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
        raise BadInput(f"{what}: hidden_act={d['hidden_act']!r} is no CLIP; take a CLIP vision tower")
    return ViTConfig(d.get("image_size", 224), d.get("patch_size", 32), d.get("hidden_size", 768),
                     d.get("num_hidden_layers", 12) - 1, d.get("num_attention_heads", 12),
                     d.get("intermediate_size", 3072), act=d.get("hidden_act", "quick_gelu"),
                     eps=d.get("layer_norm_eps", 1e-5), patch_bias=False, pre_norm=True)


@from_a_stranger
def blip2_config(d, what):
    return ViTConfig(d.get("image_size", 224), d.get("patch_size", 14), d.get("hidden_size", 1408),
                     d.get("num_hidden_layers", 39), d.get("num_attention_heads", 16), d.get("intermediate_size", 6144),
                     act=d.get("hidden_act", "gelu"), eps=d.get("layer_norm_eps", 1e-6))


def on_meta(kind, config):
    with torch.device("meta"): return kind(config)


def load_llama(path, dtype=torch.float32):
    """A LLaMA or Vicuna folder as published or as transformers saves it."""
    config = llama_config(read_json(Path(path) / "config.json"), path)
    return fill(on_meta(Llama, config), weight_files(path), llama(config), path, dtype)


def load_vit(path, image_size=None, dtype=torch.float32, config=None):
    """eva_vit_g.pth, a CLIP folder (its text half is dropped) or a Blip2VisionModel folder; config: of another EVA."""
    path = Path(path)
    if path.is_dir():
        d = read_json(path / "config.json")
        kind = d.get("model_type")
        if kind == "blip_2_vision_model": config, make = blip2_config(d, path), lambda c: BLIP2
        elif kind in ("clip", "clip_vision_model"):
            config = clip_config(d.get("vision_config", d) if kind == "clip" else d, path)
            make = lambda c: prefixed(clip(c), "vision_model.") | clip(c) | CLIP_TEXT
        else: raise BadInput(f"{path}: model_type {kind!r} is no vision tower known here; take CLIP, EVA or BLIP-2's")
    else: config, make = config or ViTConfig(224, **EVA_G), eva
    if image_size: config.image_size = image_size
    config.__post_init__()
    return fill(on_meta(ViT, config), weight_files(path), make(config), path, dtype)


def load_llava(path, dtype=torch.float32):
    """A whole LLaVA-1.5 folder: with nothing pooled and no ln_vision, its projector is the pool-adapter."""
    d = read_json(Path(path) / "config.json")
    expected = {"model_type": "llava", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
                "projector_hidden_act": "gelu"}
    for key, value in expected.items():
        if d.get(key, value) != value:
            raise BadInput(f"{path}: {key} is {d[key]!r} where LLaVA-1.5 has {value!r}; take a LLaVA-1.5 folder")
    config = Config(clip_config(d.get("vision_config", {}), path), llama_config(d.get("text_config", {}), path),
                    adapter="mlp", ln_vision=False, image_mark="<ImageHere>")
    return fill(on_meta(InfMLLM, config), weight_files(path), llava(config), path, dtype)


def load_infmllm(path, config, dtype=torch.float32):
    """The released InfMLLM state dict, whose folder has no config: take PRESETS["infmllm-7b"]()."""
    return fill(on_meta(InfMLLM, config), weight_files(path), infmllm(config), path, dtype)


def iaa_model(d, path):
    """The released IAA without its weights; the places that it adds layers to are not in its config.json."""
    llm = llama_config(d | {"model_type": "llama"}, path)
    if llm.layers <= IAA_INNER[-1]:
        raise BadInput(f"{path}: has {llm.layers} layers, and IAA's own follow {IAA_INNER}; take the released folder")
    llm.branches = {name: list(IAA_INNER) for name in IAA}
    model = on_meta(InfMLLM, Config(ViTConfig(**CLIP_L), llm, adapter="mlp", ln_vision=False, image_mark="<ImageHere>"))
    model.adapter = model.llm.branches["mm"].adapter
    return model


def load_iaa(path, dtype=torch.float32):
    """The released IAA folder: its base, and its branches mm and grounding, none of them active."""
    model = iaa_model(read_json(Path(path) / "config.json"), path)
    print(f"{path}: {LLAMA_3}", file=sys.stderr)
    return fill(model, weight_files(path), iaa(model.config), path, dtype)


def export_llama(model, path):
    """The language model as a Hugging Face folder that transformers opens."""
    c, path = model.config, Path(path)
    path.mkdir(parents=True, exist_ok=True)
    names = {}
    for theirs, ours in llama(c).items():
        if ours is None: continue
        numbers = range(c.layers) if "{}" in ours else [0]
        names |= {ours.replace("{}", str(i)): theirs.replace("{}", str(i)) for i in numbers}
    state = {names[name]: p for name, p in model.named_parameters() if name in names}
    save_tensors(state, path / "model.safetensors")
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=c.vocab, hidden_size=c.width,
                  num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                  intermediate_size=c.mlp, max_position_embeddings=c.context, rms_norm_eps=c.eps, rope_theta=c.theta,
                  rope_scaling=c.rope or None, tie_word_embeddings=c.tied, hidden_act="silu", bos_token_id=1,
                  eos_token_id=2, torch_dtype=dtype)
    (path / "config.json").write_text(json.dumps(config, indent=2))


# ---------------------------------------------------------------------------------------------------------------------
# Our own directory

FORMAT = 1


def save(path, model, tokenizer=None, training=None, optimizer=None, state=None, base=None):
    """Write a checkpoint directory beside `path` and rename it into place: a reader sees the old one or the new one.

    model: an InfMLLM, or (Config, {name: tensor}) gathered by a sharded run. training: what config.json tells of how
    it was trained. optimizer: {name: tensor}; state: what JSON can hold; both only where the run is to be resumed.
    base: the checkpoint that these tensors, a branch's, are added to.
    """
    path = Path(path)
    config, tensors = (model.config, dict(model.named_parameters())) if isinstance(model, nn.Module) else model
    mend(path)
    new = path.with_name(path.name + ".new")
    if new.exists(): shutil.rmtree(new)
    new.mkdir(parents=True)
    described = {"format": FORMAT, "model": config.to_dict(), "training": training or {}}
    if base: described["base"] = {"path": os.path.relpath(base, path), "weights": fingerprint(base)}
    (new / "config.json").write_text(json.dumps(described, indent=2))
    save_tensors(tensors, new / "model.safetensors")
    if tokenizer is not None: (new / "tokenizer.model").write_bytes(tokenizer.bytes)
    if optimizer is not None: save_tensors(optimizer, new / "optimizer.safetensors")
    if state is not None: (new / "state.json").write_text(json.dumps(state, indent=2))
    sums = {f.name: [f.stat().st_size, checksum(f)] for f in sorted(new.iterdir())}
    (new / "checksums.json").write_text(json.dumps(sums, indent=2))
    for f in [*new.iterdir(), new]: sync(f)
    if path.exists(): path.rename(path.with_name(path.name + ".old"))
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(path.with_name(path.name + ".old"), ignore_errors=True)


def save_tensors(tensors, path):
    path.touch()
    rights = path.stat().st_mode       # those of any new file here; the library's own file would be ours alone
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(rights)


def mend(path):
    """Undo what an interrupted save left: the old checkpoint, set aside for a moment, comes back."""
    old = path.with_name(path.name + ".old")
    if not old.exists(): return
    if path.exists(): shutil.rmtree(old)
    else: old.rename(path)


def checksum(path):
    total = 0
    with open(path, "rb") as f:
        while block := f.read(2 ** 22): total = zlib.crc32(block, total)
    return total


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try: os.fsync(handle)
    finally: os.close(handle)


def find(path):
    """The directory that a name stands for: itself, the one set aside by an interrupted save, or its newest step-*."""
    path = Path(path)
    for candidate in (path, path.with_name(path.name + ".old")):
        if (candidate / "config.json").is_file(): return candidate
    steps = [p for p in path.glob("step-*") if p.name[5:].isdigit() and (p / "config.json").is_file()]
    if steps: return max(steps, key=lambda p: int(p.name[5:]))
    raise BadInput(f"{path}: no checkpoint here (no config.json, no step-*); python train.py --stage 1 makes one")


def verify(path, *names):
    """Sizes and checksums as they were when it was written: of every file, or of those named."""
    sums = read_json(path / "checksums.json")
    for name in names or ("config.json", "model.safetensors"):
        if name not in sums: raise BadInput(f"{path / 'checksums.json'}: does not list {name}; take another checkpoint")
    for name, entry in sums.items():
        if names and name not in names: continue
        file = path / name
        if Path(name).name != name or not os.path.isfile(file) or [file.stat().st_size, checksum(file)] != entry:
            raise BadInput(f"{file}: is not what was written (its size or checksum differs); take another checkpoint")


def fingerprint(path):
    """Size and checksum of a checkpoint's weights, as they were written."""
    return read_json(Path(path) / "checksums.json")["model.safetensors"]


def description(path):
    """(config.json, the Config in it) of a checkpoint directory whose files are whole."""
    verify(path)
    described = read_json(path / "config.json")
    if described.get("format") != FORMAT:
        raise BadInput(f"{path / 'config.json'}: format {described.get('format')!r}, and this program reads {FORMAT}; "
                       "use the version that wrote it")
    return described, our_config(described, path)


@from_a_stranger
def our_config(d, what): return Config(**d["model"])


def load(path, image_size=None, dtype=None):
    """The model of a checkpoint directory, in the dtypes that were saved unless one is asked for. A branch comes on its
    base, which lies where its checkpoint says, and is the one in use."""
    path = find(path)
    described, config = description(path)
    if "base" in described: model = add_branch(load(base_of(path, described), dtype=dtype), path, dtype)
    else:
        model = on_meta(InfMLLM, config)
        table = {name: name for name, _ in model.named_parameters()}
        model = fill(model, weight_files(path / "model.safetensors"), table, path, dtype)
        model.fingerprint = fingerprint(path)
    return model.resize(image_size) if image_size else model


def read_checked(path, name):
    """A JSON file of one of our directories, which is not looked into before its checksum is right."""
    verify(path, name)
    return read_json(path / name)


def base_of(path, described):
    """The directory of a branch's base."""
    try: base = find(os.path.normpath(path / described["base"]["path"]))
    except BadInput:
        raise BadInput(f"{path}: is a branch of {described['base']['path']}, seen from there, where there is nothing; "
                       "bring it back, or say where it is with --ckpt BASE --branch BRANCH") from None
    if "base" in read_checked(base, "config.json"): raise BadInput(f"{path}: its base is a branch itself; take another")
    return base


def add_branch(model, path, dtype=None):
    """Put the branch that is saved at `path` on its base and take it; a base may have several."""
    path = find(path)
    described, config = description(path)
    if "base" not in described: raise BadInput(f"{path}: is a whole model and no branch; name it with --ckpt")
    if described["base"]["weights"] != getattr(model, "fingerprint", None):
        raise BadInput(f"{path}: is a branch of {described['base']['path']}, seen from there, and this model has other "
                       "weights; take the base that it was trained on")
    (name, inner), = config.llm.branches.items()
    c, names = model.config, model.llm.branches
    if name in names: raise BadInput(f"{path}: the model has a branch {name} already; use them in calls of their own")
    if not names: c.grid = config.grid; model.resize(config.vit.image_size)
    theirs, ours = ((x.vit.image_size, x.grid) for x in (config, c))
    if theirs != ours:
        raise BadInput(f"{path}: its pixels per side and visual tokens per side are {theirs}, those of the branch "
                       f"{', '.join(names)} are {ours}; use them in calls of their own")
    branch = on_meta(InfMLLM, config).llm.branches[name]
    table = {f"{BRANCHES}{name}.{n}": n for n, _ in branch.named_parameters()}
    c.llm.branches[name] = inner
    names[name] = fill(branch, weight_files(path / "model.safetensors"), table, path, dtype)
    return model.use(name)


def load_tensors(path):
    file = Safetensors(path)
    return {key: file.read(key) for key in file.shapes}


# ---------------------------------------------------------------------------------------------------------------------
# Processes

PATIENCE = 5       # seconds that the ranks have to sign in after one of them has gone


def setup_ranks(device=None, timeout=600):
    """(rank, world, device): joins the process group that torchrun describes, or stands alone."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ: return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                         timeout=timedelta(seconds=timeout))
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device(device)


@contextmanager
def on_signals(do, numbers=(signal.SIGTERM, signal.SIGINT)):
    """These signals call `do`, in this process alone: a loader process, forked, leaves when we do."""
    pid = os.getpid()
    def act(number, frame): return do(number) if os.getpid() == pid else None
    before = {number: signal.signal(number, act) for number in numbers}
    try: yield
    finally:
        for number, handler in before.items(): signal.signal(number, handler)


def silent_ranks():
    """Which ranks have gone: those that do not sign in at the store where all of them met. Where no torchrun keeps it,
    rank 0 does, so that its own silence is the store's."""
    rank, world, silent = torch.distributed.get_rank(), torch.distributed.get_world_size(), [0]

    def look():
        with suppress(RuntimeError):
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"here/{rank}", "")
            time.sleep(PATIENCE)
            silent[:] = [r for r in range(world) if not store.check([f"here/{r}"])]
    thread = threading.Thread(target=look, daemon=True)            # a store that was stopped would never answer
    thread.start()
    thread.join(2 * PATIENCE)
    return silent


def sentence(e):
    """What to say of an error that is not the program's own: bad input, a disk that refuses, a process that has gone.
    None: it is a bug, and its traceback is wanted."""
    text = " ".join(str(e).split())
    if isinstance(e, BadInput): return text
    if isinstance(e, OSError):
        return (f"{e.filename or 'input or output'}: {e.strerror or text}; mend that and start again, with --resume "
                "where a run had begun")
    if found := re.search(r"DataLoader worker \(pid.*", text):
        return (f"a loader process has gone ({found[0][:120]}), most likely killed for its memory; --resume goes on, "
                "and fewer --workers take less")
    if not isinstance(e, torch.distributed.DistError) and "gloo" not in text: return None
    why = re.sub(r"^\[\S+\] |\. This is typically.*", "", text)[:120]
    if not torch.distributed.is_initialized(): return f"the ranks did not find one another ({why}); start all of them"
    gone = ", ".join(map(str, silent_ranks())) or "one that is back by now"
    return (f"no answer from rank {gone} ({why}): killed, stopped, or ended with a sentence of its own; "
            "start all ranks again, a training with --resume")


def complain(e, who=""):
    """Say an error in a sentence and return the exit code 2; a bug is raised again."""
    if (said := sentence(e)) is None: raise e
    if who: who += f", rank {os.environ['RANK']}: " if "RANK" in os.environ else ": "
    with suppress(OSError):                                        # where the output itself has gone
        print(who + said, file=sys.stderr, flush=True)
    if not torch.distributed.is_initialized(): return 2
    with suppress(OSError): sys.stdout.flush()
    os._exit(2)                                                    # the other ranks may be gone: wait for nobody
