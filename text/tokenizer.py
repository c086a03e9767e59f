"""Text <-> ids."""

import math
import os

import sentencepiece

from model import IGNORE, IMAGE
from support.errors import BadInput
from support.files import whole
from text.templates import HERE


class Tokenizer:
    """A sentencepiece model; `path` is the file, or a folder with tokenizer.model."""

    def __init__(self, path):
        self.path = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else str(path)
        self.bytes = whole(self.path)
        try:
            self.model = m = sentencepiece.SentencePieceProcessor(model_proto=self.bytes)
        except (RuntimeError, ValueError, TypeError) as e:
            raise BadInput(
                f"{self.path}: is not a sentencepiece model; name LLaMA's tokenizer.model"
            ) from e
        self.special = self.bos, self.eos, self.pad = m.bos_id(), m.eos_id(), m.unk_id()
        self.size = len(m)
        if min(self.bos, self.eos) < 0:
            raise BadInput(f"{self.path}: has no BOS or EOS; name LLaMA's tokenizer.model")

    def __reduce__(self):
        return Tokenizer, (self.path,)

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(
            [int(i) for i in ids if self.size > i >= 0 and i not in self.special]
        )


def encode_prompt(tokenizer, text, visual, bos=True):
    """BOS, then the sides of every <ImageHere> tokenised apart, `visual` placeholders in its place."""
    ids = [tokenizer.bos] if bos else []
    for i, side in enumerate(text.split(HERE)):
        ids += ([IMAGE] * visual if i else []) + tokenizer.encode(side)
    return ids


def encode_turns(tokenizer, turns, visual, context=math.inf):
    """(prompt, answer) turns -> tokens, targets, equally long and shifted: targets[t] is to be predicted at t.
    An answer of None ends the sequence after its prompt, ready for generation. Turns behind the context are left out,
    but for the one that shows that there are any."""
    ids, wanted = [], []
    for i, (text, answer) in enumerate(turns):
        asked = encode_prompt(tokenizer, text, visual, bos=i == 0)
        said = [] if answer is None else tokenizer.encode(answer) + [tokenizer.eos]
        ids += asked + said
        wanted += [IGNORE] * len(asked) + said
        if len(ids) > context + 1:
            break
    if turns[-1][1] is None:
        return ids, wanted[1:] + [IGNORE]
    return ids[:-1], wanted[1:]  # nothing follows the last EOS: it is no input


def truncate(tokens, context):
    """How many tokens fit, an image whole or not at all."""
    cut = min(context, len(tokens))
    while 0 < cut < len(tokens) and tokens[cut] == tokens[cut - 1] == IMAGE:
        cut -= 1
    return cut
