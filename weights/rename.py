"""Foreign tensors into our modules, through a table of names.

On the left of a table stand their names, on the right ours:
    `{}`     on the left any one part of a name, such as a layer's number; on the right what it was, in order
    `*`      on the left any ending; on the right `{}` stands for it
    None     dropped on purpose
    a tuple  the matrix is taken apart into blocks of rows, one for each name
The first line that knows a key holds. A key that no line knows, a tensor of ours that no key fills, and
a shape that differs are errors.
"""

import math
import re

import torch

from model import resize_positions
from support.errors import BadInput
from weights.files import weight_files


def prefixed(table, theirs, ours=""):
    """The same table for names that begin with `theirs` there and with `ours` here."""

    def put(name):
        if isinstance(name, tuple):
            return tuple(map(put, name))
        return name and ours + name

    return {theirs + key: put(name) for key, name in table.items()}


def match(keys, table):
    """{their key: our names for its blocks of rows}; no names for a key that no line knows."""
    lines = []
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace(r"\{\}", "([^.]+)").replace(r"\*", "(.*)")
        names = ours if isinstance(ours, tuple) else (ours,)
        lines.append((re.compile(pattern), names))
    matched = {}
    for key in keys:
        matched[key] = []
        for pattern, names in lines:
            found = pattern.fullmatch(key)
            if found:
                matched[key] = [name and name.format(*found.groups()) for name in names]
                break
    return matched


def faults(matched, shapes, ours):
    """All that does not fit our {name: parameter}, a sentence each."""
    filled = {}
    for key, names in matched.items():
        if not names:
            yield f"{key}: left over, no tensor of this name is known"
        for name in names:
            if name is None:
                continue
            if name not in ours:
                yield f"{key}: left over, this model has no {name}"
            elif not fits(shapes[key], ours[name].shape, len(names), name):
                yield f"{key}: misshapen, {list(shapes[key])} for our {name} {list(ours[name].shape)}"
            if name in filled:
                yield f"{key}: {name} is already filled by {filled[name]}"
            filled[name] = key
    for name in ours:
        if name not in filled:
            yield f"{name}: missing, nothing in the file fills it"


def fits(theirs, ours, blocks, name):
    have = [n for n in theirs if n != 1]  # cls_token (1,1,D) is our (D)
    want = [n for n in (ours[0] * blocks, *ours[1:]) if n != 1]
    if name.endswith("positions") and len(have) == 2 and have[0] > 0:
        patches = have[0] - 1  # of any square: resized when they are copied
        return have[1] == ours[1] and math.isqrt(patches) ** 2 == patches
    return have == want


def fill(model, path, table, dtype):
    """Give a model on the meta device its weights, a tensor at a time: never more than one beyond what stays."""
    file_of = {key: file for file in weight_files(path) for key in file.shapes}
    shapes = {key: file.shapes[key] for key, file in file_of.items()}
    ours = dict(model.named_parameters())
    matched = match(shapes, table)
    wrong = list(faults(matched, shapes, ours))
    if wrong:
        raise BadInput(
            f"{path}: {len(wrong)} tensors do not fit this model ({', '.join(wrong[:10])}); "
            "take the file and the config.json that belong together"
        )
    state = {}
    for key, names in matched.items():
        if any(names):
            blocks = file_of[key].read(key).chunk(len(names))
            for name, block in zip(names, blocks):
                if name:
                    state[name] = copied(block, name, ours[name].shape, dtype)
    model.load_state_dict(state, assign=True)
    return model


def copied(tensor, name, shape, dtype):
    """A copy in our shape, and not a view: that would keep the whole file in memory."""
    if name.endswith("positions"):
        positions = tensor.reshape(-1, shape[1])  # (1+s*s, Dv)
        tensor = resize_positions(positions, math.isqrt(shape[0] - 1))
    return tensor.reshape(shape).to(dtype or tensor.dtype, copy=True)


def on_meta(make, *args):
    """What make(*args) builds, with shapes and without memory for its weights."""
    with torch.device("meta"):
        return make(*args)
