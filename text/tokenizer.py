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
            self.model = sentencepiece.SentencePieceProcessor(model_proto=self.bytes)
            self.bos = self.model.bos_id()
            self.eos = self.model.eos_id()
            if min(self.bos, self.eos) < 0:
                raise ValueError
        except (RuntimeError, ValueError, TypeError) as e:
            raise BadInput(
                f"{self.path}: is not a sentencepiece model with BOS and EOS; name LLaMA's tokenizer.model"
            ) from e
        self.pad = self.model.unk_id()
        self.stops = (self.eos,)  # the ids that end an answer
        self.size = len(self.model)

    def encode(self, text):
        return self.model.encode(text)

    def foreign(self, ids):
        """The share of a text's bytes for which there is no word: each of them, or of its letters, is a token."""
        pieces = self.model.id_to_piece(ids)
        alone = sum(
            self.model.is_byte(i) or (len(p) == 1 and p.isalpha()) for i, p in zip(ids, pieces)
        )
        return alone / max(1, len(self.decode(ids).encode()))

    def decode(self, ids):
        """Text of the ids; placeholders, special ids and those beyond the vocabulary say nothing."""
        special = (self.bos, self.eos, self.pad)
        return self.model.decode([int(i) for i in ids if 0 <= i < self.size and i not in special])


def encode_prompt(tokenizer, text, visual, bos=True):
    """BOS, then the sides of every <ImageHere> tokenised apart, `visual` placeholders in its place."""
    first, *others = text.split(HERE)
    ids = [tokenizer.bos] if bos else []
    ids += tokenizer.encode(first)
    for side in others:
        ids += [IMAGE] * visual + tokenizer.encode(side)
    return ids


def encode_turns(tokenizer, turns, visual, context=math.inf):
    """(prompt, answer) turns -> tokens, targets, equally long and shifted: targets[t] is to be predicted at t.

    An answer of None ends the sequence after its prompt, ready for generation. Turns behind the context
    are left out, but for the one that shows that there are any."""
    tokens, targets = [], []
    for text, answer in turns:
        asked = encode_prompt(tokenizer, text, visual, bos=not tokens)
        said = [] if answer is None else tokenizer.encode(answer) + [tokenizer.eos]
        tokens += asked + said
        targets += [IGNORE] * len(asked) + said
        if len(tokens) > context + 1:
            break
    targets = targets[1:] + [IGNORE]
    if turns[-1][1] is None:
        return tokens, targets
    return tokens[:-1], targets[:-1]  # nothing follows the last EOS: it is no input


def truncate(tokens, context):
    """How many tokens fit; an image is never cut in half, but dropped."""
    cut = min(context, len(tokens))
    while 0 < cut < len(tokens) and tokens[cut] == tokens[cut - 1] == IMAGE:
        cut -= 1
    return cut
