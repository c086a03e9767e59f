"""Metrics against pycocoevalcap's scorer, the Java tokeniser where there is one, and cases worked by hand."""

import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from pycocoevalcap import tokenizer
from pycocoevalcap.cider.cider_scorer import CiderScorer

import support.metrics
from support.metrics import normalise, normalise_m4c, tokenise, vqa_score

# ------------------------------------------------------------------------------------------------------------ captions
CAPTIONS = [
    [
        "A man riding a wave on top of a surfboard.",
        "A surfer in a black wetsuit, riding a big wave!",
        "The man's surfboard is white; he isn't falling.",
        "A person surfs on the sea at 5:30 p.m.",
        "Man surfing a wave",
    ],
    [
        "Two red-and-white buses parked at a bus stop.",
        'A bus (number 42) next to a "STOP" sign',
        "Buses on a street - people are waiting.",
        "It's a busy street with 2 buses...",
        "Two buses on the road.",
    ],
    [
        "A cat sitting on top of a laptop computer.",
        "A black cat lies on someone's laptop.",
        "The cat can't be moved",
        "A cat on a keyboard, looking at the screen",
        "A cat sitting on a laptop.",
    ],
    [
        "A plate of food with meat & vegetables.",
        "A white plate topped with meat and broccoli",
        "There's broccoli on the plate, and 1/2 a potato.",
        "A dinner plate sits on a table.",
        "Food on a plate",
    ],
    [
        "A 3-year-old girl holding a tennis racket.",
        "A young girl swings a racket at a ball",
        "The little girl's playing tennis: she'll miss.",
        "A child with a racquet on a court.",
        "A girl. A racket.",
    ],
    [
        "A train at the platform at 10 o'clock?",
        "A train pulls into a station",
        "People wait for the train to stop",
        "A long yellow train on the tracks",
        "The dogs' train costs $5.99, 50% off",
    ],
]
SAID = [
    "a man riding a wave on a surfboard",
    "two buses parked on the side of a street",
    "",
    "a plate of food with meat and broccoli on a table",
    "cat cat cat cat a a a",
    "train",
]


def official_cider(predictions, references):
    scorer = CiderScorer()
    for p, rs in zip(predictions, references):
        scorer += (p, rs)
    score, each = scorer.compute_score()
    return float(score), list(each)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("per_image", [1, 5])
def test_cider_of_random_corpora_is_the_official_scorers(seed, per_image):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(rng.choice([3, 12, 60]))]

    def sentence():
        return " ".join(rng.choices(words, k=rng.choice([0, 1, 2, 3, 8, 15])))

    references = [[sentence() for _ in range(per_image)] for _ in range(rng.choice([2, 7, 40]))]
    predictions = [
        rng.choice([sentence(), "", rng.choice(rs), "w1 w1 w1 w1", "never seen in any reference"])
        for rs in references
    ]
    score, each = official_cider(predictions, references)
    found = support.metrics.cider(predictions, references, split=str.split)
    assert found == pytest.approx(each, abs=1e-9)
    assert support.metrics.cider(predictions, references) == pytest.approx(each, abs=1e-9)
    assert support.metrics.mean(found) == (pytest.approx(score, abs=1e-9), len(references))


@pytest.mark.parametrize("per_image", [1, 5])
def test_cider_of_captions_is_the_official_scorers_on_the_same_words(per_image):
    references = [rs[:per_image] for rs in CAPTIONS]
    score, each = official_cider(
        [" ".join(tokenise(s)) for s in SAID],
        [[" ".join(tokenise(r)) for r in rs] for rs in references],
    )
    found = support.metrics.cider(SAID, references)
    assert found == pytest.approx(each, abs=1e-9)
    assert support.metrics.mean(found) == (pytest.approx(score, abs=1e-9), 6)
    assert each[0] > 1 and each[2] == 0 and score > 0.3  # the corpus tells good from bad


def test_a_perfect_caption_scores_ten_and_one_image_alone_scores_nothing():
    texts = ["a red circle on a white ground", "two blue squares left of a star"]
    assert support.metrics.cider(texts, [[t] for t in texts]) == pytest.approx([10, 10])
    assert support.metrics.cider(texts[:1], [texts[:1]]) == [0]


def test_the_order_of_samples_does_not_change_a_digit():
    rng = random.Random(0)
    order = list(range(len(SAID)))
    rng.shuffle(order)
    shuffled = support.metrics.cider([SAID[i] for i in order], [CAPTIONS[i] for i in order])
    found = support.metrics.cider(SAID, CAPTIONS)
    assert [found[i] for i in order] == shuffled
    assert support.metrics.mean(found) == support.metrics.mean(shuffled)
    scores = [rng.random() for _ in range(1000)]
    assert (
        support.metrics.mean(scores)
        == support.metrics.mean(scores[::-1])
        == support.metrics.mean(sorted(scores))
    )


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A Man, riding a WAVE.", "a man riding a wave"),
        (
            "it's isn't can't they'll we're I'm he'd you've",
            "it 's is n't ca n't they 'll we 're i 'm he 'd you 've",
        ),
        ("couldn't've", "could n't 've"),
        ("the man’s and the dogs' bowls", "the man 's and the dogs bowls"),
        ("a black-and-white t-shirt - or -- not...", "a black-and-white t-shirt or not"),
        ("“smart” \"plain\" 'single' `tick` – — …", "smart plain single tick"),
        (
            "at 5:30 p.m. near the U.S. border, 1,000 miles; 3.5 or 1/2?!",
            "at 5:30 p.m. near the u.s. border 1,000 miles 3.5 or 1/2",
        ),
        ("five o'clock: $5 & 50% #1", "five o'clock $ 5 & 50 % # 1"),
        ("one (two) [three] {four}", "one -lrb- two -rrb- -lsb- three -rsb- -lcb- four -rcb-"),
        ("beach,and café", "beach and café"),
        (" \t\n", ""),
    ],
)
def test_captions_are_split_as_the_treebank_splits_them(text, tokens):
    assert tokenise(text) == tokens.split()
    assert tokenise(tokens) == tokens.split()  # twice is once


@pytest.mark.skipif(not shutil.which("java"), reason="the official tokeniser is a Java program")
def test_captions_are_split_as_the_official_program_splits_them():
    (jar,) = Path(tokenizer.__path__[0]).glob("*.jar")
    command = [
        "java",
        "-cp",
        jar,
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    texts = [text for rs in CAPTIONS for text in rs]
    run = subprocess.run(
        command, input="\n".join(texts) + "\n", capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == len(texts)
    drop = (
        "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()
    )  # pycocoevalcap.tokenizer.ptbtokenizer
    for text, line in zip(texts, lines):
        assert tokenise(text) == [w for w in line.split() if w not in drop], text


# ------------------------------------------------------------------------------------------------------- VQA accuracy
@pytest.mark.parametrize(
    "text, clean",
    [
        # articles, case and white space
        ("A Cat", "cat"),
        ("an apple", "apple"),
        ("the  end", "end"),
        ("a", ""),
        ("another", "another"),
        # numbers in words
        ("none zero one two three four five six", "0 0 1 2 3 4 5 6"),
        ("seven eight nine ten", "7 8 9 10"),
        ("Left One", "left 1"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # periods: gone, save before a digit, whatever stands in front of them
        ("yes.", "yes"),
        ("U.S.A", "usa"),
        ("3.5", "3.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("a.5", "a.5"),
        ("3 . 5", "3 5"),
        ("..", ""),
        ("x" + "." * 33, "x."),  # the 33rd stays: re.UNICODE is 32
        # every mark becomes a space between letters
        *[(f"x{mark}y", "x y") for mark in ';/[]"{}()=+\\_-><@`,?!'],
        # and vanishes beside one; once beside one, everywhere
        *[(f"x{mark} y", "x y") for mark in ';/[]"{}()=+\\_-><@`,?!'],
        ("x-y z -w", "xy z w"),
        ("x-y z- w", "xy z w"),
        ("red/blue", "red blue"),
        ("red /blue/green", "red bluegreen"),
        ("yes!", "yes"),
        ("yes! no?maybe", "yes no maybe"),  # each mark for itself
        # a comma between digits: every mark vanishes
        ("1,000", "1000"),
        ("1,000-foot", "1000foot"),
        ("a-b 1,000", "ab 1000"),
        ("1,b", "1 b"),
        ("1, 2", "1 2"),
        # what is not a mark stays
        ("joe's", "joe's"),
        ("5:30", "5:30"),
        ("$5 & 50%", "$5 & 50%"),
        ("#1*", "#1*"),
        # contractions, after articles and numbers
        ("dont", "don't"),
        ("DONT", "don't"),
        ("isnt it", "isn't it"),
        ("whats the", "what's"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("let's", "let's"),
        ("Im", "im"),
        ("Ive", "ive"),
        ("wed", "wed"),
        ("ill", "ill"),  # the capital I of the table never matches
        ("", ""),
    ],
)
def test_vqa_normalisation(text, clean):
    assert normalise(text) == clean


@pytest.mark.parametrize(
    "text, clean",
    [
        ("McDonald's", "mcdonald 's"),
        ("let's", "let 's"),
        ("what's?", "what 's"),
        ("1,000-foot", "1000 foot"),
        ("red,blue", "redblue"),
        ("who?me", "whome"),  # comma and ? are gone before any rule
        ("the-end ,", "end"),
        ("1,000", "1000"),
        ("the Two.", "2"),
        ("dont", "don't"),
    ],
)
def test_textvqa_normalisation_has_a_first_step_of_its_own(text, clean):
    assert normalise_m4c(text) == clean
    assert (normalise_m4c(text) != normalise(text)) == (
        text not in ("the-end ,", "1,000", "the Two.", "dont")
    )


# the keys of the published table, less four with a capital I (dead), two that map to themselves and one backwards
KEYS = """aint arent cant couldve couldnt couldn'tve couldnt've didnt doesnt dont hadnt hadnt've hadn'tve hasnt havent
hed hed've he'dve hes howd howll hows isnt itd itd've it'dve itll maam mightnt mightnt've mightn'tve mightve mustnt
mustve neednt notve oclock oughtnt ow's'at 'ows'at 'ow'sat shant shed've she'dve shouldve shouldnt shouldnt've
shouldn'tve somebodyd've somebody'dve somebodyll somebodys someoned someoned've someone'dve someonell someones
somethingd somethingd've something'dve somethingll thats thered thered've there'dve therere theres theyd theyd've
they'dve theyll theyre theyve twas wasnt wed've we'dve weve werent whatll whatre whats whatve whens whered wheres
whereve whod whod've who'dve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldnt've wouldn'tve yall yall'll
y'allll yall'd've y'alld've y'all'dve youd youd've you'dve youll youre youve""".split()


def test_the_contractions_are_those_of_the_published_table():
    assert set(support.metrics.CONTRACTIONS) == {*KEYS, "somebody'd"}
    for key in KEYS:
        value = support.metrics.CONTRACTIONS[key]
        assert value.replace("'", "") == key.replace("'", "") and len(value) == len(key) + 1, (
            key,
            value,
        )
    for key, value in {
        "aint": "ain't",
        "couldn'tve": "couldn't've",
        "hed": "he'd",
        "howll": "how'll",
        "itd": "it'd",
        "maam": "ma'am",
        "mightve": "might've",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "therere": "there're",
        "weve": "we've",
        "yall": "y'all",
        "yall'll": "y'all'll",
        "y'alld've": "y'all'd've",
        "shant": "shan't",
        "whereve": "where've",
    }.items():
        assert support.metrics.CONTRACTIONS[key] == value


def leave_one_out(prediction, answers):
    """The formula of the VQA papers, word by word."""
    scores = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        scores.append(min(1, sum(a == prediction for a in others) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    "matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_vqa_accuracy_is_the_mean_over_the_ten_sets_of_nine(matches, score):
    answers = ["yes"] * matches + [f"other{i}" for i in range(10 - matches)]
    assert leave_one_out("yes", answers) == pytest.approx(score)
    for protocol in ("vqav2", "infmllm", "textvqa"):
        assert vqa_score("yes", answers, protocol) == pytest.approx(score)


@pytest.mark.parametrize("n", range(1, 12))
def test_vqa_accuracy_of_fewer_answers_gives_one_to_agreement_and_is_official_from_four_on(n):
    assert vqa_score("x", ["x"] * n) == 1 and vqa_score("y", ["x"] * n) == 0
    scores = [vqa_score("x", ["x"] * k + ["y"] * (n - k)) for k in range(n + 1)]
    if n <= 4:
        assert scores == pytest.approx([k / n for k in range(n + 1)])
    if n >= 4:
        assert scores == pytest.approx(
            [leave_one_out("x", ["x"] * k + ["y"] * (n - k)) for k in range(n + 1)]
        )


@pytest.mark.parametrize(
    "prediction, answers, vqav2, infmllm, textvqa",
    [
        (
            "Black.",
            ["black"] * 10,
            0,
            1,
            1,
        ),  # unanimous: the official code matches letter by letter
        ("the cat", ["the cat"] * 10, 1, 1, 1),
        ("cat", ["the cat"] * 10, 0, 1, 1),
        ("A", ["A"] * 10, 1, 1, 1),  # a letter on a sign survives where all agree
        (" black\n", ["black\t"] * 10, 1, 1, 1),  # white space is trimmed in any case
        ("to\tbe", ["to be"] * 10, 1, 1, 1),
        ("Black.", ["black"] * 9 + ["dark"], 1, 1, 1),  # one who disagrees brings the normalisation
        ("the two cats", ["2 cats"] * 2 + ["two cats"] + ["many"] * 7, 0.9, 0.9, 0.9),
        ("dont know", ["don't know", "Dont know!"] + ["yes"] * 8, 0.6, 0.6, 0.6),
        ("none", ["0"] * 5 + ["none"] * 5, 1, 1, 1),
        ("none", ["none"] + ["no"] * 9, 0.3, 0.3, 0.3),
        ("a", ["the"] * 4 + ["b"] * 6, 1, 1, 1),  # both are nothing, and nothing equals nothing
        ("joe 's", ["joe's"] * 5 + ["moe"] * 5, 0, 0, 1),
        ("redblue", ["red,blue"] * 5 + ["moe"] * 5, 0, 0, 1),
        ("", ["yes"] * 5 + ["no"] * 5, 0, 0, 0),
    ],
)
def test_the_three_protocols_normalise_as_their_code_does(
    prediction, answers, vqav2, infmllm, textvqa
):
    scores = [
        vqa_score(prediction, answers, protocol) for protocol in ("vqav2", "infmllm", "textvqa")
    ]
    assert scores == pytest.approx([vqav2, infmllm, textvqa])


def test_vqa_accuracy_is_the_mean_of_the_scores_and_says_how_many():
    answers = [["red"] * 10, ["yes"] * 2 + ["no"] * 8, ["1"] * 10]
    scores = map(vqa_score, ["red", "yes", "2"], answers)
    assert support.metrics.mean(list(scores)) == (pytest.approx((1 + 0.6 + 0) / 3), 3)
    assert vqa_score("Red", ["red"] * 10) == 0
    assert vqa_score("Red", ["red"] * 10, "infmllm") == 1
    with pytest.raises(KeyError):
        vqa_score("red", ["red"], "vqa")


def test_exact_match_forgives_case_outer_space_and_a_closing_period_alone():
    answers = ["The Cat", "j. r. r. tolkien"]
    for right in ("the cat", " The cat.\n", "THE CAT", "J. R. R. Tolkien"):
        assert support.metrics.exact_score(right, answers) == 1
    for wrong in ("cat", "the cat!", "the  cat", "", "t"):
        assert support.metrics.exact_score(wrong, answers) == 0
    assert support.metrics.exact_score("Smith Jr", ["smith jr."]) == 1
    for said, answers, score in (
        ("Yes.", ["yes"], 1),
        ("no", ["yes"], 0),
        ("left", ["right", "left"], 1),
    ):
        assert support.metrics.exact_score(said, answers) == score


# ------------------------------------------------------------------------------------------------------------- boxes
@pytest.mark.parametrize(
    "a, b, value",
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 2, 1), (0, 0, 1, 1), 1 / 2),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),  # edges that touch
        ((0, 0, 1, 1), (5, 5, 6, 6), 0),  # two negative sides are no area
        ((10, 10, 0, 0), (0, 0, 10, 10), 0),
        ((10, 0, 0, 10), (0, 0, 10, 10), 0),  # corners the wrong way round
        ((0, 0, 0, 0), (0, 0, 10, 10), 0),
        ((3, 3, 3, 3), (3, 3, 3, 3), 0),
        ((0.5, 0.5, 1.5, 1.5), (0.5, 0.5, 1.5, 2.5), 1 / 2),
        (None, (0, 0, 1, 1), 0),
    ],
)
def test_iou_by_hand(a, b, value):
    assert support.metrics.iou(a, b) == pytest.approx(value)
    if a is not None:
        assert support.metrics.iou(b, a) == pytest.approx(value)


# -------------------------------------------------------------------------------------------------------- yes and no
@pytest.mark.parametrize(
    "text, answer",
    [
        ("yes", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("no", "no"),
        ("No, there is no dog.", "no"),
        ("No", "no"),
        ("There is not", "no"),
        ("Yes. There is no cat though", "yes"),
        ("no,", "no"),
        ("", "yes"),
        ("maybe", "yes"),
        ("nothing", "yes"),
        ("NO", "yes"),
        ("none", "yes"),
        ("Not", "yes"),
    ],
)
def test_pope_reads_answers_as_the_official_script_does(text, answer):
    assert support.metrics.pope_answer(text) == answer


def test_pope_by_hand():
    #       tp tp fn fp tn tn tn tn
    said = ["yes", "Yes.", "no", "yes", "no", "No", "No, it is not.", "not here"]
    truth = ["yes", "yes", "Yes", "no", "no", "no", "No", "no"]
    names = ["accuracy", "precision", "recall", "f1", "yes_ratio"]

    def check(said, truth, *expected):
        found = support.metrics.pope(said, truth)
        assert [name for name, _, _ in found] == names
        assert [score for _, score, _ in found] == pytest.approx(expected)
        assert {count for _, _, count in found} == {len(said)}

    check(said, truth, 6 / 8, 2 / 3, 2 / 3, 2 / 3, 3 / 8)
    check(
        ["yes", "yes", "yes", "no"], ["yes", "no", "no", "yes"], 1 / 4, 1 / 3, 1 / 2, 2 / 5, 3 / 4
    )
    check(["no"], ["no"], 1, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("yes", "yes"),
        ("Yes, it is.", "yes"),
        ("NO", "no"),
        ("no.", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("Not at all", "no"),
        ("I know", "other"),
        ("know", "no"),
        ("It is. Yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_letters(text, answer):
    assert support.metrics.mme_answer(text) == answer


def test_mme_by_hand():
    rows = [
        ("yes", "Yes", "OCR", "a"),
        ("no", "No", "OCR", "a"),
        ("yes", "Yes", "OCR", "b"),
        ("yes", "No", "OCR", "b"),
        ("maybe", "Yes", "count", "a"),
        ("no", "No", "count", "a"),
        ("no", "No", "code_reasoning", "x"),
        ("Yes", "Yes", "code_reasoning", "x"),
        ("no", "No", "code_reasoning", "y"),  # its partner was never asked
        ("yes", "yes", "shapes", "s"),
        ("no", "no", "shapes", "s"),
    ]  # of nobody's total
    rows = rows[::2] + rows[1::2]  # partners need not be neighbours
    totals = [("perception", 175, 11), ("cognition", 200, 11)]
    assert sorted(support.metrics.mme(*zip(*rows))) == sorted(
        totals
        + [
            ("  OCR", 100 * (3 / 4 + 1 / 2), 4),
            ("  count", 100 * (1 / 2 + 0), 2),
            ("  code_reasoning", 100 * (1 + 1), 3),
            ("  shapes", 100 * (1 + 1), 2),
        ]
    )
    assert support.metrics.mme(*zip(*rows))[:2] == totals
    assert sum(map(len, support.metrics.MME_PARTS.values())) == 14
    with pytest.raises(AssertionError, match="two questions"):
        support.metrics.mme(["no"] * 3, ["no"] * 3, ["OCR"] * 3, ["a"] * 3)


def test_what_does_not_fit_together_is_refused():
    for f, truth in ((support.metrics.cider, ["a"]), (support.metrics.pope, "no")):
        for predictions, truths in ((["a"], []), ([], [truth]), (["a"], [truth, truth])):
            with pytest.raises(ValueError, match="zip"):
                f(predictions, truths)
    for truth in ("a string, not a list", []):
        for f in (vqa_score, support.metrics.exact_score):
            with pytest.raises(AssertionError, match="list of strings"):
                f("a", truth)
        with pytest.raises(AssertionError, match="list of strings"):
            support.metrics.cider(["a"], [truth])
    for f in (support.metrics.pope, lambda p, t: support.metrics.mme(p, t, ["OCR"], ["a"])):
        with pytest.raises(AssertionError, match="yes or no"):
            f(["yes"], ["maybe"])
    assert all(math.isfinite(s) for s in support.metrics.cider(["", "a"], [[""], ["", "b"]]))
