"""Our own checkpoint directory."""

import json
import os
import shutil
import zlib
from pathlib import Path

from torch import nn

from model import BRANCHES, Config, InfMLLM
from support.errors import BadInput
from support.files import read_json
from weights.configs import from_a_stranger
from weights.files import save_tensors, weight_files
from weights.rename import fill, on_meta

FORMAT = 1


def save(path, model, tokenizer=None, training=None, optimizer=None, state=None, base=None):
    """Write a checkpoint directory beside `path` and rename it into place: a reader sees the old one or the new one.

    model: an InfMLLM, or (Config, {name: tensor}) gathered by a sharded run. training: what config.json tells of how
    it was trained. optimizer: {name: tensor}; state: what JSON can hold; both only where the run is to be resumed.
    base: the checkpoint that these tensors, a branch's, are added to.
    """
    path = Path(path)
    config, tensors = (
        (model.config, dict(model.named_parameters())) if isinstance(model, nn.Module) else model
    )
    mend(path)
    new = path.with_name(path.name + ".new")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    described = {"format": FORMAT, "model": config.to_dict(), "training": training or {}}
    if base:
        described["base"] = {"path": os.path.relpath(base, path), "weights": fingerprint(base)}
    (new / "config.json").write_text(json.dumps(described, indent=2))
    save_tensors(tensors, new / "model.safetensors")
    if tokenizer is not None:
        (new / "tokenizer.model").write_bytes(tokenizer.bytes)
    if optimizer is not None:
        save_tensors(optimizer, new / "optimizer.safetensors")
    if state is not None:
        (new / "state.json").write_text(json.dumps(state, indent=2))
    sums = {f.name: [f.stat().st_size, checksum(f)] for f in sorted(new.iterdir())}
    (new / "checksums.json").write_text(json.dumps(sums, indent=2))
    for f in [*new.iterdir(), new]:
        sync(f)
    if path.exists():
        path.rename(path.with_name(path.name + ".old"))
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(path.with_name(path.name + ".old"), ignore_errors=True)


def mend(path):
    """Undo what an interrupted save left: the old checkpoint, set aside for a moment, comes back."""
    old = path.with_name(path.name + ".old")
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        old.rename(path)


def checksum(path):
    total = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            total = zlib.crc32(block, total)
    return total


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(path):
    """The directory that a name stands for: itself, the one set aside by an interrupted save, or its newest step-*."""
    path = Path(path)
    for candidate in (path, path.with_name(path.name + ".old")):
        if (candidate / "config.json").is_file():
            return candidate
    steps = [
        p for p in path.glob("step-*") if p.name[5:].isdigit() and (p / "config.json").is_file()
    ]
    if steps:
        return max(steps, key=lambda p: int(p.name[5:]))
    raise BadInput(
        f"{path}: no checkpoint here (no config.json, no step-*); python train.py --stage 1 makes one"
    )


def verify(path, *names):
    """Sizes and checksums as they were when it was written: of every file, or of those named."""
    sums = read_json(path / "checksums.json")
    for name in names or ("config.json", "model.safetensors"):
        if name not in sums:
            raise BadInput(
                f"{path / 'checksums.json'}: does not list {name}; take another checkpoint"
            )
    for name, entry in sums.items():
        if names and name not in names:
            continue
        file = path / name
        if (
            Path(name).name != name
            or not os.path.isfile(file)
            or [file.stat().st_size, checksum(file)] != entry
        ):
            raise BadInput(
                f"{file}: is not what was written (its size or checksum differs); take another checkpoint"
            )


def fingerprint(path):
    """Size and checksum of a checkpoint's weights, as they were written."""
    return read_json(Path(path) / "checksums.json")["model.safetensors"]


def description(path):
    """(config.json, the Config in it) of a checkpoint directory whose files are whole."""
    verify(path)
    described = read_json(path / "config.json")
    if described.get("format") != FORMAT:
        raise BadInput(
            f"{path / 'config.json'}: format {described.get('format')!r}, and this program reads {FORMAT}; "
            "use the version that wrote it"
        )
    return described, our_config(described, path)


@from_a_stranger
def our_config(d, what):
    return Config(**d["model"])


def load(path, image_size=None, dtype=None):
    """The model of a checkpoint directory, in the dtypes that were saved unless one is asked for. A branch comes on its
    base, which lies where its checkpoint says, and is the one in use."""
    path = find(path)
    described, config = description(path)
    if "base" in described:
        model = add_branch(load(base_of(path, described), dtype=dtype), path, dtype)
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
    try:
        base = find(os.path.normpath(path / described["base"]["path"]))
    except BadInput:
        raise BadInput(
            f"{path}: is a branch of {described['base']['path']}, seen from there, where there is nothing; "
            "bring it back, or say where it is with --ckpt BASE --branch BRANCH"
        ) from None
    if "base" in read_checked(base, "config.json"):
        raise BadInput(f"{path}: its base is a branch itself; take another")
    return base


def add_branch(model, path, dtype=None):
    """Put the branch that is saved at `path` on its base and take it; a base may have several."""
    path = find(path)
    described, config = description(path)
    if "base" not in described:
        raise BadInput(f"{path}: is a whole model and no branch; name it with --ckpt")
    if described["base"]["weights"] != getattr(model, "fingerprint", None):
        raise BadInput(
            f"{path}: is a branch of {described['base']['path']}, seen from there, and this model has other "
            "weights; take the base that it was trained on"
        )
    ((name, inner),) = config.llm.branches.items()
    c, names = model.config, model.llm.branches
    if name in names:
        raise BadInput(
            f"{path}: the model has a branch {name} already; use them in calls of their own"
        )
    if not names:
        c.grid = config.grid
        model.resize(config.vit.image_size)
    theirs, ours = ((x.vit.image_size, x.grid) for x in (config, c))
    if theirs != ours:
        raise BadInput(
            f"{path}: its pixels per side and visual tokens per side are {theirs}, those of the branch "
            f"{', '.join(names)} are {ours}; use them in calls of their own"
        )
    branch = on_meta(InfMLLM, config).llm.branches[name]
    table = {f"{BRANCHES}{name}.{n}": n for n, _ in branch.named_parameters()}
    c.llm.branches[name] = inner
    names[name] = fill(branch, weight_files(path / "model.safetensors"), table, path, dtype)
    return model.use(name)
