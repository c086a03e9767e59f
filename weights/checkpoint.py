"""Our own checkpoint directory.

config.json         format, model (the Config), training, and of a branch: branch (inner adaptors: name and layers;
                    LoRA: rank and matrices) and base
model.safetensors   the tensors under our names; of a branch its own alone, as llm.branches.<name>.<ours>
tokenizer.model     the tokenizer's own file, or tokenizer.json and in generation_config.json the ids that end an answer
optimizer.safetensors, state.json      where the run can be resumed
checksums.json      size and checksum of each of these
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import iaa
import lora
from model import Config, InfMLLM
from support.errors import BadInput
from support.files import read_json
from weights.configs import checked, understood
from weights.files import load_tensors, save_tensors
from weights.rename import fill, on_meta

FORMAT = 2
RESUMING = ("optimizer.safetensors", "state.json")  # may be left out when a model is handed on
BRANCHES = "llm.branches."
OLD_NAMES = {  # of FORMAT 1
    "vit.blocks.{}.qkv.weight": tuple(f"vit.blocks.{{}}.{part}.weight" for part in "qkv"),
    "vit.blocks.{}.q_bias": "vit.blocks.{}.q.bias",
    "vit.blocks.{}.v_bias": "vit.blocks.{}.v.bias",
}


def save(path, model, tokenizer=None, training=None, optimizer=None, state=None, base=None):
    """Write a checkpoint directory beside `path` and rename it into place: a reader sees the old one or the new one.

    model: an InfMLLM, or (InfMLLM, {name: tensor}) as gathered by a sharded run. training: what config.json tells of
    how it was trained. optimizer: {name: tensor}; state: what JSON can hold; both only where the run is to be resumed.
    base: the checkpoint that a branch was added to.
    """
    path = Path(path)
    if isinstance(model, tuple):
        model, tensors = model
    else:
        tensors = dict(model.named_parameters())
    described = {"format": FORMAT, "model": model.config.to_dict(), "training": training or {}}
    if hasattr(model, "branch"):
        branch = model.branch
        described["branch"] = branch.described
        described["base"] = {"path": os.path.relpath(base, path), "weights": fingerprint(base)}
        own = {p: f"{BRANCHES}{branch.name}.{name}" for name, p in branch.named_parameters()}
        tensors = {own[p]: tensors[name] for name, p in model.named_parameters() if p in own}
    old = Path(f"{path}.old")
    new = Path(f"{path}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_json(new / "config.json", described)
    save_tensors(tensors, new / "model.safetensors")
    if tokenizer is not None:
        for name, content in tokenizer.files.items():
            (new / name).write_bytes(content)
    if optimizer is not None:
        save_tensors(optimizer, new / "optimizer.safetensors")
    if state is not None:
        write_json(new / "state.json", state)
    sums = {file.name: checksum(file) for file in sorted(new.iterdir())}
    write_json(new / "checksums.json", sums)
    for file in (*new.iterdir(), new):
        sync(file)
    if path.exists():  # else an interrupted save may have left the old one set aside
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2))


def checksum(path):
    """[size, CRC-32]"""
    total = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            total = zlib.crc32(block, total)
    return [path.stat().st_size, total]


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def find(path):
    """The directory that a name stands for: itself, the one set aside by an interrupted save, or its newest step-*."""
    path = Path(path)
    for _ in range(3):  # a run that goes on may prune those that were listed
        steps = sorted(path.glob("step-*[0-9]"), reverse=True)
        for folder in (path, Path(f"{path}.old"), *steps):
            if (folder / "config.json").is_file():
                return folder
    raise BadInput(
        f"{path}: no checkpoint here (no config.json, no step-*); python train.py --stage 1 makes one"
    )


def verify(path, *names):
    """Sizes and checksums as they were when it was written: of what a model is made of, or of those named."""
    sums = read_json(path / "checksums.json")
    for name in names or {"config.json", "model.safetensors", *sums} - set(RESUMING):
        file = path / Path(name).name  # nothing outside the folder
        if name in RESUMING and not file.exists():
            raise BadInput(
                f"{file}: is not there, so the run cannot be resumed; start a new one with --init {path}"
            )
        if not os.path.isfile(file) or checksum(file) != sums.get(name):
            raise BadInput(
                f"{file}: is not what was written (its size or checksum differs from checksums.json); "
                "take another checkpoint"
            )


def read_checked(path, name):
    """A JSON file of one of our directories, which is not looked into before its checksum is right."""
    verify(path, name)
    return read_json(path / name)


def load_checked(path, name):
    """The tensors of a file of one of our directories, after its checksum."""
    verify(path, name)
    return load_tensors(path / name)


def fingerprint(path):
    """Size and checksum of a checkpoint's weights, as they were written."""
    return read_json(Path(path) / "checksums.json")["model.safetensors"]


def describe(path):
    """(Config, branch) of a checkpoint whose files are whole; branch: its description, None for a whole model."""
    path = find(path)
    verify(path)
    described = read_json(path / "config.json")
    with understood(path):
        assert described["format"] in (1, FORMAT), "use the version that wrote it"
        model = described["model"]
        branch = described.get("branch")
        for name, after in model["llm"].pop("branches", {}).items():  # where FORMAT 1 has it
            branch = {"name": name, "after": after}
        return checked(Config(**model)), branch


def load(path, image_size=None, dtype=None):
    """The model of a checkpoint directory, in the dtypes that were saved unless one is asked for.

    A branch comes on its base, which lies where its checkpoint says."""
    path = find(path)
    base = base_of(path)
    if base:
        model = add_branch(load(base, dtype=dtype), path, dtype)
    else:
        config, _ = describe(path)
        model = on_meta(InfMLLM, config)
        fill(model, path / "model.safetensors", OLD_NAMES, dtype)
        model.fingerprint = fingerprint(path)
    if image_size:
        model.resize(image_size)
    return model


def base_of(path):
    """The directory of a branch's base; None for a whole model."""
    path = find(path)
    named = read_checked(path, "config.json").get("base")
    if named is None:
        return None
    try:
        return find(os.path.normpath(path / named["path"]))
    except BadInput:
        raise BadInput(
            f"{path}: is a branch of {named['path']}, seen from there, where there is nothing; "
            "bring it back, or say where it is with --ckpt BASE --branch BRANCH"
        ) from None


def add_branch(model, path, dtype=None):
    """The model's base composed with the branch that is saved at `path`."""
    path = find(path)
    config, described = describe(path)
    if described is None:
        raise BadInput(f"{path}: is a whole model and no branch; name it with --ckpt")
    base = model.text_model
    named = read_checked(path, "config.json")["base"]
    if named["weights"] != getattr(base, "fingerprint", None):
        raise BadInput(
            f"{path}: is a branch of {named['path']}, seen from there, and this model has other "
            "weights; take the base that it was trained on"
        )
    theirs = (config.vit.image_size, config.grid)
    ours = (model.config.vit.image_size, model.config.grid)
    if model is not base and theirs != ours:
        raise BadInput(
            f"{path}: its pixels per side and visual tokens per side are {theirs}, those of the branch "
            f"{model.branch.name} are {ours}; use them in calls of their own"
        )
    with understood(path):
        branch = on_meta(new_branch, config, described)
    table = {f"{BRANCHES}{branch.name}.*": "{}"}
    fill(branch, path / "model.safetensors", table, dtype)
    base.config.template = config.template
    return kind_of(described).compose(base.resize(*theirs), branch)


def new_branch(config, described):
    """On the meta device the model around the adapter costs nothing."""
    adapter = InfMLLM(config).adapter
    return kind_of(described).Branch(config.llm, **described, adapter=adapter)


def kind_of(described):
    """The module that makes branches so described."""
    return lora if "rank" in described else iaa
