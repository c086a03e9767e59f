"""A trained model for other programs.

    python -m weights.export out/stage3 exported/

Where the adapter is `mlp` it is a LLaVA: a folder that transformers' LlavaForConditionalGeneration opens, with its
processor, and from which vLLM and llama.cpp's converter go on. Else the LLM is a folder of its own, and the ViT and the
adapter are one safetensors file beside it; docs/EXPORT.md has the twenty lines of PyTorch that run them.
"""

import json
import sys
from pathlib import Path

import torch

from iaa import BranchedInfMLLM
from lora import LoraInfMLLM, merged
from support.commands import Parser, run
from support.errors import BadInput
from support.files import whole
from support.start import load_model
from text.bpe import BPE
from weights.files import save_tensors
from weights.llama import LLAMA, export_llama, hf_config
from weights.llava import ONLY, PROJECTOR
from weights.rename import match, prefixed
from weights.towers import ALONE, FIELDS

IMAGE = "<image>"
SPARE = 64  # rows of the embeddings for <image>, where the LLM has none to spare; a number that GPUs like


def turned(table):
    """Our names -> theirs; of several that mean the same, the first."""
    ours = {}
    for theirs, name in table.items():
        if isinstance(name, str):
            ours.setdefault(name, theirs)
    return ours


def export(model, tokenizer, path):
    """-> what was written, in words"""
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise BadInput(f"{path}: is not empty; name a new folder")
    if isinstance(model, LoraInfMLLM):
        plain, tensors = merged(model)
        plain.load_state_dict(tensors, assign=True)
        model = plain
    if isinstance(model, BranchedInfMLLM):
        raise BadInput(
            "a branch of inner adaptors is known to no other program; export its base, which has the LLM"
        )
    path.mkdir(parents=True, exist_ok=True)
    if model.config.adapter == "mlp":
        export_llava(model, path, tokenizer)
        return "a LLaVA, for transformers"
    c = model.config
    export_llama(model.llm, path / "llm")
    copy_tokenizer(tokenizer, path / "llm")
    state = {f"vit.{name}": p for name, p in model.vit.named_parameters()}
    state |= {f"adapter.{name}": p for name, p in model.adapter.named_parameters()}
    save_tensors(state, path / "vision.safetensors")
    (path / "config.json").write_text(json.dumps(c.to_dict(), indent=2))
    return f"the LLM as a folder, the ViT and the adapter ({c.adapter}) as vision.safetensors"


def copy_tokenizer(tokenizer, folder):
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)


def export_llava(model, path, tokenizer):
    """The folder of a LlavaForConditionalGeneration and its processor."""
    c, v, path = model.config, model.config.vit, Path(path)
    clip = v.pre_norm and v.act == "quick_gelu" and v.prefix == 1 and not v.post_norm
    if c.adapter != "mlp" or c.ln_vision or not clip:
        raise BadInput(
            f"{path}: only a CLIP tower with the adapter mlp and no ln_vision is a LLaVA; this model has "
            f"{c.adapter}{' with ln_vision' * c.ln_vision} behind {'a CLIP' if clip else 'another'} tower"
        )
    path.mkdir(parents=True, exist_ok=True)
    table = prefixed(LLAMA, "language_model.", "llm.") | PROJECTOR
    table |= prefixed(ALONE, "vision_tower.vision_model.", "vit.")
    ours = {name: p for name, p in model.named_parameters()}
    state = {theirs: ours[name] for name, (theirs,) in match(ours, turned(table)).items()}
    tower = "vision_tower.vision_model"
    for name, p in list(state.items()):  # theirs has one more block, which LLaVA does not look at
        if name.startswith(f"{tower}.encoder.layers.{v.layers - 1}."):
            state[name.replace(f".{v.layers - 1}.", f".{v.layers}.", 1)] = p.clone()
    one = model.vit.cls
    for n in range(v.layers + 1):  # ours has no bias of K: the softmax cancels it
        state[f"{tower}.encoder.layers.{n}.self_attn.k_proj.bias"] = torch.zeros_like(one)
    state[f"{tower}.post_layernorm.weight"] = torch.ones_like(one)
    state[f"{tower}.post_layernorm.bias"] = torch.zeros_like(one)
    image_id, text = tokenizer.size, hf_config(model.llm)
    if image_id >= c.llm.vocab:
        text["vocab_size"] += SPARE
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if name in state:
                rows = state[name]
                state[name] = torch.cat((rows, rows.new_zeros(SPARE, rows.shape[1])))
    save_tensors({name: t.contiguous() for name, t in state.items()}, path / "model.safetensors")
    vision = {theirs: getattr(v, name) for theirs, name in FIELDS.items()}
    vision |= {"model_type": "clip_vision_model", "num_hidden_layers": v.layers + 1}
    config = ONLY | {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_id,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": c.llm.tied,
    }
    write(path / "config.json", config)
    write_processor(path, v, tokenizer, image_id)


def write_processor(path, v, tokenizer, image_id):
    """Pictures are padded to a square with the mean colour and resized, as in a chat of ours."""
    square = {"height": v.image_size, "width": v.image_size}
    image_processor = {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "do_center_crop": False,
        "size": square,
        "crop_size": square,
        "resample": 3,
        "image_mean": v.pixel_mean,
        "image_std": v.pixel_std,
    }
    write(path / "preprocessor_config.json", image_processor)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": v.patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    write(path / "processor_config.json", processor)
    special = {"id": image_id, "content": IMAGE, "special": True}
    special |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    words = tokenizer_json(tokenizer)
    words["added_tokens"].append(special)
    write(path / "tokenizer.json", words)
    own = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": next(name for name, n in tokenizer.controls.items() if n == tokenizer.eos),
    }
    write(path / "tokenizer_config.json", own)


def tokenizer_json(tokenizer):
    """The tokenizer as the `tokenizers` library has it."""
    if isinstance(tokenizer.model, BPE):
        return json.loads(whole(tokenizer.path))
    model = tokenizer.model
    pieces = [model.id_to_piece(n) for n in range(len(model))]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    rank = {piece: -model.get_score(n) for piece, n in vocab.items()}
    merges = []  # every way to make a piece of two others, the likeliest piece first
    for piece in sorted(pieces, key=rank.get):
        halves = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        merges += [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
    words = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "always",
        "split": False,
    }
    special = [
        {"id": n, "content": name, "special": True, "lstrip": False, "rstrip": False}
        | {"normalized": False, "single_word": False}
        for name, n in tokenizer.controls.items()
    ]
    bos = pieces[tokenizer.bos]
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "unk_token": pieces[model.unk_id()],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def write(path, content):
    path.write_text(json.dumps(content, indent=2))


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a run or a checkpoint of it")
    parser.add_argument("folder", help="a new folder")
    parser.flag("--dtype", ("fp32", "bf16"), "of the weights; default fp32", "fp32")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.checkpoint, device="cpu", dtype=args.dtype)
    print(f"{args.folder}: {export(model, tokenizer, args.folder)}")


if __name__ == "__main__":
    sys.exit(run(main))
