"""text/bpe.py: the ids of the `tokenizers` library, and what of a tokenizer.json is not read."""

import copy
import json
import random

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
