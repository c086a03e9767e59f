"""How right the trained model is: answers for a whole data set, scored.

    python evaluate.py                                                # the newest model of out/, the held-out toy world
    python evaluate.py --ckpt out/stage2 --data mine.toml --sheet rights-and-wrongs.png
    torchrun --nproc_per_node 8 evaluate.py --ckpt out/stage2 --data recipes/eval.toml --batch 16
    python evaluate.py --ckpt llava-1.5-7b-hf/ --pope coco_pope_random.json --images val2014/ --task chat
    python evaluate.py --ckpt out/stage3 --mme MME_Benchmark_release_version/
    python evaluate.py --ckpt out/stage3 --task choice --data MMStar.tsv --by likelihood

Answers are written as they come (--out, predictions.*.jsonl), so that a run that was stopped goes on when
it is started again. In the end they are one predictions.jsonl, with scores.json and the files that test
servers take beside it. Which samples share a batch depends on the data and on --batch alone: any number of
ranks, and a run that was stopped, give the same file.

Each task is decoded as DECODING in sample.py says: beams and the most new tokens of a caption are 5 and 30,
of a short answer (vqa) 5 and 10, of a box (ground) 5 and 40, of a phrase (region) 5 and 30, of a turn of a
chat 1 and 1024. --beams, --max-new-tokens and --min-new-tokens say otherwise.

To add a benchmark of yes or no, add its functions to BENCHMARKS; to add a metric, add it to what measure()
returns.
"""

import inspect
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from support.threads import wait_briefly

if __name__ == "__main__":
    wait_briefly()

import torch
from tqdm import tqdm

import sample
import toy
import weights
from data import Data, collate, some
from formats import Record, load_mixture
from formats.choice import Choice
from formats.pictures import peek, upright
from model import IGNORE, IMAGE
from support import drawing, metrics
from support.commands import few, positive, run
from support.errors import BadInput
from support.files import read_json, whole
from support.log import asked_of, times
from support.ranks import Ranks, setup_ranks
from support.start import load_model, newest
from text import encode_turns
from text.boxes import parse_box, parse_box_released
from text.templates import CONTROL, MARK, TASKS, prompt

TOY = "out/toy/heldout.toml"
TOY_CHOICE = "out/toy/heldout/choice.tsv"
# what LLaVA-1.5 adds to yes-or-no questions
SHORTLY = "\nAnswer the question using a single word or phrase."
ALONE = Ranks(0, 1, torch.device("cpu"))
PROTOCOLS = (*metrics.PROTOCOLS, *metrics.EXACT)
OCR_VQA = {"max_new_tokens": 100}  # as InfMLLM asks it
SHEET = 8  # wrong answers on the contact sheet, and as many right ones
KEPT = tuple(
    "question_id image_id img_name sent_id key label subtask picture index options".split()
)
# what stands around a question in its prompt
FRAME = re.compile(
    rf".*(<ImageHere>|USER:|{CONTROL}\S+user\S*\n)|ASSISTANT:|Short (answer|caption|phrase):|Question:"
    rf"|{CONTROL}.*",
    re.S,
)


# ---------------------------------------------------------------------------------------------------
# What is asked


@dataclass
class Exam:
    """Questions of one source that are asked and scored alike."""

    name: str
    task: str  # how they are asked
    kind: str  # how they are scored: the task, or the benchmark
    count: int  # of all that there are
    record: Callable  # number -> Record
    folder: str | None = None  # of its pictures
    numbers: list = ()  # of those that are asked
    protocol: str = "vqav2"  # of short answers
    format: str = ""  # of the source: what its server takes
    published: float | None = None  # in percent, of the first metric


def open_exams(model, tokenizer, data, task=None, benchmark=None, images=None, protocol=None):
    if task == "choice":
        source = Choice(data)
        record = partial(one_turn, source.read, tokenizer.template)
        return [Exam(Path(data).stem, "chat", "choice", len(source), record)]
    if benchmark:
        read_questions, *_ = BENCHMARKS[benchmark]
        rows = read_questions(data, images)
        if not rows:
            raise BadInput(
                f"{data}: has no questions of {benchmark}; name what its authors release"
            )
        for _, text, label, _ in rows:
            if label not in ("yes", "no"):
                raise BadInput(f"{data}: {text!r} is answered by {label!r}, not yes or no; mend it")
        task = task or "vqa"
        record = partial(yes_or_no, benchmark, task, rows, tokenizer.template)
        return [Exam(benchmark, task, benchmark, len(rows), record, images or data)]
    sources = [s for s in load_mixture(data, train=False) if task in (None, s.task)]
    if not sources:
        raise BadInput(f"{data}: has no source for --task {task}; leave --task out")
    c = model.config
    sizes = (c.vit.image_size, c.visual_tokens, c.llm.context)
    data = Data(sources, tokenizer, *sizes, train=False, image_mark=c.image_mark)
    exams = []
    for s in sources:
        exam = Exam(s.name, s.task, s.task, len(s), partial(data.record, s))
        exam.protocol = protocol or s.protocol or "vqav2"
        if exam.protocol not in PROTOCOLS:
            s.wrong(f"`protocol` is {s.protocol!r}; name one of {', '.join(PROTOCOLS)}")
        exam.format, exam.published = s.format, s.published
        exam.folder = s.images and s.path("images")
        exams.append(exam)
    return exams


def one_turn(read, template, number):
    """A record of multiple choice, asked in a conversation of one turn."""
    record = read(number)
    images = [upright(peek(ref, record.where)) for ref in record.refs]
    marks = "\n".join([MARK] * len(images))
    return replace(
        record,
        source=Path(record.where.split(": row")[0]).stem,
        number=number,
        images=images,
        size=images[0].size,
        turns=[(prompt("chat", record.text, marks, template), record.answers)],
    )


def yes_or_no(name, task, rows, template, number):
    """The record of a (picture, question, label, fields): asked as vqa, or as a chat."""
    path, text, label, fields = rows[number]
    if task == "chat":
        text += SHORTLY
    image = sample.open_image(path)
    return Record(
        str(path),
        [(str(path), 0, -1)],
        answers=[label],
        fields=fields,
        source=name,
        number=number,
        images=[image],
        size=image.size,
        turns=[(prompt(task, text, template=template), label)],
    )


def read_pope(path, images):
    """JSON lines of {question_id, image, text, label}, as POPE publishes them."""
    rows = []
    for n, line in enumerate(whole(path).splitlines(), 1):
        try:
            row = json.loads(line)
            picture = Path(images or "", row["image"])
            rows.append((picture, row["text"], row["label"].strip().lower(), row))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(
                f"{path}: line {n} is not an object with image, text and label; mend it"
            ) from None
    return rows


def read_mme(path, images):
    """The released folder: for each subtask pictures and texts of the same name, in each line of a text
    a question, a tab, and Yes or No. Some subtasks keep them in images/ and questions_answers_YN/."""
    rows = []
    for pattern in ("*/*.txt", "*/questions_answers_YN/*.txt"):
        for text in sorted(Path(path).glob(pattern)):
            subtask = text.relative_to(path).parts[0]
            files = Path(path, subtask).rglob(f"{text.stem}.*")
            found = [file for file in files if file.suffix.lower() in sample.ENDINGS]
            if not found:
                raise BadInput(f"{text}: has no picture of its name; fetch it again")
            for line in whole(text).decode(errors="replace").strip().splitlines():
                question, _, label = line.rpartition("\t")
                label = label.strip().lower()
                fields = {"label": label, "subtask": subtask, "picture": found[0].name}
                rows.append((found[0], question, label, fields))
    return rows


# ---------------------------------------------------------------------------------------------------
# Answers


def answer_exams(exams, model, tokenizer, folder, batch, asked, ranks, by="answer"):
    """Write this rank's answers into a file of its own, but for those that are on disk already."""
    done = {
        key(r): to_lines([r | {"said": None}]) for r in read_rows(folder) if "unreadable" not in r
    }
    batches = [
        (exam, exam.numbers[first : first + batch])
        for exam in exams
        for first in range(0, len(exam.numbers), batch)
    ]
    mine = batches[ranks.rank :: ranks.world]
    bar = tqdm(
        mine,
        disable=ranks.rank > 0 or None,  # None: where it is no terminal
        unit=" samples",
        unit_scale=batch,
    )
    right = []
    began = time.perf_counter()
    with open(folder / f"predictions.{ranks.rank}.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")  # behind a line that was cut in half
        for n, (exam, numbers) in enumerate(bar):
            if n and n % -(-len(mine) // 10) == 0 and bar.disable and ranks.rank == 0:
                passed = times(time.perf_counter() - began, n, len(mine) - n)
                print(f"{n / len(mine):.0%} answered, {passed}", file=sys.stderr)
            questions = []
            for number in numbers:
                try:
                    questions += questions_of(exam.record(number), tokenizer, model.config)
                except BadInput as e:
                    row = {"source": exam.name, "number": number, "turn": 0, "unreadable": str(e)}
                    file.write(to_lines([row]))
            for start in range(0, len(questions), batch):  # a conversation has several
                tokens, images, rows = zip(*questions[start : start + batch])
                known = [done.get(key(r)) for r in rows]
                if all(known):
                    if known != [to_lines([r]) for r in rows]:
                        raise BadInput(
                            f"{folder}: holds answers to what {exam.name} asked before it changed; "
                            "remove it, or name another --out"
                        )
                    continue
                pad = TASKS[exam.task].pad
                own = OCR_VQA if exam.protocol == "ocrvqa" and not asked["max_new_tokens"] else {}
                settings = sample.decoding(exam.task, asked | own)
                if by == "likelihood":
                    answers = likeliest(model, tokenizer, images, tokens, rows)
                else:
                    answers = sample.generate(model, tokenizer, images, tokens, pad, **settings)
                for r, said in zip(rows, answers):
                    r["said"] = said
                    right.append(is_right(r, exam.kind, exam.protocol))
                file.write(to_lines(rows))
                file.flush()
                bar.set_postfix_str(f"right so far {sum(right) / len(right):.1%}", refresh=False)


@torch.inference_mode()
def likeliest(model, tokenizer, images, tokens, rows):
    """For each prompt the letter of an option that the model finds likeliest as its answer."""
    c = model.config
    letters = []
    for pictures, ids, r in zip(images, tokens, rows):
        shown = [sample.square(picture, c.vit.image_size, True) for picture in pictures]
        samples = []
        for letter in r["options"]:
            said = tokenizer.encode(letter)
            targets = [IGNORE] * (len(ids) - 1) + said
            samples.append(
                ((ids + said)[:-1], targets, [p.permute(1, 2, 0).numpy() for p in shown])
            )
        batch = collate(samples, tokenizer.pad, c.visual_tokens, c.vit.image_size, 1)
        batch = batch.to(model.llm.embed.weight.device)
        logits = model(batch.images, batch.tokens).float()  # (options, T, V)
        log_p = logits.log_softmax(-1).gather(2, batch.targets.clamp(min=0)[:, :, None])[:, :, 0]
        score = (log_p * (batch.targets != IGNORE)).sum(1)
        letters.append(list(r["options"])[score.argmax()])
    return letters


def questions_of(record, tokenizer, config):
    """(tokens, images, row) of every turn, its row to be answered. The past of a conversation is the true one."""
    questions = []
    turns = [(text.replace(MARK, config.image_mark), answer) for text, answer in record.turns]
    for turn, (text, _) in enumerate(turns):
        ids, _ = encode_turns(tokenizer, [*turns[:turn], (text, None)], config.visual_tokens)
        sample.check_length(ids, config, record.where)
        shown = ids.count(IMAGE) // config.visual_tokens
        questions.append((ids, record.images[:shown], to_row(record, turn)))
    return questions


def to_row(record, turn):
    """What is kept of a question: enough to score its answer without the data set."""
    fields = record.fields
    kind = fields.get("type", fields.get("answer_type"))
    truth = record.answers
    if "conversations" in fields:  # an answer for each turn, and maybe a type
        truth = truth[turn : turn + 1]
    if "types" in fields:
        kind = fields["types"][turn]
    return {
        "source": record.source,
        "number": record.number,
        "turn": turn,
        "asked": record.turns[turn][0],
        "said": None,
        "truth": truth,
        "box": record.box,
        "size": record.size,
        "type": kind if isinstance(kind, str) else None,
        **{name: fields[name] for name in KEPT if name in fields},
    }


def key(r):
    return r["source"], r["number"], r["turn"]


def read_rows(folder):
    """All answers on disk, in the order of the data set and each once."""
    rows = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):  # a line that was cut in half
                r = json.loads(line)
                if key(r) not in rows or "unreadable" not in r:  # it may have been mended
                    rows[key(r)] = r
    return [rows[place] for place in sorted(rows)]


def to_lines(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def merge(folder):
    """The ranks' files become one."""
    rows = read_rows(folder)
    new = folder / "predictions.new"
    new.write_text(to_lines(rows), "utf-8")
    new.rename(folder / "predictions.jsonl")
    for path in folder.glob("predictions.*.jsonl"):
        path.unlink()
    return rows


# ---------------------------------------------------------------------------------------------------
# Scores


def is_right(r, kind, protocol="vqav2"):
    """Of one answer alone: for the running score and the contact sheet."""
    said, truth = r["said"], r["truth"]
    if kind in BENCHMARKS:
        _, read_answer, *_ = BENCHMARKS[kind]
        return read_answer(said) == truth[0]
    if kind == "choice":
        return metrics.choice_letter(said, r["options"]) in truth
    if kind in ("caption", "region"):
        return any(parts(said) == parts(text) for text in truth)
    if kind == "ground":
        return overlap(r) >= 0.5
    if kind == "vqa":
        if not truth:
            return False
        _, [found] = metrics.short_answer_scores([said], [truth], protocol)
        return found >= 0.5
    if box := parse_box(truth[0]):  # of a chat
        return metrics.iou(parse_box(said), box) >= 0.5
    return metrics.exact_score(said, truth) == 1


def parts(text):
    """'a red square, a circle and a cross' as a set with repeats: the same things in any order."""
    return sorted(re.split(r",? and |, ", text.lower().strip().rstrip(".")))


def named_box(r, read=parse_box):
    """The box in an answer, in pixels of its picture."""
    box = read(r["said"])
    return box and [v * side for v, side in zip(box, r["size"] * 2)]


def overlap(r, read=parse_box):
    return metrics.iou(named_box(r, read), r["box"])


def measure(rows, kind, protocol):
    """{metric: a score for each row}, the metric that counts first."""
    right = [is_right(r, kind, protocol) for r in rows]
    if kind == "choice":
        return {"accuracy (choice)": right}
    if kind in ("caption", "region"):
        cider = metrics.cider(*columns(rows, "said", "truth"))
        return {"CIDEr-D": cider, "exact, any order": right}
    if kind == "ground":
        released = [overlap(r, parse_box_released) >= 0.5 for r in rows]
        mean_iou = [overlap(r) for r in rows]
        return {"Acc@0.5": right, "mean IoU": mean_iou, "Acc@0.5, released parser": released}
    if kind == "vqa":
        name, scores = metrics.short_answer_scores(*columns(rows, "said", "truth"), protocol)
        exact = [metrics.exact_score(r["said"], r["truth"]) for r in rows]
        return {name: scores, "exact": exact}
    return {"right": right}  # of a chat


def columns(rows, *names):
    return [[r[name] for r in rows] for name in names]


BENCHMARKS = {  # what reads its file, what reads an answer; what scores them, and of which columns
    "pope": (read_pope, metrics.pope_answer, metrics.pope, ("said", "label")),
    "mme": (read_mme, metrics.mme_answer, metrics.mme, ("said", "label", "subtask", "picture")),
}


def score(rows, kind, protocol="vqav2"):
    """[(metric, score, count)] of one source; the first metric also by type of question."""
    rows = [r for r in rows if r["truth"] or r["box"]]  # a test split's answers are with its server
    if not rows:
        return [("no answers to compare with", math.nan, 0)]
    if kind in BENCHMARKS:
        *_, score_all, names = BENCHMARKS[kind]
        return score_all(*columns(rows, *names))
    if kind == "choice":
        rows = whole_questions(rows)
    found = measure(rows, kind, protocol)
    lines = [(metric, *metrics.mean(values)) for metric, values in found.items()]
    first, *_ = found.values()
    types = sorted({r["type"] for r in rows if r["type"]})
    for name in types:
        own = [value for value, r in zip(first, rows) if r["type"] == name]
        lines.append((f"  {name}", *metrics.mean(own)))
    return lines


def whole_questions(rows):
    """MMBench asks a question with its options in turn, in rows whose index is the same modulo a million: one
    question, which is right where all of them are."""
    groups = {}
    for r in rows:
        index = int(r["index"]) % 10**6 if r["index"].isdecimal() else r["index"]
        groups.setdefault(index, []).append(r)
    return [
        next((r for r in group if not is_right(r, "choice")), group[0]) for group in groups.values()
    ]


def submission(rows, kind, format=""):
    """What the official servers take: VQAv2 and its kin, captions; boxes in pixels for RefCOCO."""
    if format == "gqa":
        return [{"questionId": r["question_id"], "prediction": r["said"]} for r in rows]
    if format == "aokvqa":
        return {r["question_id"]: {"direct_answer": r["said"]} for r in rows}
    if kind == "ground":
        names = ("img_name", "sent_id")
        return [{name: r.get(name) for name in names} | {"bbox": named_box(r)} for r in rows]
    places = {"vqa": ("question_id", "answer"), "caption": ("image_id", "caption")}
    if kind not in places:
        return []
    name, value = places[kind]
    return [{name: r[name], value: r["said"]} for r in rows if name in r]


# ---------------------------------------------------------------------------------------------------
# For people


def table(scores, exams, unreadable):
    """The scores as JSON. Those of a type or subtask are called `type right`: it may share a metric's name."""
    found = {}
    for exam in exams:
        bad = sum(r["source"] == exam.name for r in unreadable)
        lines = {
            metric.replace("  ", "type ", 1): {"score": value, "count": count}
            for metric, value, count in scores[exam.name]
        }
        asked = {"asked": len(exam.numbers), "of": exam.count, "unreadable": bad}
        if exam.published is not None:
            asked["published"] = exam.published
        found[exam.name] = lines | {"records": asked}
    return found


def show(scores, found):
    """The table; beside the first metric of a source stands what its mixture says that others report."""
    wide = max(14, *map(len, scores)) + 2
    published = {name: entries["records"].get("published") for name, entries in found.items()}
    title = "  published" if any(published.values()) else ""
    print(f"{'source':<{wide}}{'metric':<28}{'score':>8}{'samples':>10}{title}")
    for source, lines in scores.items():
        beside = published[source]
        for metric, value, count in lines:
            others = "" if beside is None else f"{beside / 100:>11.4g}"
            print(f"{source:<{wide}}{metric:<28}{value:>8.4g}{count:>10}{others}")
            source, beside = "", None


def contact_sheet(path, exams, rows):
    """Wrong answers, then right ones, with the true box and the one that was named."""
    exam_of = {exam.name: exam for exam in exams}
    cells = {drawing.WRONG: [], drawing.RIGHT: []}
    shown = set()  # no picture comes twice
    for r in random.Random(0).sample(rows, len(rows)):  # some of every source
        exam = exam_of[r["source"]]
        colour = drawing.RIGHT if is_right(r, exam.kind, exam.protocol) else drawing.WRONG
        if not r["size"] or not (r["truth"] or r["box"]) or len(cells[colour]) == SHEET:
            continue
        record = exam.record(r["number"])
        if record.refs[0] not in shown:
            shown.add(record.refs[0])
            cells[colour].append((*cell(exam, record, r), colour))
    if not any(cells.values()):
        raise BadInput(f"--sheet {path}: there is no answer with a picture to draw")
    drawing.sheet(sum(cells.values(), []), path)


def cell(exam, record, r):
    """(picture, boxes, text) of one answer for the contact sheet."""
    said = parse_box(r["said"])
    true = parse_box(r["truth"][0])
    if r["box"]:
        true = [v / side for v, side in zip(r["box"], r["size"] * 2)]
    boxes = [(true, "true", drawing.TRUE), (said, "said", drawing.NAMED)]
    text = f"{exam.name}: {FRAME.sub('', r['asked']).strip()}\nsaid: {r['said']}"
    if exam.kind != "ground":
        text += f"\ntrue: {r['truth'][0]}"
    text = re.sub(r"</?(box|ref)>", "", text)
    return record.images[0], [box for box in boxes if box[0]], text


# ---------------------------------------------------------------------------------------------------
# Start to end


def evaluate(
    model,
    tokenizer,
    data,
    out,
    limit=None,
    batch=8,
    sheet=None,
    beams=None,
    min_new_tokens=None,
    max_new_tokens=None,
    protocol=None,
    task=None,
    ranks=ALONE,
    benchmark=None,
    images=None,
    by="answer",
):
    """Answers, scores and files of a data set -> {source: [(metric, score, count)]}, on rank 0.

    data: a mixture file; with benchmark, a name in BENCHMARKS, the benchmark's own file or folder, and
    images the folder of its pictures. task: only the sources of this task. What is None of beams,
    min_new_tokens and max_new_tokens is the task's own."""
    folder = Path(out)
    exams = open_exams(model, tokenizer, data, task, benchmark, images, protocol)
    for exam in exams:
        exam.numbers = some(exam.count, limit)
    if sheet:
        drawing.check_target(sheet, *[exam.folder for exam in exams])
    asked = dict(beams=beams, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens)
    adapter = torch.cat([p.detach().flatten() for p in model.adapter.parameters()])
    claim(
        folder,
        weights=zlib.crc32(adapter.float().cpu().numpy().tobytes()),
        data=str(data),
        dtype=str(adapter.dtype),
        limit={exam.name: len(exam.numbers) for exam in exams},
        batch=batch,
        task=task,
        **asked,
        by=by,
    )
    answer_exams(exams, model, tokenizer, folder, batch, asked, ranks, by)
    ranks.sum(0)  # waits until all have answered
    if ranks.rank:
        return {}
    rows = merge(folder)
    unreadable = [r for r in rows if "unreadable" in r]
    rows = [r for r in rows if "unreadable" not in r]
    if unreadable and not rows:
        raise BadInput(unreadable[0]["unreadable"])
    scores = {}
    for exam in exams:
        own = [r for r in rows if r["source"] == exam.name]
        scores[exam.name] = score(own, exam.kind, exam.protocol)
        if sent := submission(own, exam.kind, exam.format):
            (folder / f"{exam.name}.submission.json").write_text(json.dumps(sent))
    found = table(scores, exams, unreadable)
    (folder / "scores.json").write_text(json.dumps(found, indent=2))
    named = folder / "unreadable.txt"
    named.unlink(missing_ok=True)
    if unreadable:
        named.write_text("".join(f"{r['unreadable']}\n" for r in unreadable), "utf-8")
        print(f"{len(unreadable)} samples could not be read: {named}", file=sys.stderr)
    if sheet:
        contact_sheet(sheet, exams, rows)
    return scores


def claim(folder, **this):
    """The folder holds answers of this very evaluation, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    before = read_json(path) if path.exists() else this
    other = [name for name in this if before.get(name) != this[name]]
    if other:
        raise BadInput(
            f"{folder}: holds an evaluation with another {', '.join(other)}; remove it, or name another --out"
        )
    new = folder / f"evaluation.{os.getpid()}"
    new.write_text(json.dumps(this, indent=2))
    new.rename(path)


def parse(argv=None):
    parser = sample.model_flags(__doc__)
    flag = parser.flag
    one = parser.add_mutually_exclusive_group().add_argument
    one("--data", help=f"mixture file, whose sources are all evaluated; default: {TOY}")
    one("--pope", help="a POPE file instead, with its pictures in --images")
    one("--mme", help="MME's folder instead")
    flag("--images", str, "folder of POPE's pictures")
    flag(
        "--task",
        (*TASKS, "choice"),
        "only the sources of this task; with --pope and --mme vqa or chat; choice: --data is a TSV of "
        "VLMEvalKit's",
    )
    flag(
        "--by",
        ("answer", "likelihood"),
        "of choice: by the letter in the answer, or by the letter that the model finds likeliest",
        "answer",
    )
    flag("--limit", positive, "a random sample of so many records of each source, always the same")
    flag("--batch", few, "samples a rank decodes together; default 8", 8)
    flag(
        "--protocol",
        PROTOCOLS,
        "rules for short answers (support/metrics.py); default: the source's own, or vqav2",
    )
    flag("--out", str, "folder of the predictions; default: out/evaluate/CHECKPOINT-DATA")
    flag("--sheet", str, "picture to write: right and wrong answers, with true and predicted boxes")
    flag("--json", bool, "print one JSON object in place of the table")
    args = parser.parse_args(argv)
    args.benchmark = next((name for name in BENCHMARKS if getattr(args, name)), None)
    if args.benchmark:
        args.data = getattr(args, args.benchmark)
        if args.task not in (None, "vqa", "chat"):
            raise BadInput(f"--task {args.task}: yes-or-no questions are asked as vqa or chat")
    elif not args.data:
        args.data = TOY
    if args.by == "likelihood" and args.task != "choice":
        raise BadInput("--by likelihood belongs to --task choice")
    if args.task == "choice" and args.data == TOY:
        args.data = TOY_CHOICE
    if args.images and not args.pope:
        raise BadInput("--images belongs to --pope; a mixture names its own")
    return args


def main(argv=None):
    args = parse(argv)
    ranks = setup_ranks(args.device, timeout=24 * 3600)  # they do not finish together
    path = weights.find(newest()) if not args.ckpt else Path(args.ckpt)
    model, tokenizer = load_model(path, args.tokenizer, ranks.device, args.dtype, args.branch)
    if args.data in (TOY, TOY_CHOICE):
        if ranks.rank == 0 and not Path(args.data).exists():
            print("drawing the toy world in out/toy", file=sys.stderr)
            toy.write("out/toy")
        ranks.sum(0)  # the others wait until it is drawn
    if not args.out:
        branch = Path(args.branch or "")
        with suppress(BadInput):
            path = weights.find(path)  # the step of a run, which goes on
        data = Path(args.data)
        parts = (*path.parts[-2:], *branch.parts[-2:], data.absolute().parent.name, data.stem)
        args.out = f"out/evaluate/{'-'.join(parts)}"
    if not args.ckpt:
        print(f"model: {path}", file=sys.stderr)
    taken = inspect.signature(evaluate).parameters
    settings = {name: value for name, value in vars(args).items() if name in taken}
    settings |= {"tokenizer": tokenizer, "ranks": ranks}
    scores = evaluate(model, **settings)
    ranks.close()
    if not scores:
        return  # rank 0 has them
    found = read_json(Path(args.out) / "scores.json")
    if args.json:
        print(json.dumps(found))
    else:
        show(scores, found)
        print(asked_of(found))
        print(f"answers: {args.out}/predictions.jsonl")
        if args.sheet:
            print(f"right and wrong ones: {args.sheet}")


if __name__ == "__main__":
    sys.exit(run(main))
