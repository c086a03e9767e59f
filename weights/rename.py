"""From a table and the shapes on both sides to a list of moves."""

import math
import re

import torch
from torch import nn

from model import resize_positions
from support.errors import BadInput


def prefixed(table, theirs, ours=""):
    """The same table for tensors that stand one floor deeper, there and here."""

    def put(name):
        return tuple(put(n) for n in name) if isinstance(name, tuple) else name and ours + name

    return {theirs + key: put(name) for key, name in table.items()}


def targets_of(key, table):
    """Our names for their key, one per row block that it is taken apart into (None: dropped). KeyError if unknown."""
    for theirs, ours in table:
        if match := theirs.fullmatch(key):
            number = match[1] if match.groups() else ""
            return [
                name and name.replace("{}", number)
                for name in (ours if isinstance(ours, tuple) else (ours,))
            ]
    raise KeyError(key)


def moves(model, shapes, table, what):
    """[(their key, [(our name, row block, of how many), None if dropped, ...])]; an error lists all that is wrong."""
    table = [
        (re.compile(re.escape(k).replace(r"\{\}", r"(\d+)").replace(r"\*", ".*")), v)
        for k, v in table.items()
    ]
    ours, filled, plan, wrong = dict(model.named_parameters()), {}, [], []
    for key, shape in shapes.items():
        if len(wrong) > 100:
            break  # a stranger's file may have a million names
        try:
            names = targets_of(key, table)
        except KeyError:
            wrong.append(f"{key}: left over, no tensor of this name is known")
            continue
        targets = []
        for name in names:
            if name is None:
                targets.append(None)
                continue
            name, block, of = re.fullmatch(r"(.*?)(?:\[(\d)/(\d)\])?", name).groups()
            block, of = int(block or 0), int(of or 1)
            if name not in ours:
                wrong.append(f"{key}: left over, this model has no {name}")
                continue
            want, have = list(ours[name].shape), list(shape)
            while len(have) > len(want) and have[0] == 1:
                have = have[1:]  # cls_token (1,1,D) is our (D)
            have = [have[0] * of // len(names), *have[1:]]
            grid = (
                name.endswith("positions")
                and have[1:] == want[1:]
                and math.isqrt(have[0] - 1) ** 2 == have[0] - 1
            )
            if have != want and not grid:
                wrong.append(f"{key}: misshapen, {list(shape)} for our {name} {want}")
            if (name, block) in filled:
                wrong.append(f"{key}: {name} is already filled by {filled[name, block]}")
            filled[name, block] = key
            targets.append((name, block, of))
        plan.append((key, targets))
    full = {name: sum(1 for n, _ in filled if n == name) for name, _ in filled}
    blocks = {name: of for _, targets in plan for name, _, of in filter(None, targets)}
    wrong += [
        f"{name}: missing, nothing in the file fills it"
        for name in ours
        if full.get(name, 0) < blocks.get(name, 1)
    ]
    if wrong:
        raise BadInput(
            f"{what}: {len(wrong)} tensors do not fit this model ({', '.join(wrong[:10])}"
            f"{', ...' if len(wrong) > 10 else ''}); take the file and the config.json that belong together"
        )
    return plan


def fill(model, files, table, what, dtype):
    """Give a model on the meta device its weights, a tensor at a time: never more than one beyond what stays."""
    where = {key: file for file in files for key in file.shapes}
    shapes = {key: shape for file in files for key, shape in file.shapes.items()}
    for key, targets in moves(model, shapes, table, what):
        if not any(targets):
            continue
        for part, target in zip(where[key].read(key).chunk(len(targets)), targets):
            if target:
                put(model, *target, part, dtype)
    return model


def put(model, name, block, of, tensor, dtype):
    path, leaf = name.rpartition(".")[::2]
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    if leaf == "positions":
        tensor = resize_positions(tensor.reshape(-1, old.shape[1]), math.isqrt(len(old) - 1))
    if old.is_meta:  # never an alias of the file: that would keep all of it in memory
        new = nn.Parameter(
            torch.empty(old.shape, dtype=dtype or tensor.dtype), requires_grad=old.requires_grad
        )
        setattr(owner, leaf, new)
        old = new
    old.data.chunk(of)[block].copy_(tensor.reshape(old.data.chunk(of)[block].shape))


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)
