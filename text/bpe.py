"""Byte-level BPE as a tokenizer.json describes it: the `tokenizers` library's ids without the library.

A text is split into words by regular expressions, and the bytes of a word are merged pair by pair. Control
tokens are never found in a text: who needs one puts its id.
"""

import heapq
import re
import sys
import unicodedata
from functools import cache
from itertools import groupby

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
LETTERS = {byte: chr(byte) for byte in PLAIN} | {
    byte: chr(256 + n) for n, byte in enumerate(OTHERS)
}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
WORDS, LONG = 2**16, 64  # words whose ids are remembered, of so many characters at most


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

    def members(found):
        name = found[0]
        if name == r"\s":
            return SPACE
        if name.startswith(r"\p"):
            return characters(name[3:-1])
        assert name in (r"\r", r"\n", r"\t") or not name[1].isalnum(), f"{name} in {expression}"
        return name

    def part(found):
        if found[0] == "(":
            return "(?:"
        if found[0] == r"\S":
            return f"[^{SPACE}]"
        if found[0].startswith("["):
            return re.sub(r"\\p\{\w+\}|\\.", members, found[0])
        return f"[{members(found)}]"

    return re.sub(r"\[(?:\\.|[^]\\])+\]|\\p\{\w+\}|\\.|\((?!\?)", part, expression)


def parts(step, key):
    """A step of a tokenizer.json as a list: none, itself, or those of a Sequence."""
    return step.get(key, [step]) if step else []


def expression_of(step):
    """The regular expression of a step that splits a text into its matches and what lies between them."""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] == "ByteLevel":
        assert not step["add_prefix_space"], "it adds a space in front"
        return GPT_2 if step.get("use_regex", True) else None
    assert step["type"] == "Split", f"its pre-tokenizer is {step['type']}"
    assert step["behavior"] == "Isolated", f"its Split is {step['behavior']}"
    pattern = step["pattern"]
    return pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])


class BPE:
    """Its methods have the names of sentencepiece's. An assertion says what of the file is not read here."""

    def __init__(self, d):
        model = d["model"]
        steps = parts(d["pre_tokenizer"], "pretokenizers")
        kind = [model.get("type", "BPE"), *(step["type"] for step in steps)]
        assert kind[0] == "BPE" and kind[-1] == "ByteLevel", f"it is {' behind '.join(kind)}"
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            assert not model.get(name), f"its {name} is {model[name]}"
        normalizers = [step["type"] for step in parts(d["normalizer"], "normalizers")]
        assert set(normalizers) <= {"NFC"}, f"its normalizer is {', '.join(normalizers)}"
        self.nfc = bool(normalizers)
        found = filter(None, map(expression_of, steps))
        self.splits = [re.compile(f"({translated(expression)})") for expression in found]
        self.vocab = model["vocab"]
        added = {token["content"]: token["id"] for token in d["added_tokens"]}
        self.special = {t["content"]: t["id"] for t in d["added_tokens"] if t["special"]}
        self.whole_words = {}  # taken without merging
        if model.get("ignore_merges"):
            self.whole_words = {w: i for w, i in self.vocab.items() if w not in self.special}
        self.ranks = {}  # of a pair of ids: the lower is merged first
        self.merged = []  # the id that the pair of each rank becomes
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            self.ranks[self.vocab[left], self.vocab[right]] = rank
            self.merged.append(self.vocab[left + right])
        pieces = {i: piece for piece, i in (self.vocab | added).items()}
        self.pieces = [pieces.get(i, "") for i in range(max(pieces) + 1)]
        self.bos = None  # what the library puts in front of a text
        for step in parts(d["post_processor"], "processors"):
            for first in step.get("single", [])[:1]:
                self.bos = self.special.get(first.get("SpecialToken", {}).get("id"))
        self.cache = {}

    def __len__(self):
        return len(self.pieces)

    def id_to_piece(self, ids):
        return [self.pieces[i] for i in ids]

    def encode(self, text):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        words = [text]
        for expression in self.splits:
            words = [word for part in words for word in expression.split(part) if word]
        ids = []
        for word in words:
            found = self.cache.get(word)
            if found is None:
                found = self.merge("".join(LETTERS[byte] for byte in word.encode()))
                if len(self.cache) == WORDS:
                    self.cache.clear()
                if len(word) <= LONG:
                    self.cache[word] = found
            ids += found
        return ids

    def merge(self, word):
        """The ids of a word: always the pair of the lowest rank is merged, of equal ones the first.

        A byte that the vocabulary lacks is left out, as by the library."""
        if word in self.whole_words:
            return [self.whole_words[word]]
        ids = [self.vocab[letter] for letter in word if letter in self.vocab]
        after = list(range(1, len(ids) + 1))  # where the next symbol begins, and the one before
        before = list(range(-1, len(ids)))
        ids.append(None)  # no pair has it
        heap = []
        for i in range(len(ids) - 1):
            self.push(heap, ids, i, i + 1)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if self.ranks.get((ids[i], ids[j])) != rank:
                continue  # one of the two has been merged with another
            ids[i], ids[j] = self.merged[rank], None
            after[i] = after[j]
            before[after[i]] = i
            self.push(heap, ids, before[i], i)
            self.push(heap, ids, i, after[i])
        return [i for i in ids if i is not None]

    def push(self, heap, ids, i, j):
        rank = self.ranks.get((ids[i], ids[j]))
        if rank is not None:
            heapq.heappush(heap, (rank, i))

    def decode(self, ids):
        """Bytes that are no UTF-8 become U+FFFD; half a character at the end is one."""
        text = b""
        for piece in self.id_to_piece(ids):
            if all(letter in BYTES for letter in piece):
                text += bytes(BYTES[letter] for letter in piece)
            else:
                text += piece.encode()
        return text.decode(errors="replace")
