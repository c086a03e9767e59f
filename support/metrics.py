"""Numbers from strings: CIDEr-D, VQA accuracy, exact match, boxes, POPE and MME. Standard library alone.

vqa_score, exact_score and iou score one sample, and cider every sample of a corpus; mean() makes (score,
count) of such scores. POPE and MME, which have several figures, return (figure, score, count) for each.
Scores are fractions, which papers multiply by 100 (CIDEr-D's 1.38 is "138"), save MME's own points. Every
mean is math.fsum's, correctly rounded: the order in which ranks deliver cannot change a digit.

The quirks of the official scripts are kept where figures are compared, and named where they stand.
"""

import functools
import math
import re
from collections import Counter, defaultdict

# ---------------------------------------------------------------------------------------------------
# Captions

N = 4  # CIDEr-D's longest n-gram
SIGMA = 6.0  # and the width of its penalty on length
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

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# dropped: the official list, and what its tokeniser turns into its members
SILENT = set("'`\".?!,:;-–—…“”‘")


def tokenise(text):
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


def cider(predictions, references, split=tokenise):
    """CIDEr-D (arXiv 1411.5726) of each prediction against its list of references, weighted by the whole corpus.

    An n-gram weighs log(images) - log(images with it in a reference): one image alone always scores 0.
    """
    images = Counter()  # with an n-gram in a reference; n-grams of different n differ as tuples
    for texts in references:
        check_list(texts)
        images.update({gram for text in texts for counts in ngrams(split(text)) for gram in counts})

    def weigh(counts):
        total = math.log(len(references))
        return {g: n * (total - math.log(max(1, images[g]))) for g, n in counts.items()}

    def similarity(prediction, reference):
        cosine = 0.0
        hyp, ref = ngrams(split(prediction)), ngrams(split(reference))
        for h, r in zip(map(weigh, hyp), map(weigh, ref)):
            # clipped: repeating a word pays nothing
            dot = sum(min(w, r[g]) * r[g] for g, w in h.items() if g in r)
            if dot:
                cosine += dot / (math.hypot(*h.values()) * math.hypot(*r.values()))
        longer = hyp[0].total() - ref[0].total()
        return cosine / N * math.exp(-(longer**2) / (2 * SIGMA**2))

    return [
        10 * math.fsum(similarity(prediction, text) for text in texts) / len(texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------
# Short answers

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


def normalise(text):
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


def normalise_m4c(text):
    """TextVQA's: commas and question marks go, a possessive is split off (joe's -> joe 's), then the above."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def lemmatise(text):
    """OK-VQA's official form of an answer: nouns and verbs as the dictionary has them."""
    return " ".join(
        token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text
        for token in spacy_model()(text)
    )


@functools.cache
def spacy_model():
    """spaCy's small English model, None where it is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        return None


def cut_gqa(text):
    """How InfMLLM's evaluation reads an answer to GQA: its first clause, from behind the first of five words
    and up to an " of"."""
    for mark in ".,!":
        text = text.split(mark)[0]
    text = text.lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        if word in text:
            text = text.split(word)[1]
    return text.split(" of")[0].strip()


PROTOCOLS = {"vqav2": normalise, "infmllm": normalise, "okvqa": normalise, "textvqa": normalise_m4c}
# matched as a whole: how the prediction is read
EXACT = {"gqa": cut_gqa, "ocrvqa": str, "ai2d": str}


def vqa_score(prediction, answers, protocol="vqav2"):
    """min(1, matches / 3) against every answer but one, averaged over which one is left out. Of 10: 0, .3, .6, .9, 1.

    protocol  "vqav2"    the official code: normalises only if the answers differ, else matches letter by letter
              "infmllm"  InfMLLM's evaluation, behind its published figures: normalises always
              "okvqa"    the same, of the prediction as lemmatise() makes it, where spaCy is installed
              "textvqa"  the M4C evaluator, as LLaVA reports TextVQA: always, and with its own first step

    Of fewer than four answers (the official files have ten) it is the share that matches, which is what the
    formula gives for four: an answer that everyone gave scores 1, and one answer alone must be matched.
    """
    check_list(answers)
    if protocol == "okvqa" and spacy_model():
        prediction = lemmatise(prediction)
    clean = PROTOCOLS[protocol]
    texts = [re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers)]
    if protocol != "vqav2" or len(set(texts[1:])) > 1:
        texts = [clean(text) for text in texts]
    prediction, *answers = texts
    n = len(answers)
    matches = answers.count(prediction)
    if n < 4:
        return matches / n
    return (matches * min(1, (matches - 1) / 3) + (n - matches) * min(1, matches / 3)) / n


def exact_score(prediction, answers):
    """1 if the prediction is one of the answers, up to case, outer white space and a closing period, which chat
    models like to add (as in LLaVA's evaluation)."""
    check_list(answers)
    prediction, *answers = (text.strip().rstrip(".").lower() for text in (prediction, *answers))
    return float(prediction in answers)


def short_answer_scores(predictions, answers, protocol):
    """(name of the metric, a score for each prediction), by vqa_score or, for EXACT, by InfMLLM's exact match."""
    if protocol in EXACT:
        read = EXACT[protocol]
        said = [read(text.strip()).lower() for text in predictions]
        found = [
            float(text in [answer.strip().lower() for answer in own])
            for text, own in zip(said, answers, strict=True)
        ]
        return f"exact ({protocol})", found
    name = f"accuracy ({protocol})"
    if protocol == "okvqa" and not spacy_model():
        name = "accuracy (okvqa without spaCy's en_core_web_sm: not comparable)"
    return name, [vqa_score(*pair, protocol) for pair in zip(predictions, answers, strict=True)]


# ---------------------------------------------------------------------------------------------------
# Multiple choice

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
VERBOSE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def choice_letter(text, options):
    """The option that an answer names, None where it names none: VLMEvalKit's matching, as of August 2026.

    The one letter that stands alone, among the last four words; else the letter in "the answer is B"; else the one
    option whose text stands in it, where the answer is not much longer than the options."""
    if any(words in text for words in REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:  # how a judge says: none of them
        return None
    said = VERBOSE.search(text)
    if said and said[1].upper() in options:
        return said[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


# ---------------------------------------------------------------------------------------------------
# Boxes


def iou(a, b):
    """Of two boxes (x1, y1, x2, y2) in pixels, edges and not pixel numbers (no +1). None, or a box without area: 0."""
    if a is None:
        return 0.0
    common = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return common / (area(a) + area(b) - common) if common else 0.0


def area(box):
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


# ---------------------------------------------------------------------------------------------------
# Yes and no


def pope_answer(text):
    """The official reading: "no" if the first sentence has the word No, no or not; anything else, even "", is "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(predictions, labels):
    """POPE (arXiv 2305.10355); "yes" is the positive class, and a ratio of nothing to nothing is 0."""
    said = [pope_answer(text) == "yes" for text in predictions]
    truth = [checked(label) == "yes" for label in labels]
    true_positives = sum(s and t for s, t in zip(said, truth, strict=True))
    accuracy, count = mean([s == t for s, t in zip(said, truth)])
    return [
        ("accuracy", accuracy, count),
        ("precision", true_positives / max(1, sum(said)), count),
        ("recall", true_positives / max(1, sum(truth)), count),
        ("f1", 2 * true_positives / max(1, sum(said) + sum(truth)), count),
        ("yes_ratio", sum(said) / count, count),
    ]


MME_PARTS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def mme_answer(text):
    """The official reading: "yes", else "no", if it stands in the first four letters ("know" is a no), else "other"."""
    start = text[:4].lower()
    for word in ("yes", "no"):
        if word in start:
            return word
    return "other"


def mme(predictions, labels, subtasks, images):
    """MME (arXiv 2306.13394): the points of perception (of 2000) and cognition (of 800), then of each subtask (of 200).

    They are 100 (acc + acc+): questions right, and images with both questions right. "other" is wrong.

    An image of which only one question was asked, as --limit may leave one, counts in acc and not in acc+.
    """
    right = defaultdict(lambda: defaultdict(list))  # subtask -> image -> [right, right]
    for text, label, subtask, image in zip(predictions, labels, subtasks, images, strict=True):
        right[subtask][image].append(mme_answer(text) == checked(label))
    points = {}
    for subtask, by_image in right.items():
        most = max(map(len, by_image.values()))
        assert most <= 2, f"MME asks two questions an image; {subtask} has {most}"
        acc, count = mean(sum(by_image.values(), []))
        pairs = [all(answers) for answers in by_image.values() if len(answers) == 2]
        acc_plus = sum(pairs) / max(1, len(pairs))
        points[subtask] = (100 * (acc + acc_plus), count)
    totals = []
    for part, names in MME_PARTS.items():
        total = math.fsum(points[name][0] for name in names if name in points)
        totals.append((part, total, len(predictions)))
    return totals + [(f"  {subtask}", *own) for subtask, own in points.items()]


# ---------------------------------------------------------------------------------------------------
# Shared


def checked(label):
    """A label of an annotation file as yes or no. A prediction may be anything; a label may not."""
    word = label.strip().lower()
    assert word in ("yes", "no"), f"a label must be yes or no, not {label!r}"
    return word


def check_list(texts):
    assert texts and not isinstance(texts, str), (
        f"a sample's answers must be a list of strings, not {texts!r}"
    )


def mean(scores):
    return math.fsum(scores) / len(scores), len(scores)
