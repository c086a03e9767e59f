"""How right the trained model is: answers for a whole data set, scored.

    python evaluate.py                                                # the newest model of out/, the held-out toy world
    python evaluate.py --ckpt out/stage2 --data recipes/refcoco.toml --sheet rights-and-wrongs.png
    torchrun --nproc_per_node 8 evaluate.py --ckpt out/stage3 --data recipes/vqav2.toml --batch 16
    python evaluate.py --ckpt llava-1.5-7b-hf/ --pope coco_pope_random.json --images val2014/ --task chat
    python evaluate.py --ckpt out/stage3 --mme MME_Benchmark_release_version/

Answers are written as they come (--out, predictions.*.jsonl), so that a run that was stopped goes on when
it is started again. In the end they are one predictions.jsonl, with scores.json and the files that test
servers take beside it. Which samples share a batch depends on the data and on --batch alone: any number of
ranks, and a run that was stopped, give the same file.

To add a benchmark, write a function that reads its questions (BENCHMARKS) and one that scores their
answers (SCORES); to add a metric, add its line to what a function of SCORES returns.
"""

import inspect
import json
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import sample
from data import Data
from formats import Record, load_mixture
from model import IMAGE
from support import drawing, metrics
from support.commands import number, run
from support.errors import BadInput
from support.files import read_json, reading
from support.ranks import Ranks, setup_ranks
from support.start import load_model, newest
from text import encode_turns
from text.boxes import parse_box, parse_box_released
from text.templates import MARK, TASKS, prompt

TOY = "out/toy/heldout.toml"
WINDOW = 8  # batches whose samples are sorted by length together; a rank takes every world-th
# what LLaVA-1.5 adds to yes-or-no questions
SHORTLY = "\nAnswer the question using a single word or phrase."
ALONE = Ranks(0, 1, torch.device("cpu"))
SHEET = 16  # pictures on the contact sheet, half of them wrong if there are as many
KEPT = ("question_id", "image_id", "img_name", "sent_id", "subtask", "picture", "key")
# what stands around a question in its prompt
FRAME = re.compile(
    r".*(<ImageHere>|USER:)|ASSISTANT:|Short (answer|caption|phrase):|Question:", re.S
)


# ---------------------------------------------------------------------------------------------------
# What is asked


@dataclass
class Exam:
    """Questions of one source that are asked and scored alike."""

    name: str
    task: str  # how they are asked
    kind: str  # how they are scored: the task, or the benchmark
    count: int
    records: Callable  # (first, step, end) -> Records; as Data.samples takes (rank, world, limit)


def open_exams(model, tokenizer, data, task=None, benchmark=None, images=None):
    if benchmark:
        rows = BENCHMARKS[benchmark](data, images)
        if not rows:
            raise BadInput(
                f"{data}: has no questions of {benchmark}; name what its authors release"
            )
        for _, text, label, _ in rows:
            if label not in ("yes", "no"):
                raise BadInput(f"{data}: {text!r} is answered by {label!r}, not yes or no; mend it")
        task = task or "vqa"
        records = partial(yes_or_no, benchmark, task, rows)
        return [Exam(benchmark, task, benchmark, len(rows), records)]
    sources = [s for s in load_mixture(data, train=False) if task in (None, s.task)]
    if not sources:
        raise BadInput(f"{data}: has no source for --task {task}; leave --task out")
    c = model.config
    sizes = (c.vit.image_size, c.visual_tokens, c.llm.context)
    data = Data(sources, tokenizer, *sizes, train=False, image_mark=c.image_mark)
    return [Exam(s.name, s.task, s.task, len(s), partial(data.samples, s.name)) for s in sources]


def yes_or_no(name, task, rows, first, step, end):
    """Records of (picture, question, label, fields): asked as vqa, or as a chat."""
    for n in range(first, end, step):
        path, text, label, fields = rows[n]
        if task == "chat":
            text += SHORTLY
        image = sample.open_image(path)
        yield Record(
            str(path),
            [],
            answers=[label],
            fields=fields,
            source=name,
            task=task,
            number=n,
            images=[image],
            size=image.size,
            turns=[(prompt(task, text), label)],
        )


def pope(path, images):
    """JSON lines of {question_id, image, text, label}, as POPE publishes them."""
    rows = []
    for n, line in read_lines(path):
        try:
            row = json.loads(line)
            picture = Path(images or "", row["image"])
            label = row["label"].strip().lower()
            rows.append((picture, row["text"], label, {"question_id": row.get("question_id")}))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(
                f"{path}: line {n} is not an object with image, text and label; mend it"
            ) from None
    return rows


def mme(path, images):
    """The released folder: for each subtask pictures and texts of the same name, in each line of a text
    a question, a tab, and Yes or No. Some subtasks keep them in images/ and questions_answers_YN/."""
    rows = []
    for pattern in ("*/*.txt", "*/questions_answers_YN/*.txt"):
        for text in sorted(Path(path).glob(pattern)):
            subtask = text.relative_to(path).parts[0]
            folders = (text.parent, text.parent.parent / "images")
            places = [folder / (text.stem + end) for folder in folders for end in sample.ENDINGS]
            found = [place for place in places if place.is_file()]
            for _, line in read_lines(text):
                if not found:
                    raise BadInput(f"{text}: has no picture of its name; fetch it again")
                question, _, label = line.rpartition("\t")
                fields = {"subtask": subtask, "picture": found[0].name}
                rows.append((found[0], question, label.strip().lower(), fields))
    return rows


def read_lines(path):
    """(number, line) of the lines that are not blank"""
    with reading(path):
        text = Path(path).read_text("utf-8")
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


BENCHMARKS = {"pope": pope, "mme": mme}  # (path, images) -> rows for yes_or_no


# ---------------------------------------------------------------------------------------------------
# Answers


def answer_exams(exams, model, tokenizer, folder, batch, asked, ranks):
    """Write this rank's answers into a file of its own, but for those that are on disk already."""
    done = {key(r) for r in read_rows(folder)}
    size = batch * WINDOW
    windows = [
        (exam, first, min(first + size, exam.count))
        for exam in exams
        for first in range(0, exam.count, size)
    ][ranks.rank :: ranks.world]
    count = sum(end - first for _, first, end in windows)
    bar = tqdm(total=count, disable=ranks.rank > 0 or not sys.stderr.isatty(), unit=" samples")
    cells = model.config.visual_tokens
    right = []
    with bar, open(folder / f"predictions.{ranks.rank}.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")  # behind a line that was cut in half
        for exam, first, end in windows:
            questions = read_questions(exam, first, end, model.config, tokenizer)
            for start in range(0, len(questions), batch):
                together = questions[start : start + batch]
                if all((exam.name, record.number, turn) in done for _, record, turn in together):
                    continue
                said = sample.generate(
                    model,
                    tokenizer,
                    [record.images[: ids.count(IMAGE) // cells] for ids, record, _ in together],
                    [ids for ids, _, _ in together],
                    TASKS[exam.task].pad,
                    **sample.decoding(exam.task, asked),
                )
                rows = [row(record, turn, text) for (_, record, turn), text in zip(together, said)]
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
                file.flush()
                right += [is_right(r, exam.kind) for r in rows]
                bar.set_postfix_str(f"right so far {sum(right) / len(right):.1%}", refresh=False)
            bar.update(end - first)


def read_questions(exam, first, end, config, tokenizer):
    """Every turn of these samples as (ids, record, turn), short ones first.

    The past of a conversation is the true one."""
    questions = []
    for record in exam.records(first, 1, end):
        turns = [(text.replace(MARK, config.image_mark), answer) for text, answer in record.turns]
        for turn, (text, _) in enumerate(turns):
            ids, _ = encode_turns(tokenizer, [*turns[:turn], (text, None)], config.visual_tokens)
            sample.check_length(ids, config, record.where)
            questions.append((ids, record, turn))
    return sorted(questions, key=lambda question: len(question[0]))


def row(record, turn, said):
    """What is kept of an answer: enough to score it without the data set."""
    fields = record.fields or {}
    kind = fields.get("type", fields.get("answer_type"))
    truth = list(record.answers)
    if "conversations" in fields:  # an answer for each turn, and maybe a type
        truth = truth[turn : turn + 1]
        kind = fields["types"][turn] if "types" in fields else kind
    return {
        "source": record.source,
        "number": record.number,
        "turn": turn,
        "asked": record.turns[turn][0],
        "said": said,
        "truth": truth,
        "box": record.box,
        "size": record.size,
        "type": kind if isinstance(kind, str) else None,
        **{name: fields[name] for name in KEPT if fields.get(name) is not None},
    }


def key(r):
    return r["source"], r["number"], r["turn"]


def read_rows(folder):
    """All answers on disk, in the order of the data set and each once."""
    rows = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):  # a line that was cut in half
                r = json.loads(line)
                rows[key(r)] = r
    return [rows[place] for place in sorted(rows)]


def merge(folder):
    """The ranks' files become one."""
    rows = read_rows(folder)
    new = folder / "predictions.new"
    new.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    new.rename(folder / "predictions.jsonl")
    for path in folder.glob("predictions.*.jsonl"):
        path.unlink()
    return rows


# ---------------------------------------------------------------------------------------------------
# Scores


def is_right(r, kind):
    """Of one answer alone: for the running score and the contact sheet."""
    said, truth = r["said"], r["truth"]
    if kind in ("caption", "region"):
        return any(parts(said) == parts(text) for text in truth)
    if kind == "ground":
        return metrics.iou(named_box(r), r["box"]) >= 0.5
    if kind == "pope":
        return metrics.pope_answer(said) == truth[0]
    if kind == "mme":
        return metrics.mme_answer(said) == truth[0]
    if kind == "vqa":
        return bool(truth) and metrics.vqa_score(said, truth) >= 0.5
    if box := parse_box(truth[0]):  # of a chat
        return metrics.iou(parse_box(said), box) >= 0.5
    return metrics.exact_score(said, truth) == 1


def parts(text):
    """'a red square, a circle and a cross' as a set with repeats: the same things in any order."""
    return sorted(re.split(r",? and |, ", text.lower().strip().rstrip(".")))


def named_box(r, read=parse_box):
    """The box in an answer, in pixels of its picture."""
    box = read(r["said"])
    return box and [v * side for v, side in zip(box, (*r["size"], *r["size"]))]


def columns(rows, *names):
    return [[r[name] for r in rows] for name in names]


def score_captions(rows, protocol):
    same = [is_right(r, "caption") for r in rows]
    cider = metrics.cider(*columns(rows, "said", "truth"))
    return [("CIDEr-D", *cider), ("exact, any order", *metrics.mean(same))]


def score_boxes(rows, protocol):
    (boxes,) = columns(rows, "box")
    named = [named_box(r) for r in rows]
    released = [named_box(r, parse_box_released) for r in rows]
    return [
        ("Acc@0.5", *metrics.box_accuracy(named, boxes)),
        ("mean IoU", *metrics.mean_iou(named, boxes)),
        ("Acc@0.5, released parser", *metrics.box_accuracy(released, boxes)),
    ]


def score_answers(rows, protocol):
    said, truth = columns(rows, "said", "truth")
    return [
        (f"accuracy ({protocol})", *metrics.vqa_accuracy(said, truth, protocol)),
        ("exact", *metrics.exact_match(said, truth)),
    ]


def score_chat(rows, protocol):
    return [("right", *metrics.mean([is_right(r, "chat") for r in rows]))]


def score_pope(rows, protocol):
    said, truth = columns(rows, "said", "truth")
    return lines_of(metrics.pope(said, [label for (label,) in truth]))


def score_mme(rows, protocol):
    said, truth, *asked = columns(rows, "said", "truth", "subtask", "picture")
    table = metrics.mme(said, [label for (label,) in truth], *asked)
    subtasks = table.pop("subtasks").items()
    return lines_of(table) + [(f"  {name}", t["score"], t["count"]) for name, t in subtasks]


def lines_of(table):
    count = table.pop("count")
    return [(name, value, count) for name, value in table.items()]


SCORES = {  # kind of exam: (rows, protocol) -> [(metric, score, count)]
    "caption": score_captions,
    "region": score_captions,
    "ground": score_boxes,
    "vqa": score_answers,
    "chat": score_chat,
    "pope": score_pope,
    "mme": score_mme,
}


def score(rows, kind, protocol="vqav2"):
    """[(metric, score, count)] of one source; questions and chats also by type, where there are several."""
    rows = [r for r in rows if r["truth"] or r["box"]]  # a test split's answers are with its server
    if not rows:
        return [("no answers to compare with", math.nan, 0)]
    measure = SCORES[kind]
    lines = measure(rows, protocol)
    types = sorted({r["type"] for r in rows if r["type"]})
    if kind in ("vqa", "chat") and len(types) > 1:
        for name in types:
            _, value, count = measure([r for r in rows if r["type"] == name], protocol)[0]
            lines.append((f"  {name}", value, count))
    return lines


def submission(rows, kind):
    """What the official servers take: VQAv2, COCO captions; boxes in pixels for RefCOCO."""
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


def table(scores):
    """The scores as JSON. Those of a type or subtask are called `type right`: it may share a metric's name."""
    return {
        source: {
            metric.replace("  ", "type ", 1): {"score": value, "count": count}
            for metric, value, count in lines
        }
        for source, lines in scores.items()
    }


def show(scores):
    width = 2 + max(len(metric) for lines in scores.values() for metric, _, _ in lines)
    print(f"{'source':<16}{'metric':<{width}}{'score':>8}{'samples':>10}")
    for source, lines in scores.items():
        for metric, value, count in lines:
            print(f"{source:<16}{metric:<{width}}{value:>8.4g}{count:>10}")
            source = ""


def contact_sheet(path, exams, rows):
    """Wrong answers, then right ones, with the true box and the one that was named."""
    exam_of = {exam.name: exam for exam in exams}
    piles = {True: [], False: []}
    for r in random.Random(0).sample(rows, len(rows)):  # some of every source
        if r["truth"] or r["box"]:
            piles[is_right(r, exam_of[r["source"]].kind)].append(r)
    wrong = piles[False][: max(SHEET // 2, SHEET - len(piles[True]))]
    cells = [cell(exam_of[r["source"]], r) for r in (wrong + piles[True])[:SHEET]]
    cells = [c for c in cells if c]
    if not cells:
        raise BadInput(f"--sheet {path}: there is no answer with a picture to draw")
    drawing.sheet(cells, path)


def cell(exam, r):
    """(picture, boxes, text, colour) of one answer for the contact sheet."""
    record = next(exam.records(r["number"], 1, r["number"] + 1))
    if not record.images:
        return None
    if r["box"]:
        truth = [v / side for v, side in zip(r["box"], (*r["size"], *r["size"]))]
    else:
        truth = parse_box(r["truth"][0])
    boxes = [
        (truth, "asked" if exam.task == "region" else "true", drawing.TRUE),
        (parse_box(r["said"]), "said", drawing.NAMED),
    ]
    right = is_right(r, exam.kind)
    text = f"{exam.name}: {FRAME.sub('', r['asked']).strip()}\nsaid: {r['said']}"
    if not right and exam.kind != "ground":
        text += f"\ntrue: {r['truth'][0]}"
    text = re.sub(r"</?(box|ref)>", "", text)
    return (
        record.images[0],
        [b for b in boxes if b[0]],
        text,
        drawing.RIGHT if right else drawing.WRONG,
    )


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
    protocol="vqav2",
    task=None,
    ranks=ALONE,
    benchmark=None,
    images=None,
):
    """Answers, scores and files of a data set -> {source: [(metric, score, count)]}, on rank 0.

    data: a mixture file; with benchmark, a name in BENCHMARKS, the benchmark's own file or folder, and
    images the folder of its pictures. task: only the sources of this task. What is None of beams,
    min_new_tokens and max_new_tokens is the task's own."""
    folder = Path(out)
    exams = open_exams(model, tokenizer, data, task, benchmark, images)
    for exam in exams:
        exam.count = min(exam.count, limit or exam.count)
    asked = dict(beams=beams, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens)
    adapter = model.adapter.fc2.weight.detach()
    claim(
        folder,
        weights=zlib.crc32(adapter.float().cpu().numpy().tobytes()),
        data=str(data),
        dtype=str(adapter.dtype),
        sources={exam.name: exam.count for exam in exams},
        batch=batch,
        task=task,
        **asked,
    )
    answer_exams(exams, model, tokenizer, folder, batch, asked, ranks)
    ranks.sum(0)  # waits until all have answered
    if ranks.rank:
        return {}
    rows = merge(folder)
    scores = {}
    for exam in exams:
        own = [r for r in rows if r["source"] == exam.name]
        scores[exam.name] = score(own, exam.kind, protocol)
        if sent := submission(own, exam.kind):
            (folder / f"{exam.name}.submission.json").write_text(json.dumps(sent))
    (folder / "scores.json").write_text(json.dumps(table(scores), indent=2))
    if sheet:
        contact_sheet(sheet, exams, rows)
    return scores


def claim(folder, **this):
    """The folder holds answers of this very evaluation, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    if path.exists():
        before = read_json(path)
        other = [name for name in this if before.get(name) != this[name]]
        if other:
            raise BadInput(
                f"{folder}: holds an evaluation with another {', '.join(other)}; name another --out"
            )
    new = folder / f"evaluation.{os.getpid()}"
    new.write_text(json.dumps(this, indent=2))
    new.rename(path)


def parse(argv=None):
    parser = sample.model_flags(__doc__)
    add = parser.add_argument
    add("--data", help=f"mixture file, whose sources are all evaluated; default: {TOY}")
    add("--pope", help="a POPE file instead, with its pictures in --images")
    add("--mme", help="MME's folder instead")
    add("--images", help="folder of POPE's pictures")
    add(
        "--task",
        choices=TASKS,
        help="only the sources of this task; with --pope and --mme vqa or chat",
    )
    add("--limit", type=number(int, 1), help="at most so many samples of each source")
    add(
        "--batch", type=number(int, 1), default=8, help="samples a rank decodes together; default 8"
    )
    add("--protocol", choices=metrics.PROTOCOLS, default="vqav2", help="rules of VQA accuracy")
    add("--out", help="folder of the predictions; default: out/evaluate/CHECKPOINT-DATA")
    add("--sheet", help="picture to write: right and wrong answers, with true and predicted boxes")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    args = parser.parse_args(argv)
    named = [name for name in ("data", *BENCHMARKS) if getattr(args, name)]
    if len(named) > 1:
        raise BadInput("choose one of --data, --pope and --mme")
    args.benchmark = None
    if not named:
        args.data = TOY
        if args.min_new_tokens is None:
            args.min_new_tokens = 0  # the toy's captions may be shorter than the released 8
    elif named[0] in BENCHMARKS:
        args.benchmark = named[0]
        args.data = getattr(args, args.benchmark)
    if args.benchmark and args.task not in (None, "vqa", "chat"):
        raise BadInput(f"--task {args.task}: yes-or-no questions are asked as vqa or chat")
    if args.images and not args.pope:
        raise BadInput("--images belongs to --pope; a mixture names its own")
    return args


def main(argv=None):
    args = parse(argv)
    ranks = setup_ranks(args.device, timeout=24 * 3600)  # they do not finish together
    path = Path(args.ckpt or newest())
    model, tokenizer = load_model(path, args.tokenizer, ranks.device, args.dtype, args.branch)
    if args.data == TOY and not Path(TOY).exists():
        if ranks.rank == 0:
            import toy

            print("drawing the toy world in out/toy", file=sys.stderr)
            toy.write("out/toy")
        ranks.sum(0)  # the others wait until it is drawn
    branch = Path(args.branch or "")
    parts = (*path.parts[-2:], *branch.parts[-2:], Path(args.data).stem)
    name = "-".join(part for part in parts if part.strip("./"))
    args.out = args.out or f"out/evaluate/{name}"
    taken = inspect.signature(evaluate).parameters
    settings = {name: value for name, value in vars(args).items() if name in taken}
    settings |= {"tokenizer": tokenizer, "ranks": ranks}
    scores = evaluate(model, **settings)
    ranks.close()
    if not scores:
        return
    if args.json:
        print(json.dumps(table(scores)))
    else:
        show(scores)
        print(f"answers: {args.out}/predictions.jsonl")


if __name__ == "__main__":
    sys.exit(run(main))
