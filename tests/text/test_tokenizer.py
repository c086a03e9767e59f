"""text/tokenizer.py: text to ids and back, turns to tokens and targets."""

import copy
import json

import bpe
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


@pytest.fixture
def folder(tmp_path):
    return bpe.folder(tmp_path / "llm", eos="<|im_end|>")


def changed(folder, name, **values):
    file = folder / name
    d = json.loads(file.read_text()) if file.exists() else {}
    write(file, d | values)


@pytest.mark.parametrize(
    "values, what",
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "it is Unigram behind ByteLevel"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "it is BPE behind Metaspace"),
        ({"pre_tokenizer": None}, "it is BPE"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer is {'type': 'NFKC'}"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "it marks the ends of words"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "space in front"),
        ({"model": None}, "AttributeError"),
        (
            {"added_tokens": [{"id": 2**40, "content": "x", "special": True}]},
            "an id is out of range",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "KeyError: 'ab'"),
    ],
)
def test_a_tokenizer_json_that_is_read_otherwise_here_is_refused_by_what_it_is(
    folder, values, what
):
    changed(folder, "tokenizer.json", **values)
    with pytest.raises(BadInput, match="tokenizer.json: is not a byte-level BPE") as caught:
        Tokenizer(folder)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "split, what",
    [
        (dict(behavior="Removed"), "it splits by ('Split', 'Removed')"),
        (dict(pattern={"Regex": r"\w+"}), r"\w in \w+"),
        (dict(pattern={"Regex": r"(a"}), "error"),
        (dict(type="Whitespace"), "it splits by ('Whitespace', "),
    ],
)
def test_a_split_that_is_not_understood_is_refused(folder, split, what):
    step = dict(type="Split", pattern={"Regex": r"\s+"}, behavior="Isolated", invert=False) | split
    last = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
    steps = dict(type="Sequence", pretokenizers=[step, last])
    changed(folder, "tokenizer.json", pre_tokenizer=steps)
    with pytest.raises(BadInput, match="is not a byte-level BPE") as caught:
        Tokenizer(folder)
    assert what in str(caught.value)


def test_a_folder_is_searched_and_says_what_it_has_instead(folder):
    assert Tokenizer(folder).path == str(folder / "tokenizer.json")
    write(folder / "tokenizer.model", TOKENIZER.files["tokenizer.model"])
    assert Tokenizer(folder).path == str(folder / "tokenizer.model")
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    write(folder / "tekken.json", {})
    names = r"tokenizer.model and no tokenizer.json \(but tekken.json, tokenizer_config.json\)"
    with pytest.raises(BadInput, match=f"llm: has no {names}; name one with --tokenizer"):
        Tokenizer(folder)


def test_which_tokens_end_an_answer_is_read_beside_it_and_kept_by_what_is_saved(folder, tmp_path):
    assert Tokenizer(folder).stops == (902,)
    changed(folder, "generation_config.json", eos_token_id=[900, 902])
    changed(folder, "config.json", eos_token_id=901)
    tokenizer = Tokenizer(folder)
    assert (tokenizer.eos, tokenizer.stops, tokenizer.bos) == (902, (902, 900, 901), None)
    for name, content in tokenizer.files.items():
        write(tmp_path / "ckpt" / name, content)
    again = Tokenizer(tmp_path / "ckpt", tokenizer.template)
    assert again.stops == tokenizer.stops and again.encode("what?") == tokenizer.encode("what?")
    assert Tokenizer(bpe.folder(tmp_path / "bare")).stops == (902,)  # the template's own
    plain = bpe.folder(tmp_path / "plain", specials=[])
    with pytest.raises(BadInput, match="nothing says which token ends an answer; put"):
        Tokenizer(plain)
    changed(plain, "tokenizer_config.json", eos_token={"content": "!"})  # no control token
    changed(plain, "config.json", eos_token_id=[-1, 900, 7, [], None])
    with pytest.raises(BadInput, match="nothing says"):
        Tokenizer(plain)


def test_byte_level_text_is_foreign_where_it_is_read_byte_by_byte(folder):
    tokenizer = Tokenizer(folder)
    foreign = lambda text: tokenizer.foreign(tokenizer.encode(text))
    assert foreign(" the checkpoint of the training") < 0.2 < 0.6 < foreign("ვეფხისტყაოსანი")


def test_a_tokenizer_goes_to_loader_processes_as_it_is(folder):
    tokenizer = Tokenizer(folder)
    again = copy.deepcopy(tokenizer)
    assert vars(again).keys() == vars(tokenizer).keys()
    assert again.encode("a 12 é") == tokenizer.encode("a 12 é")


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
