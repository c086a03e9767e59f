"""Byte-level BPE as a tokenizer.json describes it: the `tokenizers` library's ids without the library.

A text is split into words by regular expressions, and the bytes of a word are merged pair by pair. Control
tokens are never found in a text: who needs one puts its id.
"""

import re
import sys
import unicodedata
from functools import cache
from heapq import heappop, heappush
from itertools import groupby

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
LETTERS = {byte: chr(byte) for byte in PLAIN} | {
    byte: chr(256 + n) for n, byte in enumerate(OTHERS)
}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
WORDS, LONG = 2**16, 64  # so many words are remembered, of so many characters at most


def as_letters(text):
    return "".join(LETTERS[byte] for byte in text.encode())


@cache
def characters(category):
    """The ranges of a Unicode category, or of all that begin with its letter, for a regular expression's brackets."""
    ranges = []
    everything = map(chr, range(sys.maxunicode + 1))
    for inside, run in groupby(everything, lambda c: unicodedata.category(c).startswith(category)):
        if inside:
            run = list(run)
            ranges.append(f"{re.escape(run[0])}-{re.escape(run[-1])}")
    return "".join(ranges)


def translated(expression):
    """Oniguruma's expression as Python's, whose `re` has no categories and takes other characters for spaces."""
    parts = re.split(r"(\[(?:\\.|[^]\\])+\])", expression)  # every second one is in brackets
    for n in range(0, len(parts), 2):
        part = re.sub(r"\\s|\\p\{\w+\}", r"[\g<0>]", parts[n])
        parts[n] = part.replace(r"\S", r"[^\s]")
    text = "".join(parts)
    others = set(re.findall(r"\\[A-Za-z]", text)) - {r"\p", r"\s", r"\r", r"\n", r"\t"}
    assert not others, f"{', '.join(others)} in {expression}"
    text = re.sub(r"\\p\{(\w+)\}", lambda found: characters(found[1]), text)
    return text.replace(r"\s", SPACE)


def parts(step, key):
    """A step of a tokenizer.json as a list: none, itself, or those of a Sequence."""
    return step.get(key, [step]) if step else []


def split_of(step):
    """The expression of a step that splits a text into its matches and what lies between them."""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] == "ByteLevel":
        assert not step["add_prefix_space"], "it adds a space in front"
        return GPT_2 if step.get("use_regex", True) else "$."  # which matches nothing
    kind = step["type"], step.get("behavior")
    assert kind == ("Split", "Isolated"), f"it splits by {kind}"
    return step["pattern"]["Regex"]


class BPE:
    """Its methods have the names of sentencepiece's. An assertion says what of the file is not read here."""

    def __init__(self, d):
        model = d["model"]
        steps = parts(d["pre_tokenizer"], "pretokenizers")
        kinds = [model.get("type", "BPE"), *(step["type"] for step in steps)]
        assert kinds[0] == "BPE" and kinds[-1] == "ByteLevel", f"it is {' behind '.join(kinds)}"
        assert not model.get("end_of_word_suffix"), "it marks the ends of words"
        self.normalizer = d.get("normalizer")
        assert self.normalizer in (None, {"type": "NFC"}), f"its normalizer is {self.normalizer}"
        self.splits = [re.compile(f"({translated(split_of(step))})") for step in steps]
        self.special = {t["content"]: t["id"] for t in d["added_tokens"] if t["special"]}
        vocab = model["vocab"]
        self.vocab = {piece: i for piece, i in vocab.items() if piece not in self.special}
        self.whole_words = self.vocab if model.get("ignore_merges") else {}
        self.merges = {}  # pair of ids: (rank, what it becomes); the lowest rank is merged first
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            self.merges[vocab[left], vocab[right]] = rank, vocab[left + right]
        self.pieces = {i: piece for piece, i in vocab.items()}
        self.pieces |= {t["id"]: as_letters(t["content"]) for t in d["added_tokens"]}
        assert all(type(i) is int and 0 <= i < 2**24 for i in self.pieces), "an id is out of range"
        self.bos = None  # what the library puts in front of a text
        for step in parts(d.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                self.bos = self.special.get(step["single"][0].get("SpecialToken", {}).get("id"))
        self.cache = {}

    def __len__(self):
        return max(self.pieces) + 1

    def id_to_piece(self, ids):
        return [self.pieces.get(i, "") for i in ids]

    def encode(self, text):
        if self.normalizer:
            text = unicodedata.normalize("NFC", text)
        words = [text]
        for split in self.splits:
            words = [word for part in words for word in split.split(part) if word]
        ids = []
        for word in words:
            found = self.cache.get(word)
            if found is None:
                found = self.merge(as_letters(word))
                if len(self.cache) < WORDS and len(word) <= LONG:
                    self.cache[word] = found
            ids += found
        return ids

    def merge(self, word):
        """The ids of a word: always the pair of the lowest rank is merged, of equal ones the first.

        A byte that the vocabulary lacks is left out, as by the library."""
        if word in self.whole_words:
            return [self.whole_words[word]]
        ids = [self.vocab[letter] for letter in word if letter in self.vocab]
        ids.append(None)  # the end; as what was merged away, it is part of no pair
        after = [*range(1, len(ids)), 0]  # where the next symbol stands
        before = list(range(-1, len(ids)))
        heap = []
        fresh = range(len(ids))  # symbols that have a new neighbour behind them
        while True:
            for i in fresh:
                found = self.merges.get((ids[i], ids[after[i]]))
                if found:
                    heappush(heap, (found, i))
            if not heap:
                return [i for i in ids if i is not None]
            found, i = heappop(heap)
            j = after[i]
            fresh = ()
            if self.merges.get((ids[i], ids[j])) == found:  # else one of them was merged meanwhile
                ids[i], ids[j] = found[1], None
                after[i] = after[j]
                before[after[i]] = i
                fresh = (before[i], i)

    def decode(self, ids):
        """Bytes that are no UTF-8 become U+FFFD; half a character at the end is one."""
        letters = "".join(self.id_to_piece(ids))
        return bytes(BYTES[c] for c in letters if c in BYTES).decode(errors="replace")
