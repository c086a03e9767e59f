"""Numbers from strings: CIDEr-D, VQA accuracy, exact match, boxes, POPE and MME. Standard library alone.

A metric over a corpus returns (score, count); POPE and MME, which have several figures, return a dict with a count.
Scores are fractions, times 100 in papers (CIDEr-D's 1.38 is "138"), save MME's own points. What can be told of one
sample alone has a function of its own (vqa_score, exact_score, iou), for running scores and for the sheet of rights
and wrongs. Every mean is math.fsum's, correctly rounded: the order in which ranks deliver cannot change a digit.

The quirks of the official scripts are kept where figures are compared, and named where they stand.
"""

import math
import re
from collections import Counter
from functools import lru_cache

# ------------------------------------------------------------------------------------------------------------ captions
N, SIGMA = 4, 6.0  # CIDEr-D's longest n-gram, and the width of its penalty on length

CLITIC = r"n't|'(?:s|m|d|re|ve|ll)"

TOKEN = re.compile(
    rf"""
    -[lr][rsc]b-                             # a bracket in the treebank's spelling, so that tokens stay what they are
  | (?:{CLITIC})\b
  | (?:[^\W\d_]\.){{2,}}                     # p.m., u.s.
  | \w+ (?: (?:[-'/@&]|[.,:](?=\d)) \w+ )*   # t-shirt, o'clock, 1/2, 5:30, 1,000
  | [^\w\s]""",
    re.VERBOSE,
)

BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-")))

SILENT = set(
    "'`\".?!,:;-–—…“”‘"
)  # dropped: the official list, and what its tokeniser turns into its members


def tokenise(text: str) -> list[str]:
    """Lower case, clitics split off (isn't -> is n't), punctuation dropped. A second time changes no real text.

    The official evaluation asks a Java program, Stanford's PTBTokenizer. This one agrees with it on ordinary captions;
    it knows neither its abbreviations (st. mr. etc.) nor its fused words (cannot, gonna). For a figure to publish, run
    that program first and call cider(..., split=str.split). Its list of marks to drop says "-LRB-", but its words are
    in lower case by then: so brackets count as words in every published CIDEr, and here.
    """
    text = re.sub(rf"(?<=\w)({CLITIC})\b", r" \1", text.lower().replace("’", "'"))
    return [BRACKETS.get(token, token) for token in TOKEN.findall(text) if token not in SILENT]


def ngrams(words):
    """[Counter of 1-grams, ..., Counter of N-grams]"""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, N + 1)]


def cider_scores(predictions, references, split=tokenise) -> list[float]:
    """CIDEr-D (arXiv 1411.5726) of each prediction against its list of references, weighted by the whole corpus.

    An n-gram weighs log(images) - log(images with it in a reference): one image alone always scores 0.
    """
    check(predictions, references)
    for rs in references:
        check_list(rs)
    hyps = [ngrams(split(p)) for p in predictions]
    refs = [[ngrams(split(r)) for r in rs] for rs in references]
    # n-grams of different n are tuples of different lengths, so that one table holds them all
    images = Counter(
        gram for rs in refs for gram in {gram for r in rs for grams in r for gram in grams}
    )
    log_all = math.log(len(refs))

    def weigh(grams):
        vectors = [
            {g: k * (log_all - math.log(max(1, images[g]))) for g, k in counts.items()}
            for counts in grams
        ]
        norms = [math.sqrt(sum(w * w for w in v.values())) for v in vectors]
        return vectors, norms, grams[0].total()

    def similarity(hyp, ref):
        (hs, h_norms, h_len), (rs, r_norms, r_len) = hyp, ref
        cosine = 0.0
        for h, r, h_norm, r_norm in zip(hs, rs, h_norms, r_norms):
            dot = sum(
                min(w, r[g]) * r[g] for g, w in h.items() if g in r
            )  # clipped: repeating pays nothing
            if dot:
                cosine += dot / (h_norm * r_norm)
        return cosine / N * math.exp(-((h_len - r_len) ** 2) / (2 * SIGMA**2))

    scores = []
    for hyp, rs in zip(hyps, refs):
        hyp = weigh(hyp)
        scores.append(10 * sum(similarity(hyp, weigh(r)) for r in rs) / len(rs))
    return scores


def cider(predictions, references, split=tokenise):
    return mean(cider_scores(predictions, references, split))


# ----------------------------------------------------------------------------------------------------- short answers
# The official table of lost apostrophes, by its rule: each right form with any one apostrophe left out. Not here: its
# entries with a capital I, which never meet text in lower case (so "im" stays "im"), and two that map to themselves.
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}

FORMS = [stem + ending for ending, stems in ENDINGS.items() for stem in stems.split()]

CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in FORMS for i, c in enumerate(form) if c == "'"
}

CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, officially

DIGITS = "zero one two three four five six seven eight nine ten".split()

NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(DIGITS)}

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # no apostrophe, colon or period


@lru_cache(1 << 16)
def normalise(text: str) -> str:
    """The VQA evaluation code's punctuation, digits, articles and contractions.

    A mark becomes a space, unless it touches one anywhere in the text: then all of its kind vanish; and one comma
    between digits makes all marks of all kinds vanish ("1,000-foot" -> "1000foot"). Periods vanish save before a
    digit, 32 of them at most (the official call passes re.UNICODE, which is 32, as the count).
    """
    number = re.search(r"\d,\d", text)
    gone = {
        mark: "" if number or mark + " " in text or " " + mark in text else " "
        for mark in PUNCTUATION
    }
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(gone)), count=32)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")
    )


def normalise_m4c(text: str) -> str:
    """TextVQA's: commas and question marks go, a possessive is split off (joe's -> joe 's), then the above."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def vqa_score(prediction: str, answers: list[str], protocol: str = "vqav2") -> float:
    """min(1, matches / 3) against every answer but one, averaged over which one is left out. Of 10: 0, .3, .6, .9, 1.

    protocol  "vqav2"    the official code: normalises only if the answers differ, else matches letter by letter
              "infmllm"  InfMLLM's evaluation, behind its published figures: normalises always
              "textvqa"  the M4C evaluator, as LLaVA reports TextVQA: always, and with its own first step

    Of fewer than four answers (the official files have ten) it is the share that matches, which is what the formula
    gives for four: so that an answer which everyone gave scores 1, and one answer alone must be matched.
    """
    check_list(answers)
    clean = {"vqav2": normalise, "infmllm": normalise, "textvqa": normalise_m4c}[protocol]
    prediction, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if protocol != "vqav2" or len(set(answers)) > 1:
        prediction, answers = clean(prediction), [clean(a) for a in answers]
    n, matches = len(answers), answers.count(prediction)
    if n < 4:
        return matches / n
    return (matches * min(1, (matches - 1) / 3) + (n - matches) * min(1, matches / 3)) / n


def vqa_accuracy(predictions, answers, protocol: str = "vqav2"):
    check(predictions, answers)
    return mean([vqa_score(p, a, protocol) for p, a in zip(predictions, answers)])


def exact_score(prediction: str, answers: list[str]) -> float:
    """1 if the prediction is one of the answers, up to case, outer white space (as in InfMLLM's evaluation) and a
    closing period, which chat models like to add (as in LLaVA's). For GQA and OCR-VQA."""
    check_list(answers)
    prediction, *answers = (text.strip().rstrip(".").lower() for text in (prediction, *answers))
    return float(prediction in answers)


def exact_match(predictions, answers):
    check(predictions, answers)
    return mean([exact_score(p, a) for p, a in zip(predictions, answers)])


# ------------------------------------------------------------------------------------------------------------- boxes
def iou(a, b) -> float:
    """Of two boxes (x1, y1, x2, y2) in pixels, edges and not pixel numbers (no +1). None, or a box without area: 0."""
    if a is None:
        return 0.0
    area = lambda x1, y1, x2, y2: max(0, x2 - x1) * max(0, y2 - y1)
    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / (area(*a) + area(*b) - common) if common else 0.0


def box_accuracy(predictions, boxes):
    """Acc@0.5: the share of predictions with IoU >= 0.5. None, an answer that named no box, is a miss that counts."""
    check(predictions, boxes)
    return mean([float(iou(p, b) >= 0.5) for p, b in zip(predictions, boxes)])


def mean_iou(predictions, boxes):
    check(predictions, boxes)
    return mean([iou(p, b) for p, b in zip(predictions, boxes)])


# -------------------------------------------------------------------------------------------------------- yes and no
def pope_answer(text: str) -> str:
    """The official reading: "no" if the first sentence has the word No, no or not; anything else, even "", is "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(predictions, labels) -> dict:
    """POPE (arXiv 2305.10355); "yes" is the positive class, and a ratio of nothing to nothing is 0."""
    check(predictions, labels)
    said, truth = [pope_answer(p) == "yes" for p in predictions], [yes(label) for label in labels]
    tp = sum(s and t for s, t in zip(said, truth))
    accuracy, count = mean([float(s == t) for s, t in zip(said, truth)])
    return {
        "accuracy": accuracy,
        "precision": tp / max(1, sum(said)),
        "recall": tp / max(1, sum(truth)),
        "f1": 2 * tp / max(1, sum(said) + sum(truth)),
        "yes_ratio": sum(said) / count,
        "count": count,
    }


MME_PARTS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def mme_answer(text: str) -> str:
    """The official reading: "yes", else "no", if it stands in the first four letters ("know" is a no), else "other"."""
    start = text[:4].lower()
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(predictions, labels, subtasks, images) -> dict:
    """MME (arXiv 2306.13394): of each subtask acc (questions right), acc+ (images with both questions right) and their
    sum as points of 200; the sums over perception (of 2000) and cognition (of 800). "other" is wrong.

    An image of which only one question was asked, as --limit may leave one, counts in acc and not in acc+.
    """
    for column in (labels, subtasks, images):
        check(predictions, column)
    right = {}  # subtask -> image -> [right, right]
    for text, label, subtask, image in zip(predictions, labels, subtasks, images):
        right.setdefault(subtask, {}).setdefault(image, []).append(
            mme_answer(text) == ("yes" if yes(label) else "no")
        )
    table = {}
    for subtask, by_image in right.items():
        crowded = [image for image, answers in by_image.items() if len(answers) > 2]
        assert not crowded, f"MME asks two questions an image; {subtask} has more on {crowded[0]}"
        questions = [answer for answers in by_image.values() for answer in answers]
        pairs = [all(answers) for answers in by_image.values() if len(answers) == 2]
        acc, plus = sum(questions) / len(questions), sum(pairs) / max(1, len(pairs))
        table[subtask] = {
            "acc": acc,
            "acc+": plus,
            "score": 100 * (acc + plus),
            "count": len(questions),
            "images": len(pairs),
        }
    parts = {
        part: math.fsum(table[s]["score"] for s in names if s in table)
        for part, names in MME_PARTS.items()
    }
    return parts | {"subtasks": table, "count": len(predictions)}


# ------------------------------------------------------------------------------------------------------------ shared
def yes(label: str) -> bool:
    """Of a label in an annotation file. A prediction may be anything; a label may not."""
    word = label.strip().lower()
    assert word in ("yes", "no"), f"a label must be yes or no, not {label!r}"
    return word == "yes"


def check(predictions, truths):
    assert len(predictions) == len(truths) > 0, (
        f"{len(predictions)} predictions for {len(truths)} samples"
    )


def check_list(texts):
    assert texts and not isinstance(texts, str), (
        f"a sample's answers must be a list of strings, not {texts!r}"
    )


def mean(scores):
    return math.fsum(scores) / len(scores), len(scores)
