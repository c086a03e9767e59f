"""Foreign tensors into our modules, through a table of names.

On the left of a table stand their names, on the right ours:
    `{}`     on the left any one part of a name, such as a layer's number; on the right what it was, in order
    `*`      on the left anything, dots included; on the right `{}` stands for it
    None     dropped on purpose
    a tuple  the matrix is taken apart into blocks of rows, one for each name
The first line that knows a key holds; a key that no line knows stays as it is. A key that is none of our
names then, a tensor of ours that no key fills, and a shape that differs are errors.
"""

import math
import re

import torch

from model import resize_positions
from support.errors import BadInput
from weights.files import TensorFile, weight_files

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def prefixed(table, theirs, ours=""):
    """The same table for names that begin with `theirs` there and with `ours` here."""

    def put(name):
        if isinstance(name, tuple):
            return tuple(map(put, name))
        return name and ours + name

    return {theirs + key: put(name) for key, name in table.items()}


def match(keys, table):
    """{their key: our names for its blocks of rows}"""
    lines = []
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace(r"\{\}", "([^.]+)").replace(r"\*", "(.*)")
        names = ours if isinstance(ours, tuple) else (ours,)
        lines.append((re.compile(pattern), names))
    matched = {}
    for key in keys:
        matched[key] = [key]
        for pattern, names in lines:
            found = pattern.fullmatch(key)
            if found:
                matched[key] = [name and name.format(*found.groups()) for name in names]
                break
    return matched


def faults(matched, theirs, ours):
    """All that does not fit our {name: parameter}, a sentence each."""
    filled = {}
    for key, names in matched.items():
        found = f"{list(theirs[key].shape)} of {theirs[key].dtype}"
        for name in filter(None, names):
            if name not in ours:
                yield f"{key}: left over, this model has no {name}"
            elif name in filled:
                yield f"{key}: left over, {name} is already filled by {filled[name]}"
            elif not fits(name, theirs[key], ours[name].shape, len(names)):
                yield f"{key}: misshapen, {found} for our {name} {list(ours[name].shape)}"
            filled[name] = key
    for name in ours:
        if name not in filled:
            yield f"{name}: missing, nothing in the file fills it"


def fits(name, theirs, ours, blocks):
    have = [n for n in theirs.shape if n != 1]  # cls_token (1,1,D) is our (D)
    want = [n for n in (ours[0] * blocks, *ours[1:]) if n != 1]
    if name.endswith("positions") and len(have) == 2 and beyond(have[0]) == beyond(want[0]) <= 1:
        have[0] = want[0]  # another square grid, CLS or none in front, which fill() resizes
    return have == want and theirs.dtype in FLOATS


def beyond(n):
    """By how much n is more than a square: 1 where CLS stands in front of a grid."""
    return n - math.isqrt(n) ** 2


def fill(model, path, table, dtype):
    """Give a model on the meta device its weights, a tensor at a time: never more than one beyond what stays."""
    files = [TensorFile(file) for file in weight_files(path)]
    file_of = {key: file for file in files for key in file.like}
    if len(file_of) < sum(len(file.like) for file in files):
        raise BadInput(f"{path}: two of its files hold one tensor; keep those that belong together")
    theirs = {key: file.like[key] for key, file in file_of.items()}
    ours = dict(model.named_parameters())
    matched = match(theirs, table)
    wrong = list(faults(matched, theirs, ours))
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
                if name:  # a copy, and not a view: that would keep the whole file in memory
                    like = ours[name].shape
                    if name.endswith("positions"):
                        block = resize_positions(block.view(-1, like[1]), math.isqrt(like[0]))
                    block = block.reshape(like)
                    state[name] = block.to(dtype or block.dtype, copy=True)
    model.load_state_dict(state, assign=True)
    return model


def on_meta(make, *args):
    """What make(*args) builds, with shapes and without memory for its weights."""
    with torch.device("meta"):
        return make(*args)
