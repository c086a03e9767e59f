"""Metrics against pycocoevalcap's scorer, the Java tokeniser where there is one, and cases worked by hand."""

import random
import shutil
import sys
from types import SimpleNamespace

import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from support.metrics import (
    CONTRACTIONS,
    MME_PARTS,
    choice_letter,
    cider,
    exact_score,
    iou,
    mean,
    mme,
    mme_answer,
    normalise,
    normalise_m4c,
    pope,
    pope_answer,
    short_answer_scores,
    spacy_model,
    tokenise,
    vqa_score,
)


def rows(table):
    """The two columns of a table that is written as text: what goes in => what comes out."""
    return [line.split(" => ") for line in table.strip("\n").splitlines()]


# ------------------------------------------------------------------------------------------------------------ captions
CAPTIONS = """
A man riding a wave on top of a surfboard.
A surfer in a black wetsuit, riding a big wave!
The man's surfboard is white; he isn't falling.
A person surfs on the sea at 5:30 p.m.

Two red-and-white buses parked at a bus stop.
A bus (number 42) next to a "STOP" sign
Buses on a street - people are waiting.
It's a busy street with 2 buses...

A cat sitting on top of a laptop computer.
A black cat lies on someone's laptop.
The cat can't be moved
A cat on a keyboard, looking at the screen

A plate of food with meat & vegetables.
There's broccoli on the plate, and 1/2 a potato.
A dinner plate sits on a table.
Food on a plate

A 3-year-old girl holding a tennis racket.
The little girl's playing tennis: she'll miss.
A child with a racquet on a court.
A girl. A racket.

A train at the platform at 10 o'clock?
People wait for the train to stop
A long yellow train on the tracks
The dogs' train costs $5.99, 50% off
"""
TOKENS = """
A Man, riding a WAVE. => a man riding a wave
it's isn't can't they'll we're I'm he'd you've => it 's is n't ca n't they 'll we 're i 'm he 'd you 've
couldn't've => could n't 've
the man’s and the dogs' bowls => the man 's and the dogs bowls
a black-and-white t-shirt - or -- not... => a black-and-white t-shirt or not
“smart” "plain" 'single' `tick` – — … => smart plain single tick
at 5:30 p.m. near the U.S. border, 1,000 miles; 3.5 or 1/2?! => at 5:30 p.m. near the u.s. border 1,000 miles 3.5 or 1/2
five o'clock: $5 & 50% #1 => five o'clock $ 5 & 50 % # 1
one (two) [three] {four} => one -lrb- two -rrb- -lsb- three -rsb- -lcb- four -rcb-
beach,and café => beach and café
"""


@pytest.mark.parametrize("seed", range(24))
def test_cider_of_random_corpora_is_the_official_scorers(seed):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(rng.choice([3, 12, 60]))]

    def sentence():
        return " ".join(rng.choices(words, k=rng.choice([0, 1, 2, 3, 8, 15])))

    samples = []
    official = CiderScorer()
    for _ in range(rng.choice([1, 2, 7, 40])):
        texts = [sentence() for _ in range(rng.choice([1, 5]))]
        said = rng.choice([sentence(), texts[0], "never seen in any reference"])
        samples.append((said, texts))
        official += (said, texts)
    _, each = official.compute_score()
    assert cider(*zip(*samples), split=str.split) == pytest.approx(each, abs=1e-9)


def test_cider_splits_texts_and_gives_ten_to_a_copy():
    said = ["The dog's ball isn't red.", "two blue squares on white"]
    assert cider(said, [["the dog 's ball is n't RED"], said[1:]]) == pytest.approx([10, 10])


def test_a_mean_does_not_depend_on_the_order_of_samples():
    assert mean([1e16, 1, -1e16]) == (1 / 3, 3)


def test_captions_are_split_as_the_treebank_splits_them():
    for text, tokens in rows(TOKENS):
        assert tokenise(text) == tokens.split()
        assert tokenise(tokens) == tokens.split(), "twice is once"
    assert tokenise(" \t\n") == []


@pytest.mark.skipif(not shutil.which("java"), reason="the official tokeniser is a Java program")
def test_captions_are_split_as_the_official_program_splits_them():
    captions = {text: [{"caption": text}] for text in CAPTIONS.split("\n") if text}
    for text, [words] in PTBTokenizer().tokenize(captions).items():
        assert tokenise(text) == words.split(), text


# ------------------------------------------------------------------------------------------------------- VQA accuracy
MARKS = ';/[]"{}()=+\\_-><@`,?!'
CLEAN = """
A Cat => cat
an apple the  end => apple end
another someone => another someone
none zero one two three four five six => 0 0 1 2 3 4 5 6
seven eight nine Ten eleven => 7 8 9 10 eleven
U.S.A yes. 5. => usa yes 5
3.5 .5 a.5 3 . 5 => 3.5 .5 a.5 3 5
x................................. => x.
x-y z -w => xy z w
x-y z- w => xy z w
red /blue/green => red bluegreen
yes! no?maybe => yes no maybe
1,000 => 1000
1,000-foot => 1000foot
a-b 1,000 => ab 1000
1,b => 1 b
1, 2 => 1 2
joe's 5:30 $5 & 50% #1* => joe's 5:30 $5 & 50% #1*
DONT isnt whats the => don't isn't what's
couldntve couldnt've couldn'tve => couldntve couldn't've couldn't've
somebody'd lets let's => somebodyd lets let's
Im Ive wed ill => im ive wed ill
"""
CLEAN_TEXTVQA = """
McDonald's => mcdonald 's
what's? => what 's
1,000-foot => 1000 foot
red,blue => redblue
who?me => whome
the-end , => end
the Two. => 2
dont => don't
"""
# the published table, less four keys with a capital I (dead) and two that map to themselves
PUBLISHED = """ain't aren't can't could've couldn't couldn't've couldn't've didn't doesn't don't hadn't hadn't've
hadn't've hasn't haven't he'd he'd've he'd've he's how'd how'll how's isn't it'd it'd've it'd've it'll ma'am mightn't
mightn't've mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at 'ow's'at 'ow's'at shan't
she'd've she'd've should've shouldn't shouldn't've shouldn't've somebodyd somebody'd've somebody'd've somebody'll
somebody's someone'd someone'd've someone'd've someone'll someone's something'd something'd've something'd've
something'll that's there'd there'd've there'd've there're there's they'd they'd've they'd've they'll they're they've
'twas wasn't we'd've we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've wouldn't've y'all
y'all'll y'all'll y'all'd've y'all'd've y'all'd've you'd you'd've you'd've you'll you're you've""".split()
KEYS = """aint arent cant couldve couldnt couldn'tve couldnt've didnt doesnt dont hadnt hadnt've hadn'tve hasnt havent
hed hed've he'dve hes howd howll hows isnt itd itd've it'dve itll maam mightnt mightnt've mightn'tve mightve mustnt
mustve neednt notve oclock oughtnt ow's'at 'ows'at 'ow'sat shant shed've she'dve shouldve shouldnt shouldnt've
shouldn'tve somebody'd somebodyd've somebody'dve somebodyll somebodys someoned someoned've someone'dve someonell
someones somethingd somethingd've something'dve somethingll thats thered thered've there'dve therere theres theyd
theyd've they'dve theyll theyre theyve twas wasnt wed've we'dve weve werent whatll whatre whats whatve whens whered
wheres whereve whod whod've who'dve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldnt've wouldn'tve yall
yall'll y'allll yall'd've y'alld've y'all'dve youd youd've you'dve youll youre youve""".split()


def test_vqa_answers_are_normalised_as_the_official_code_does():
    for text, clean in rows(CLEAN):
        assert normalise(text) == clean
    assert normalise("a") == normalise("..") == normalise("") == ""
    for mark in MARKS:
        assert normalise(f"x{mark}y") == "x y", "between letters a mark becomes a space"
        assert normalise(f"x{mark} y{mark}z") == "x yz", "once beside a space, it goes everywhere"
    for text, clean in rows(CLEAN_TEXTVQA):
        assert normalise_m4c(text) == clean


def test_the_contractions_are_those_of_the_published_table():
    assert CONTRACTIONS == dict(zip(KEYS, PUBLISHED, strict=True))


@pytest.mark.parametrize(
    "prediction, answers, vqav2, infmllm, textvqa",
    [
        # where all agree, the official code matches letter by letter
        ("Black.", ["black"] * 10, 0, 1, 1),
        (" to\tbe\n", ["to be\t"] * 10, 1, 1, 1),
        # one who disagrees brings the normalisation
        ("the two cats", ["2 cats", "2 cats", "two cats"] + ["many"] * 7, 0.9, 0.9, 0.9),
        ("none", ["none"] + ["no"] * 9, 0.3, 0.3, 0.3),
        ("a", ["the"] * 4 + ["b"] * 6, 1, 1, 1),  # both are nothing, and nothing equals nothing
        ("joe 's", ["joe's"] * 5 + ["moe"] * 5, 0, 0, 1),
        # fewer than ten: of fewer than four the share that matches, from four on the formula
        ("x", ["x", "x", "y"], 2 / 3, 2 / 3, 2 / 3),
        ("x", ["x", "x", "x", "y", "y"], 4 / 5, 4 / 5, 4 / 5),
    ],
)
def test_vqa_accuracy_by_hand_under_three_protocols(prediction, answers, vqav2, infmllm, textvqa):
    assert vqa_score(prediction, answers) == pytest.approx(vqav2)
    assert vqa_score(prediction, answers, "infmllm") == pytest.approx(infmllm)
    assert vqa_score(prediction, answers, "textvqa") == pytest.approx(textvqa)


@pytest.mark.parametrize(
    "protocol, said, answer, score",
    [
        ("gqa", " Yes, it is a dog.", "Yes", 1),
        ("gqa", "Red! Or blue", "red", 1),
        ("gqa", "The man is wearing a Red Shirt", "red shirt", 1),
        ("gqa", "the ball is on the left of it", "left", 1),
        ("gqa", "an orange", "orange", 1),
        ("gqa", "they are small birds", "small birds", 1),
        ("gqa", "the man in a hat on the left", "left", 1),  # "a " comes before "the "
        ("gqa", "it is what it is now", "what it", 1),  # up to the second "is "
        ("gqa", "a panda bear", "pand", 1),  # wherever the letters stand
        ("gqa", "a cup", "a cup", 0),  # the answer is not cut
        ("ocrvqa", " The End ", "the end", 1),
        ("ocrvqa", "the end.", "the end", 0),
        ("ocrvqa", "is it", "it", 0),
        ("ai2d", "Leaf.", " leaf.", 1),
        ("ai2d", "a leaf", "leaf", 0),
    ],
)
def test_gqa_ocrvqa_and_ai2d_by_hand(protocol, said, answer, score):
    found = short_answer_scores([said, said], [["other", answer], ["none"]], protocol)
    assert found == (f"exact ({protocol})", [score, 0])


def test_okvqa_takes_the_lemmas_of_nouns_and_verbs_and_without_spacy_is_not_comparable(monkeypatch):
    words = ("better", "good", "ADJ"), ("dogs", "dog", "NOUN"), ("running", "run", "VERB")
    tokens = [SimpleNamespace(text=text, lemma_=lemma, pos_=pos) for text, lemma, pos in words]
    spacy = SimpleNamespace(load=lambda name: lambda text: tokens)
    asked = ["better dogs running"], [["better dog run"] * 10], "okvqa"
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    spacy_model.cache_clear()
    assert short_answer_scores(*asked) == ("accuracy (okvqa)", [1])
    monkeypatch.setitem(sys.modules, "spacy", None)  # not installed
    spacy_model.cache_clear()
    name, scores = short_answer_scores(*asked)
    assert "not comparable" in name and scores == [0]


def test_exact_match_forgives_case_outer_space_and_a_closing_period_alone():
    answers = ["The Cat", "j. r. r. tolkien", "smith jr."]
    for right in ("the cat", " The cat.\n", "J. R. R. Tolkien", "Smith Jr"):
        assert exact_score(right, answers) == 1
    for wrong in ("cat", "the cat!", "the  cat", "", "t"):
        assert exact_score(wrong, answers) == 0


# ------------------------------------------------------------------------------------------------------------- boxes
def test_iou_by_hand():
    a, b = (0, 0, 10, 10), (5, 5, 15, 15)
    assert iou(a, b) == iou(b, a) == pytest.approx(25 / 175)
    assert iou(a, (20, 20, 30, 30)) == 0, "two negative sides are no area"
    assert iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0
    assert iou(None, a) == 0


# -------------------------------------------------------------------------------------------------------- yes and no
POPE = """
Yes, there is a dog. => yes
No, there is no dog. => no
There is not => no
Yes. There is no cat though => yes
no, => no
maybe => yes
nothing => yes
NO => yes
Not => yes
"""
MME = """
Yes, it is. => yes
NO => no
 yes => yes
  yes => other
Not at all => no
I know => other
know => no
It is. Yes => other
"""


def test_answers_of_pope_and_mme_are_read_as_the_official_scripts_do():
    for text, answer in rows(POPE):
        assert pope_answer(text) == answer
    for text, answer in rows(MME):
        assert mme_answer(text) == answer
    assert (pope_answer(""), mme_answer("")) == ("yes", "other")


def test_pope_by_hand():
    said = "yes Yes. no  yes no yes No. not no".split()
    true = "yes yes  Yes no  no No  no  no  no".split()
    names, scores, counts = zip(*pope(said, true))
    assert names == ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert scores == pytest.approx((6 / 9, 2 / 4, 2 / 3, 4 / 7, 4 / 9)) and set(counts) == {9}
    assert [score for _, score, _ in pope(["no"], ["no"])] == [1, 0, 0, 0, 0]


def test_mme_by_hand():
    table = """
        yes   Yes OCR a
        maybe Yes count a
        no    No  code_reasoning x
        yes   No  code_reasoning y
        yes   Yes OCR b
        no    No  OCR a
        no    No  count a
        Yes   Yes code_reasoning x
        yes   No  OCR b
    """  # partners need not be neighbours, and y has none
    found = mme(*zip(*map(str.split, table.strip().splitlines())))
    assert found[:2] == [("perception", 175, 9), ("cognition", 100 * (2 / 3 + 1), 9)]
    assert sorted(found[2:]) == [
        ("  OCR", 100 * (3 / 4 + 1 / 2), 4),
        ("  code_reasoning", 100 * (2 / 3 + 1), 3),
        ("  count", 100 * (1 / 2 + 0), 2),
    ]
    assert sum(map(len, MME_PARTS.values())) == 14
    with pytest.raises(AssertionError, match="two questions"):
        mme(["no"] * 3, ["no"] * 3, ["OCR"] * 3, ["a"] * 3)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError):
        cider(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError):
        pope(["yes"], ["no", "no"])
    with pytest.raises(AssertionError, match="yes or no"):
        pope(["yes"], ["maybe"])
    for truth in ("a string, not a list", []):
        for score in (vqa_score, exact_score, lambda said, truth: cider([said], [truth])):
            with pytest.raises(AssertionError, match="list of strings"):
                score("a", truth)


OPTIONS = {"A": "red", "B": "blue", "C": "dark green", "D": "12"}
NAMED = {  # what is said -> the option that it names
    "A": "A",
    "B.": "B",
    "(C)": "C",
    "D)": "D",
    "[A]": "A",
    "{B}": "B",
    "*C*": "C",
    "**D**": "D",
    "#A": "A",
    "B:": "B",
    "C;": "C",
    "D,": "D",
    "A!": "A",
    "\nB\n": "B",
    "Answer: C": "C",
    "Answer: (D).": "D",
    "The answer is A": "A",
    "The answer is B.": "B",
    "the answer is c": "C",
    "The correct answer is **D**.": "D",
    "The correct answer is **D**. Here is why: it has twelve of them": "D",
    "Option C": "C",
    "Option C is right": "C",
    "It is A.": "A",
    "I think it is B": "B",
    "C. dark green": "C",
    "D. 12": "D",
    "A. red": "A",
    "(B) blue": "B",
    "B is the one": "B",
    "A A": "A",
    "B, B": "B",
    "red": "A",
    "Red": "A",
    "It is red.": "A",
    "BLUE": "B",
    "the blue one": "B",
    "dark green": "C",
    "Dark green, I think": "C",
    "12": "D",
    "There are 12.": "D",
    "a": None,
    "b": None,
    "d.": None,
    "A or B": None,
    "A, B": None,
    "(A) and (C)": None,
    "red or blue": None,
    "neither": None,
    "green": None,
    "yellow": None,
    "E": None,
    "F.": None,
    "": None,
    " ": None,
    "Z": None,
    "Z, not red": None,
    "AB": None,
    "B-": None,
    "A'": None,
    "I'm sorry, but without the image provided I say A": None,
    "Cannot determine the answer": None,
    "A is what one would say of it at first sight": None,
    "it is blue, as far as one can see from here": None,
}


def test_the_option_that_an_answer_names():
    assert len(NAMED) >= 60
    assert {said: choice_letter(said, OPTIONS) for said in NAMED} == NAMED
