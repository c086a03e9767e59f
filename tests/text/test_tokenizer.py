"""text/tokenizer.py: text to ids and back, turns to tokens and targets."""

import pytest
from small import TOKENIZER, V, write

import toy
from model import IGNORE, IMAGE
from support.errors import BadInput
from text.tokenizer import Tokenizer, encode_prompt, encode_turns, truncate


@pytest.mark.parametrize("text", ["a  b", "héllo 漢字 🙂", "x\ny", "</s> <unk>"])
def test_decode_undoes_encode_and_passes_over_what_is_no_text(text):
    ids = TOKENIZER.encode(text)
    ids = [TOKENIZER.bos, IMAGE, *ids, TOKENIZER.eos, IGNORE, TOKENIZER.pad, TOKENIZER.size]
    assert TOKENIZER.decode(ids) == text


def test_text_is_foreign_as_far_as_it_is_read_letter_by_letter():
    foreign = lambda text: TOKENIZER.foreign(TOKENIZER.encode(text))
    assert foreign("") == 0
    for number in range(20):
        scene = toy.scene(0, "train", number)
        for text in (toy.caption(scene), *(phrase for phrase, _ in toy.phrases(scene))):
            assert foreign(text) == 0
    assert foreign("The yellow tram stops in front of the old station.") > 0.2
    assert foreign("漢字") == 1


def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path):
    for content in (b"", b"not a model"):
        write(tmp_path / "tokenizer.model", content)
        with pytest.raises(BadInput, match=r"tokenizer\.model: is not a sentencepiece model"):
            Tokenizer(tmp_path)


def test_generation_starts_from_the_same_ids_as_training():
    first, second = "USER: <ImageHere> a ASSISTANT:", "USER: b ASSISTANT:"
    trained, _ = encode_turns(TOKENIZER, [(first, "red"), (second, "blue")], V)
    asked, targets = encode_turns(TOKENIZER, [(first, "red"), (second, None)], V)
    assert trained[: len(asked)] == asked and len(targets) == len(asked)
    assert asked.count(TOKENIZER.bos) == 1
    asked = encode_prompt(TOKENIZER, first, V)
    assert trained[: len(asked)] == asked and trained.count(IMAGE) == V


def test_an_image_that_does_not_fit_is_dropped_and_nothing_else():
    tokens = [5, IMAGE, IMAGE, 6, IMAGE, IMAGE, 7, 8]
    assert [truncate(tokens, cut) for cut in range(1, 10)] == [1, 1, 3, 4, 4, 6, 7, 8, 8]
