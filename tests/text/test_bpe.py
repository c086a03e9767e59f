"""text/bpe.py: the ids of the `tokenizers` library, and what of a tokenizer.json is not read."""

import copy
import json
import random
import time

import bpe
import pytest
import tokenizers

from text.bpe import BPE


def both(d, specials=()):
    """The library's tokenizer and ours, of one file."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(d))
    theirs.add_special_tokens(list(specials))
    theirs.encode_special_tokens = True  # a text never has one
    return theirs, BPE(json.loads(theirs.to_str()))


def thinned(d):
    """Words that no merge makes any more are whole words all the same, as LLaMA-3 has them."""
    d = copy.deepcopy(d)
    d["model"]["ignore_merges"] = True
    del d["model"]["merges"][::3]
    return d


@pytest.mark.slow
@pytest.mark.parametrize("whole_words", [False, True], ids=["", "ignore_merges"])
@pytest.mark.parametrize("digits", [False, True], ids=["", "digits"])
@pytest.mark.parametrize("nfc", [False, True], ids=["", "nfc"])
@pytest.mark.parametrize("expression", bpe.EXPRESSIONS)
def test_ids_and_texts_are_those_of_the_library(expression, nfc, digits, whole_words):
    d = bpe.trained(expression, nfc, digits)
    theirs, ours = both(thinned(d) if whole_words else d, bpe.CHATML + bpe.HEADERS)
    controls = set(ours.special.values())
    assert len(controls) == 9 and len(ours) == theirs.get_vocab_size()
    rng = random.Random(0)
    texts = list(bpe.strings(5000))
    for text, encoded in zip(texts, theirs.encode_batch(texts)):
        ids = ours.encode(text)
        assert ids == encoded.ids, repr(text)
        assert not controls & set(ids)
        ids = [i for i in ids if rng.random() < 0.9]  # characters cut in half
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), repr(text)
        if not nfc:
            assert ours.decode(encoded.ids) == text


@pytest.mark.parametrize("expression", bpe.EXPRESSIONS)
def test_a_hundred_strings_of_each_are_those_of_the_library(expression):
    theirs, ours = both(bpe.trained(expression), bpe.CHATML)
    for text in bpe.strings(100, seed=2):
        assert ours.encode(text) == theirs.encode(text).ids


def test_merges_as_strings_and_bytes_that_the_vocabulary_lacks_and_long_words():
    d = copy.deepcopy(bpe.trained("llama-3"))
    d["model"]["merges"] = [" ".join(pair) for pair in d["model"]["merges"]]
    lost = {d["model"]["vocab"].pop(letter) for letter in ("q", "Ċ")}
    _, known = both(bpe.trained("llama-3"))
    merges = [merge for merge in d["model"]["merges"] if not {"q", "Ċ"} & set(merge)]
    d["model"]["merges"] = merges
    theirs, ours = both(d)
    for text in ("quite\n\na queue", "q", "the " * 9 + "aaaaaaaa" * 9999, "の" * 9999):
        assert ours.encode(text) == theirs.encode(text).ids
    assert lost & set(known.encode("quite\n")) and not lost & set(ours.encode("quite\n"))


@pytest.mark.slow
def test_a_core_encodes_100_000_tokens_a_second():
    _, ours = both(bpe.trained("llama-3", size=8000))
    texts = [path.read_text() for path in bpe.tiny.ROOT.glob("**/*.py")]
    parts = [part for text in texts for part in text.split("\n\n")]
    began = time.process_time()
    count = sum(len(ours.encode(part)) for part in parts)
    speed = count / (time.process_time() - began)
    assert count > 100_000 and speed > 100_000, f"{speed:,.0f} tokens/s"


def test_the_words_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr("text.bpe.WORDS", 50)
    _, ours = both(bpe.trained("gpt-2"))
    for text in bpe.strings(30):
        ours.encode(text + " " + "a" * 65)
        assert len(ours.cache) <= 50 and max(map(len, ours.cache)) <= 64
