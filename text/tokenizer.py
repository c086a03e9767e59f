"""Text <-> ids."""

import json
import math
import re
from pathlib import Path

import sentencepiece

from model import IGNORE, IMAGE
from support.errors import BadInput
from support.files import read_json, whole
from text.bpe import BPE
from text.templates import CONTROL, HERE, TEMPLATES

NAMES = ("tokenizer.model", "tokenizer.json")  # the first that is there is taken
LARGEST = 2**26  # bytes of a tokenizer.json; LLaMA-3.2's has 17 million
ENDS = {  # where it stands which tokens end an answer; the first of them is the one that we put
    "tokenizer_config.json": "eos_token",
    "generation_config.json": "eos_token_id",
    "config.json": "eos_token_id",
}
PARTS = re.compile(f"({HERE}|{CONTROL}<[^>]+>)")  # of a prompt; what is none of the two is text


class Tokenizer:
    """sentencepiece or byte-level BPE, with the turns that it is asked in.

    path: tokenizer.model, tokenizer.json, or a folder. template: a name in TEMPLATES; without one, the row
    whose control tokens the tokenizer has."""

    def __init__(self, path, template=None):
        self.path = find(path)
        self.model = read_model(self.path)
        self.files = {Path(self.path).name: whole(self.path)}  # what a checkpoint keeps
        beside = Path(self.path).parent
        if isinstance(self.model, BPE):
            self.bos = self.model.bos
            self.pad = 0  # any would do
            self.controls = self.model.special  # {name: id}
            ends = named_ends(beside)
        else:
            self.bos = self.model.bos_id()
            self.pad = self.model.unk_id()
            ids = filter(self.model.is_control, range(len(self.model)))
            self.controls = {self.model.id_to_piece(i): i for i in (*ids, self.pad)}
            ends = [self.model.eos_id()]
        self.size = len(self.model)
        self.template = template or self.guess(beside)
        row = TEMPLATES[self.template]
        if missing := row.controls - self.controls.keys():
            raise BadInput(
                f"{self.path}: has no {', '.join(missing)}, so its turns are not {self.template}"
            )
        known = self.controls | {i: i for i in self.controls.values()}
        ends = [known[end] for end in (row.end, *ends) if end in known]
        self.stops = tuple(dict.fromkeys(ends))  # any of them ends an answer
        if not self.stops:
            raise BadInput(
                f"{self.path}: nothing says which token ends an answer; put the "
                f"{' or '.join(ENDS)} that belongs to it beside it"
            )
        self.eos = self.stops[0]  # the one of them that we put
        if isinstance(self.model, BPE):
            ends = json.dumps({"eos_token_id": self.stops})
            self.files["generation_config.json"] = ends.encode()

    def guess(self, folder):
        """The first row whose control tokens are there, and whose system turn stands in the folder's own template."""
        own = ""
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            if (folder / name).is_file():
                own += whole(folder / name).decode(errors="replace")
        for name, row in TEMPLATES.items():
            if row.system in own and row.controls <= self.controls.keys():
                return name
        return "vicuna"

    def encode(self, text):
        return self.model.encode(text)

    def foreign(self, ids):
        """The share of a text's bytes for which there is no word: each of them, or of its letters, is a token."""
        pieces = self.model.id_to_piece(ids)
        alone = sum(p.startswith("<0x") or (len(p) == 1 and p.isalpha()) for p in pieces)
        return alone / max(1, len(self.decode(ids).encode()))

    def decode(self, ids):
        """Text of the ids; placeholders, special ids and those beyond the vocabulary say nothing."""
        silent = set(self.controls.values())
        return self.model.decode([int(i) for i in ids if 0 <= i < self.size and i not in silent])


def find(path):
    """The tokenizer's own file: the one that was named, or that of a folder."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    for name in NAMES:
        if (folder / name).is_file():
            return str(folder / name)
    found = sorted(file.name for file in folder.iterdir())[:8]
    raise BadInput(
        f"{path}: has no {' and no '.join(NAMES)} (but {', '.join(found) or 'nothing'}); "
        "name one with --tokenizer"
    )


def read_model(path):
    kind = "sentencepiece model with BOS and EOS"
    try:
        if path.endswith(".json"):
            kind = "byte-level BPE as it is read here"
            return BPE(read_json(path, LARGEST))
        model = sentencepiece.SentencePieceProcessor(model_proto=whole(path))
        assert min(model.bos_id(), model.eos_id()) >= 0, "one is missing"
        return model
    except BadInput:
        raise
    except Exception as e:  # whatever a library or a stranger's values lead to
        why = str(e) if isinstance(e, AssertionError) else f"{type(e).__name__}: {e}"
        raise BadInput(
            f"{path}: is not a {kind} ({why[:150]}); name another with --tokenizer"
        ) from None


def named_ends(folder):
    """Names and ids of the tokens that end an answer, as the files beside a tokenizer tell them."""
    ends = []
    for name, key in ENDS.items():
        if (folder / name).is_file():
            said = read_json(folder / name).get(key)
            ends += said if isinstance(said, list) else [said]
    return [end for end in ends if isinstance(end, (str, int))]


def encode_prompt(tokenizer, text, visual, bos=True):
    """BOS if there is one, then the prompt: `visual` placeholders for every <ImageHere>, the ids of control
    tokens, and what lies between them, each tokenised apart."""
    ids = [tokenizer.bos] if bos and tokenizer.bos is not None else []
    for part in PARTS.split(text):
        if part == HERE:
            ids += [IMAGE] * visual
        elif part.startswith(CONTROL):
            ids.append(tokenizer.controls[part.removeprefix(CONTROL)])
        else:
            ids += tokenizer.encode(part)
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
