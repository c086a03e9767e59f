"""Where a run's weights come from: the stage before, a checkpoint, files of others; and the branch that is put on them.

`args` are train.py's flags and `s` its settings (train.settle).
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

import model as models
import weights
from support.errors import BadInput
from text.tokenizer import Tokenizer

TOY_START = Path(os.path.relpath(Path(__file__).parent / "assets/toy"))


def out_folder(args, stage):
    if args.stage == "all":
        return Path(args.out or "out") / f"stage{stage}"
    return Path(args.out or f"out/stage{stage}")


def start_from(args, stage):
    """The checkpoint to start from, or None where --vit and --llm say it all; and where its name comes from."""
    if args.init:
        return weights.find(args.init), "--init"
    if stage > 1:
        before = out_folder(args, stage).parent / f"stage{stage - 1}"
        try:
            return weights.find(before), f"stage {stage - 1}'s output"
        except BadInput:
            if args.vit and args.llm:
                return None, ""
            raise BadInput(
                f"{before}: stage {stage} starts from stage {stage - 1}'s output, which is not there; run "
                f"python train.py --stage {stage - 1} first, or name a start with --init"
            ) from None
    if args.vit and args.llm:
        return None, ""
    if args.preset in (None, "toy") and not args.vit and not args.llm:
        if not (TOY_START / "model.safetensors").is_file():
            raise BadInput(
                f"{TOY_START}: the toy's backbones are not there; python -m tools.backbones makes them"
            )
        return TOY_START, "the toy's stand-ins for pretrained backbones"
    raise BadInput(
        f"stage 1 of {args.preset or 'toy'} starts from --vit and --llm, or from --init; name both, or that"
    )


def build(args, s, path):
    """The model of a new run on the CPU, in the files' dtypes, and {part: where it comes from}."""
    base = weights.load(path, dtype=None) if path else None
    preset = models.PRESETS[s["preset"]]()
    vit = weights.load_vit(args.vit, dtype=None) if args.vit else base.vit
    llm = weights.load_llama(args.llm, dtype=None) if args.llm else base.llm
    like = base.config if base else preset
    if s["image_size"]:
        resize(vit, s["image_size"])
    config = described(like, vit.config, llm.config, s)
    with torch.device("meta"):
        model = models.InfMLLM(config)
    model.vit, model.llm = vit, llm
    names = {"vit": args.vit or path, "llm": args.llm or path, "adapter": path}
    want = {k: p.shape for k, p in model.adapter.named_parameters()}
    have = {k: p.shape for k, p in base.adapter.named_parameters()} if base else {}
    if want == have:
        model.adapter = base.adapter
    else:
        names["adapter"] = (
            "fresh" if base is None else f"fresh ({config.adapter}; {path} has another)"
        )
        models.init(model.adapter.to_empty(device="cpu"), s["seed"])
    if s["tune"] == "inner":
        take_branch(args, s, model, path)
    elif model.llm.branches:
        raise BadInput(
            f"{path}: is a branch, {', '.join(model.llm.branches)}; --tune inner trains it on, --init names "
            "another start"
        )
    return model.resize(vit.config.image_size), names


def take_branch(args, s, model, path):
    """The branch that trains, alone: the one that was loaded, or a new one that computes the base's function."""
    name, has = s["branch"], model.llm.config.branches
    if has and (args.vit or args.llm):
        raise BadInput(f"{path}: is a branch and keeps its base; no --vit, no --llm")
    for other in set(has) - {name}:
        del has[other], model.llm.branches[other]
    if s["inner_layers"] and has.get(name, s["inner_layers"]) != s["inner_layers"]:
        raise BadInput(
            f"--inner-layers: {path} has the branch {name} after {has[name]}; leave it out"
        )
    if name in has:
        model.use(name)
    else:
        model.grow(name, inner_layers(s, model.llm.config))
    s["inner_layers"] = has[name]


def inner_layers(s, llm):
    """After which layers of the LLM one of the branch runs."""
    inner = s["inner_layers"] or (
        weights.IAA_INNER if llm.layers == 32 else list(range(llm.layers))
    )
    if 0 <= inner[0] and inner[-1] < llm.layers:
        return inner
    raise BadInput(
        f"--inner-layers: the LLM has layers 0 to {llm.layers - 1}, not {inner}; name some of them"
    )


def base_of(run, path, start, names):
    """The checkpoint that a run's branch is added to: where it starts, or, if that is pieced together, one written."""
    whole = path or start
    if path or set(names.values()) == {start}:
        described = weights.read_checked(whole, "config.json")
        return weights.base_of(whole, described) if "base" in described else whole
    c, base = run.model.config, run.out / "base"
    if run.rank == 0:
        tensors = {
            n: p for n, p in run.model.named_parameters() if not n.startswith(models.BRANCHES)
        }
        weights.save(base, (replace(c, llm=replace(c.llm, branches={})), tensors), run.tokenizer)
        print(f"the base, which the branch's checkpoints name, is written to {base}")
    return base


def resize(vit, image_size):
    try:
        vit.resize(image_size)
    except AssertionError as e:
        raise BadInput(f"--image-size {image_size}: {e}; take a multiple") from None


def described(like, vit, llm, s):
    """The Config of a run: `like`, with the stage's image size and grid, and the kind of adapter asked for."""
    try:
        if s["image_size"]:
            vit = replace(vit, image_size=s["image_size"])
        adapter = s["adapter"] or like.adapter
        ln_vision = like.ln_vision if adapter == like.adapter else adapter != "mlp"
        return replace(
            like,
            vit=vit,
            llm=llm,
            adapter=adapter,
            grid=s["grid"] or like.grid,
            ln_vision=ln_vision,
        )
    except AssertionError as e:
        raise BadInput(f"--image-size, --grid: {e}; take others") from None


def find_tokenizer(args, path):
    for place in (args.tokenizer, args.llm, path):
        if place:
            return Tokenizer(place)
    raise BadInput(
        "--tokenizer: none beside the weights; name a sentencepiece model (tokenizer.model)"
    )
