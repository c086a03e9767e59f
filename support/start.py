"""Where weights come from: the run itself, the stage before, a checkpoint, files of others.

`args` are train.py's flags, and `s` the train.Settings that were made of them.
"""

import argparse
import importlib.util
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import iaa
import lora
import model as models
import weights
from adapter import ADAPTERS
from support.errors import BadInput
from support.files import read_json
from support.plan import flops
from text import Tokenizer

TUNED = {"inner": ("branch", "inner_layers"), "lora": ("rank", "lora_on")}  # settings of a branch
TOY_START = Path(os.path.relpath(Path(__file__).parent.parent / "assets/toy"))


def stage_folder(args, stage):
    if args.stage == "all":
        return Path(args.out or "out") / f"stage{stage}"
    return Path(args.out or f"out/stage{stage}")


def saved(folder):
    """The newest checkpoint of a run, None where it has saved nothing yet."""
    try:
        return weights.find(folder)
    except BadInput:
        return None


def start_from(args, stage):
    """The checkpoint that a new run starts from; None where --vit and --llm say it all, or for --plan."""
    if args.init:
        return weights.find(args.init)
    if args.plan and args.preset:
        return None  # the preset is planned, whatever model lies in out/
    pieces = args.vit and args.llm
    if stage > 1:
        before = stage_folder(args, stage).parent / f"stage{stage - 1}"
        path = saved(before)
        if path or pieces or args.plan:
            return path
        raise BadInput(
            f"{before}: stage {stage} starts from stage {stage - 1}'s output, which is not there; run "
            f"python train.py --stage {stage - 1} first, or name a start with --init"
        )
    if args.preset in (None, "toy") and not args.vit and not args.llm:
        if saved(TOY_START):
            return TOY_START
        raise BadInput(
            f"{TOY_START}: the toy's backbones are not there; python -m tools.backbones makes them"
        )
    if pieces or args.plan:
        return None
    raise BadInput(
        f"stage 1 of {args.preset or 'toy'} starts from --vit and --llm, or from --init; "
        "name both, or that"
    )


def same_architecture(args, path):
    """Refuse a start that is another model than --preset, but for what --vit and --llm bring."""
    wanted = models.PRESETS[args.preset]().to_dict()
    found = weights.read_checked(path, "config.json")["model"]
    others = []
    for part in ("vit", "llm"):
        if not getattr(args, part):
            others += [
                f"{part} {key} {found[part].get(key)} and not {value}"
                for key, value in wanted[part].items()
                if key != "image_size" and found[part].get(key, value) != value
            ]
    if others:
        raise BadInput(
            f"{path}: is not {args.preset} ({', '.join(others[:4])}); leave --preset out to train it as "
            f"it is, or name a start that is {args.preset} with --init, or --vit and --llm"
        )


def build(s, say=True, plan=False):
    """The model of a run on the CPU, in the files' dtypes, and {part: where it comes from}.

    For --plan: on the meta device, so without weights, and as if --vit and --llm were the preset's."""
    if s.start and say:
        why = ""
        if s.resumed:
            why = " (resumed; --init, --vit and --llm are for new runs)"
        elif s.start == TOY_START:
            why = " (the toy's stand-ins for pretrained backbones)"
        print(f"stage {s.stage} starts from {s.start}{why}")
    base = weights.load(s.start) if s.start and not plan else on_meta(s)
    origin = s.start or "the preset"
    origins = dict.fromkeys(models.PARTS, origin)
    if s.resumed:
        return base, origins
    if hasattr(base, "branch"):
        return continued_branch(s, base), origins
    origins |= {"vit": s.vit or origin, "llm": s.llm or origin}
    vit = weights.load_vit(s.vit, dtype=None) if s.vit and not plan else base.vit
    llm = weights.load_llama(s.llm, dtype=None) if s.llm and not plan else base.llm
    config = described(s, base.config, vit.config, llm.config)
    vit.resize(config.vit.image_size)
    with torch.device("meta"):
        model = models.InfMLLM(config)
    model.vit, model.llm = vit, llm
    # parameters of equal shapes may belong to another function
    alike = type(base.adapter) is type(model.adapter)
    if (s.start or plan) and alike and shapes(base.adapter) == shapes(model.adapter):
        base.adapter.grid = config.grid
        model.adapter = base.adapter
    else:
        flops(config, s.text, s.answer)  # refuses an adapter that makes another number of tokens
        models.init(model.adapter.to_empty(device="cpu"), s.seed)
        origins["adapter"] = f"fresh ({config.adapter})"
    if s.tune == "inner":
        s.branch = s.branch or "mm"
        s.inner_layers = inner_layers(s, llm.config)
        model = iaa.grow(model, s.branch, s.inner_layers)
    if s.tune == "lora":
        s.rank = s.rank or 16
        s.lora_on = s.lora_on or ["q", "v"]
        model = lora.grow(model, s.rank, s.lora_on)
    return model, origins


def on_meta(s):
    """The model to start from, a checkpoint's or else the preset's, as shapes without weights."""
    config, branch = models.PRESETS[s.preset](), None
    if s.start:
        config, branch = weights.describe(s.start)
    with torch.device("meta"):
        model = models.InfMLLM(config)
    return weights.kind_of(branch).grow(model, **branch) if branch else model


def adapter_kind(text):
    """An argparse type: a name in ADAPTERS, or FILE.py:CLASS, which gets a name there: that of the class."""
    path, own, name = text.rpartition(":")
    if own:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if spec is None or not Path(path).is_file():
            raise argparse.ArgumentTypeError(f"{path} is no file of Python")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, name):
            raise argparse.ArgumentTypeError(f"{path} has no class {name}")
        ADAPTERS[name] = getattr(module, name)
    if name not in ADAPTERS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(ADAPTERS)}, FILE.py:CLASS"
        )
    return name


def lora_matrices(text):
    """An argparse type: names of a layer's matrices, in the layer's order."""
    named = text.split(",")
    if not set(named) <= set(lora.MATRICES):
        raise argparse.ArgumentTypeError(f"{text!r} names others than {', '.join(lora.MATRICES)}")
    return [name for name in lora.MATRICES if name in named]


def shapes(module):
    return {name: p.shape for name, p in module.named_parameters()}


def described(s, like, vit, llm):
    """`like`, the Config of what a run starts from, with the stage's image size, grid and adapter."""
    adapter = s.adapter or like.adapter
    ln_vision = like.ln_vision if adapter == like.adapter else adapter != "mlp"
    try:
        vit = replace(vit, image_size=s.image_size or vit.image_size)
        grid = s.grid or like.grid
        return replace(like, vit=vit, llm=llm, adapter=adapter, grid=grid, ln_vision=ln_vision)
    except AssertionError as e:
        raise BadInput(f"--image-size {s.image_size}, --grid {s.grid}: {e}; take others") from None


def tuned_flags(tune):
    return " and ".join(f"--{name.replace('_', '-')}" for name in TUNED[tune])


def flags_of_another(tune, given):
    """Refuse settings of a branch that --tune does not train."""
    for other, names in TUNED.items():
        if tune != other and set(names) & set(given):
            raise BadInput(
                f"{tuned_flags(other)} describe what --tune {other} trains; add it, or leave them out"
            )


def continued_branch(s, model):
    """A branch that was trained before, in another stage."""
    branch, c = model.branch, model.config
    if s.tune != branch.tune:
        raise BadInput(
            f"{s.start}: is a branch, {branch.name}; --tune {branch.tune} trains it on, --init names "
            "another start"
        )
    own = dict(zip(TUNED[s.tune], branch.described.values()))
    other = any(getattr(s, name) not in (None, value) for name, value in own.items())
    if other or s.vit or s.llm:
        raise BadInput(
            f"{s.start}: has {branch}; leave out {tuned_flags(s.tune)}, --vit and --llm, or name "
            "another --init"
        )
    for name, value in own.items():
        setattr(s, name, value)
    config = described(s, c, c.vit, c.llm)
    return model.resize(config.vit.image_size, config.grid)


def inner_layers(s, llm):
    """After which layers of the LLM one of the branch runs."""
    inner = s.inner_layers
    if inner is None:
        inner = weights.IAA_INNER if llm.layers == 32 else list(range(llm.layers))
    if 0 <= inner[0] and inner[-1] < llm.layers:
        return inner
    raise BadInput(
        f"--inner-layers: the LLM has layers 0 to {llm.layers - 1}, not {inner}; name some of them"
    )


def branch_base(s, model, tokenizer, origins, say=True):
    """The checkpoint that a run's branch is added to; written where the base was pieced together."""
    if s.start and set(origins.values()) == {s.start}:
        return weights.base_of(s.start) or s.start
    path = s.out / "base"
    if say:
        base = lora.merged(model) if s.tune == "lora" else model.base
        weights.save(path, base, tokenizer)
        print(f"the base, which the branch's checkpoints name, is written to {path}")
    return path


def find_tokenizer(s, config):
    """The one named, or the one beside the weights of the LLM; `config` is told its turns.

    Those are --template, or, where a tokenizer is new to the model, what its control tokens tell."""
    place = s.tokenizer or s.llm or s.start
    if s.resumed:
        place = s.start
    stored = config.template if place == s.start else None
    tokenizer = open_tokenizer(place, config.llm, s.llm or s.start, s.template or stored)
    config.template = tokenizer.template
    return tokenizer


def open_tokenizer(place, llm, weights_in, template=None):
    """The tokenizer that lies there, held against what the LLM's own config.json says of it."""
    tokenizer = Tokenizer(place, template)
    if tokenizer.size > llm.vocab:
        raise BadInput(
            f"{tokenizer.path}: has {tokenizer.size} pieces, more than the {llm.vocab} of the LLM's "
            "embeddings; take the one that belongs to it with --tokenizer"
        )
    if tokenizer.size < 0.99 * llm.vocab:
        print(
            f"note: {tokenizer.path} has {tokenizer.size} pieces and the LLM {llm.vocab} embeddings; "
            "if it belongs to another model, name the right one with --tokenizer",
            file=sys.stderr,
        )
    config = Path(weights_in, "config.json")
    theirs = read_json(config) if config.is_file() else {}
    theirs = theirs.get("text_config") or theirs
    for key, ours in (("bos_token_id", [tokenizer.bos]), ("eos_token_id", tokenizer.stops)):
        expected = theirs.get(key)
        if expected is not None and ours[0] is not None and not {*ours} & {*np.ravel(expected)}:
            raise BadInput(
                f"{tokenizer.path}: its {key} is {ours[0]} and that of {config} is {expected}; take the "
                "tokenizer that belongs to the weights with --tokenizer"
            )
    return tokenizer


# ---------------------------------------------------------------------------------------------------
# For answering: a model from wherever it comes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def newest():
    """The folder of the run in out/stage1, out/stage2, ... that has written last."""
    times = {}
    for path in Path("out").glob("stage*/step-*[0-9]"):
        with suppress(FileNotFoundError):  # pruned the while
            times[path.parent] = max(times.get(path.parent, 0), path.stat().st_mtime)
    if not times:
        raise BadInput(
            "out/: holds no trained model; python train.py --stage all makes one, "
            "or name one with --ckpt"
        )
    return max(times, key=times.get)


def load_model(path=None, tokenizer=None, device=None, dtype=None, branch=None):
    """(model, tokenizer) from our directory, a LLaVA-1.5 or IAA folder or the released InfMLLM file.

    path: the newest of out/ if not given. tokenizer: where the checkpoint brings none. dtype: fp32 or
    bf16. branch: see with_branch."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {device}: torch finds no GPU; use --device cpu")
    dtype = DTYPES[dtype or ("fp32" if device.type == "cpu" else "bf16")]
    path = Path(path or newest())
    if path.name == "model.safetensors":
        path = path.parent
    model, tokenizer = open_checkpoint(path, dtype, branch, tokenizer)
    if branch:
        model = with_branch(model, branch, dtype)
    return model.to(device).eval(), tokenizer


def open_checkpoint(path, dtype, branch=None, tokenizer=None):
    """(model, tokenizer); branch: which one of IAA's two"""

    def beside(model, folder):
        place, c = tokenizer or folder, model.config
        return model, open_tokenizer(place, c.llm, folder, c.template)

    if path.is_file():
        released = weights.load_infmllm(path, models.PRESETS["infmllm-7b"](), dtype)
        return beside(released, path.parent)
    config = path / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind == "IAA":
        branches = weights.load_iaa(path, dtype)
        return beside(branches.get(branch, branches["mm"]), path)
    if kind:
        return beside(weights.load_llava(path, dtype), path)
    while True:
        folder = weights.find(path)
        try:
            return beside(weights.load(folder, dtype=dtype), folder)
        except (BadInput, OSError):
            if folder.exists():
                raise
            # a run that goes on has pruned it, and there is a newer one


def with_branch(model, branch, dtype=None):
    """The model with the branch that is saved in a folder, with its own, or, for "none", without one."""
    own = model.branch.name if hasattr(model, "branch") else "none"
    if branch == "none" and own != "lora":  # which has taken the base's layers over
        return model.text_model
    if branch == own:
        return model
    if Path(branch).exists():
        return weights.add_branch(model, branch, dtype)
    raise BadInput(
        f"--branch {branch}: is neither a folder nor a branch of the model, which has {own}; "
        "name a branch's folder"
    )
