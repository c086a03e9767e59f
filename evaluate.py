"""How right the trained model is: answers for a whole data set, scored.

    python evaluate.py                                                # the newest model of out/, the held-out toy world
    python evaluate.py --ckpt out/stage2 --data recipes/refcoco.toml --sheet rights-and-wrongs.png
    torchrun --nproc_per_node 8 evaluate.py --ckpt out/stage3 --data recipes/vqav2.toml --batch 16
    python evaluate.py --ckpt llava-1.5-7b-hf/ --pope coco_pope_random.json --images val2014/ --task chat
    python evaluate.py --ckpt out/stage3 --mme MME_Benchmark_release_version/

Answers are written as they come (--out, predictions.*.jsonl), so that a run that was stopped goes on when it is started
again. In the end they are one predictions.jsonl, with scores.json and the files that test servers take beside it.
Which samples share a batch depends on the data and on --batch alone: any number of ranks, and a run that was stopped,
give the same file.
"""

import argparse
import json
import os
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from tqdm import tqdm

import sample
from data import Data
from formats.mixture import load_mixture
from formats.records import Record
from support import metrics
from support.errors import BadInput
from support.files import read_json
from support.ranks import setup_ranks
from text.boxes import parse_box, parse_box_released
from text.templates import MARK, TASKS, prompt
from text.tokenizer import encode_turns

TOY = "out/toy/heldout.toml"

WINDOW = 8  # batches whose samples are read together and sorted by length; a rank takes every world-th window

SHORTLY = "\nAnswer the question using a single word or phrase."  # what LLaVA-1.5 adds for yes-or-no benchmarks

SHEET = 16  # pictures on the contact sheet, half of them wrong if there are as many


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
@dataclass
class Exam:
    """One source: `count` samples, items(first, last) in order; kind says how they are scored."""

    name: str
    task: str
    kind: str
    count: int
    items: object


def open_exams(args, model, tokenizer):
    mark, c = model.config.image_mark, model.config
    if args.pope or args.mme:
        exams = [pope(args, mark) if args.pope else mme(args, mark)]
    else:
        sources = [s for s in load_mixture(args.data, train=False) if args.task in (None, s.task)]
        if not sources:
            raise BadInput(f"{args.data}: has no source for --task {args.task}; leave --task out")
        data = Data(
            sources,
            tokenizer,
            c.vit.image_size,
            c.visual_tokens,
            c.llm.context,
            train=False,
            image_mark=mark,
        )
        items = lambda name: lambda first, last: data.samples(name, first, 1, last)
        exams = [Exam(s.name, s.task, s.task, len(s), items(s.name)) for s in sources]
    for exam in exams:
        exam.count = min(exam.count, args.limit or exam.count)
    return exams


def yes_or_no(kind, args, mark, rows):
    """rows: (picture, question, label, fields). Prompts are those of vqa, or of a chat with --task chat."""
    task = args.task or "vqa"

    def items(first, last):
        for number, (path, text, label, fields) in enumerate(rows[first:last], first):
            asked = prompt("chat", text + SHORTLY, mark) if task == "chat" else prompt(task, text)
            image = sample.open_image(path)
            yield Record(
                str(path),
                [],
                source=kind,
                task=task,
                number=number,
                images=[image],
                size=image.size,
                turns=[(asked, label)],
                answers=[label],
                fields=fields,
            )

    return Exam(kind, task, kind, len(rows), items)


def pope(args, mark):
    """JSON lines of {question_id, image, text, label}, as POPE publishes them."""
    rows = []
    for n, line in enumerate(read_text(args.pope).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label = row["label"].strip().lower()
            question, image = row["text"], row["image"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(
                f"{args.pope}: line {n} is not an object with image, text and label; mend it"
            ) from None
        if label not in ("yes", "no"):
            raise BadInput(f"{args.pope}: line {n} has the label {label!r}, not yes or no")
        rows.append(
            (
                Path(args.images or ".") / image,
                question,
                label,
                {"question_id": row.get("question_id")},
            )
        )
    if not rows:
        raise BadInput(f"{args.pope}: has no questions; fetch it again")
    return yes_or_no("pope", args, mark, rows)


def mme(args, mark):
    """The released folder: per subtask pictures and texts of the same name, `question TAB Yes|No` a line; some subtasks
    keep them in images/ and questions_answers_YN/."""
    rows = []
    for text in sorted(Path(args.mme).glob("*/*.txt")) + sorted(
        Path(args.mme).glob("*/questions_answers_YN/*.txt")
    ):
        subtask = text.relative_to(args.mme).parts[0]
        places = [
            folder / (text.stem + ending)
            for folder in (text.parent, text.parent.parent / "images")
            for ending in sample.ENDINGS
        ]
        picture = next((path for path in places if path.is_file()), None)
        for line in read_text(text).splitlines():
            question, _, label = line.rpartition("\t")
            if not line.strip():
                continue
            if not picture:
                raise BadInput(f"{text}: has no picture of its name; fetch it again")
            if label.strip().lower() not in ("yes", "no"):
                raise BadInput(
                    f"{text}: a line is not a question, a tab and Yes or No; fetch it again"
                )
            rows.append(
                (
                    picture,
                    question,
                    label.strip().lower(),
                    {"subtask": subtask, "picture": picture.name},
                )
            )
    if not rows:
        raise BadInput(f"{args.mme}: has no <subtask>/*.txt; name the folder that MME releases")
    return yes_or_no("mme", args, mark, rows)


def read_text(path):
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: cannot be read ({e}); check the path") from None


# ---------------------------------------------------------------------------------------------------------------------
# Answers
def questions(exam, first, last, model, tokenizer):
    """Every turn of the samples first..last-1 as (ids, item, turn), the past of a conversation being the true one."""
    config, asked = model.config, []
    for item in exam.items(first, last):
        turns = [(text.replace(MARK, config.image_mark), answer) for text, answer in item.turns]
        for turn in range(len(turns)):
            ids, _ = encode_turns(
                tokenizer, turns[:turn] + [(turns[turn][0], None)], config.visual_tokens
            )
            sample.check_length(ids, config, item.where)
            asked.append((ids, item, turn))
    return sorted(asked, key=lambda q: len(q[0]))


def row(item, turn, said):
    """What is kept of an answer: enough to score it without the data set."""
    fields, talk = item.fields or {}, "conversations" in (item.fields or {})
    kind = (
        fields["types"][turn]
        if talk and "types" in fields
        else fields.get("type", fields.get("answer_type"))
    )
    truth = item.answers[turn : turn + 1] if talk else item.answers or []
    ids = ("question_id", "image_id", "img_name", "sent_id", "subtask", "picture", "key")
    return {
        "source": item.source,
        "number": item.number,
        "turn": turn,
        "asked": item.turns[turn][0],
        "said": said,
        "truth": truth,
        "box": item.box,
        "size": item.size,
        "type": kind if isinstance(kind, str) else None,
        **{key: fields[key] for key in ids if fields.get(key) is not None},
    }


def decode(exams, model, tokenizer, args, ranks, folder):
    """This rank's windows, batch by batch, into its own file; batches whose answers are on disk are passed over."""
    done, size = {key(r) for r in read_rows(folder)}, args.batch * WINDOW
    path = folder / f"predictions.{ranks.rank}.jsonl"
    if path.exists():
        path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n")  # a line cut in half
    windows = [
        (exam, first, min(first + size, exam.count))
        for exam in exams
        for first in range(0, exam.count, size)
    ]
    bar = tqdm(
        total=sum(e.count for e in exams),
        disable=ranks.rank > 0 or not sys.stderr.isatty(),
        unit=" samples",
    )
    right = []
    with open(path, "a", encoding="utf-8") as out:
        for exam, first, last in windows[ranks.rank :: ranks.world]:
            asked_for = {k: getattr(args, k) for k in ("beams", "min_new_tokens", "max_new_tokens")}
            settings = sample.DECODING[exam.task] | {
                k: v for k, v in asked_for.items() if v is not None
            }
            settings["min_new_tokens"] = min(
                settings.get("min_new_tokens", 0), settings["max_new_tokens"]
            )
            asked = questions(exam, first, last, model, tokenizer)
            for at in range(0, len(asked), args.batch):
                batch = asked[at : at + args.batch]
                if all((item.source, item.number, turn) in done for _, item, turn in batch):
                    continue
                images = [
                    item.images[: ids.count(sample.IMAGE) // model.config.visual_tokens]
                    for ids, item, _ in batch
                ]
                said = sample.answer(
                    model,
                    tokenizer,
                    images,
                    [ids for ids, _, _ in batch],
                    TASKS[exam.task].pad,
                    **settings,
                )
                rows = [row(item, turn, text) for (_, item, turn), text in zip(batch, said)]
                out.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
                out.flush()
                right += [is_right(r, exam.kind) for r in rows]
                bar.set_postfix_str(f"right so far {sum(right) / len(right):.1%}", refresh=False)
            bar.update(min(bar.total - bar.n, (last - first) * ranks.world))
    bar.close()


def key(r):
    return r["source"], r["number"], r["turn"]


def read_rows(folder):
    """All answers on disk, in order and each once; a line that was cut in half does not count."""
    rows = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                r = json.loads(line)
            except ValueError:
                continue
            rows[key(r)] = r
    return [rows[k] for k in sorted(rows)]


def merge(folder):
    """The ranks' files become one, in the order of the data set."""
    rows, new = read_rows(folder), folder / "predictions.new"
    new.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    new.rename(folder / "predictions.jsonl")
    for path in folder.glob("predictions.*.jsonl"):
        path.unlink()
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Scores
def parts(text):
    """'a red square, a circle and a cross' as a set with repeats: the same things in any order."""
    return sorted(re.split(r",? and |, ", text.lower().strip().rstrip(".")))


def same_parts(said, truths):
    return float(any(parts(said) == parts(t) for t in truths))


def pixels(box, size):
    return box and [v * s for v, s in zip(box, (*size, *size))]


def is_right(r, kind):
    """Of one answer alone: for the running score and the contact sheet."""
    if kind in ("caption", "region"):
        return bool(same_parts(r["said"], r["truth"]))
    if kind == "ground":
        return metrics.iou(pixels(parse_box(r["said"]), r["size"]), r["box"]) >= 0.5
    if kind == "pope":
        return metrics.pope_answer(r["said"]) == r["truth"][0]
    if kind == "mme":
        return metrics.mme_answer(r["said"]) == r["truth"][0]
    if kind == "chat" and (box := parse_box(r["truth"][0])):
        return metrics.iou(parse_box(r["said"]), box) >= 0.5
    if kind == "chat":
        return bool(metrics.exact_score(r["said"], r["truth"]))
    return bool(r["truth"]) and metrics.vqa_score(r["said"], r["truth"]) >= 0.5


def score(rows, kind, protocol="vqav2"):
    """[(metric, score, count)] of one source."""
    rows = [r for r in rows if r["truth"] or r["box"]]  # a test split's answers are with its server
    if not rows:
        return [("no answers to compare with", float("nan"), 0)]
    said, truth = [r["said"] for r in rows], [r["truth"] for r in rows]
    if kind == "ground":
        boxes = [r["box"] for r in rows]
        strict, released = (
            [pixels(read(r["said"]), r["size"]) for r in rows]
            for read in (parse_box, parse_box_released)
        )
        return [
            ("Acc@0.5", *metrics.box_accuracy(strict, boxes)),
            ("mean IoU", *metrics.mean_iou(strict, boxes)),
            ("Acc@0.5, released parser", *metrics.box_accuracy(released, boxes)),
        ]
    if kind in ("caption", "region"):
        same = [same_parts(s, t) for s, t in zip(said, truth)]
        return [("CIDEr-D", *metrics.cider(said, truth)), ("exact, any order", *metrics.mean(same))]
    if kind == "pope":
        return flat(metrics.pope(said, [t[0] for t in truth]))
    if kind == "mme":
        table = metrics.mme(
            said, [t[0] for t in truth], *([r[k] for r in rows] for k in ("subtask", "picture"))
        )
        lines = [
            (f"  {name}", part["score"], part["count"])
            for name, part in table.pop("subtasks").items()
        ]
        return flat(table) + lines
    if kind == "chat":
        measure = lambda some: [
            ("right", *metrics.mean([float(is_right(r, "chat")) for r in some]))
        ]
    else:
        measure = lambda some: [
            (name, *of([r["said"] for r in some], [r["truth"] for r in some]))
            for name, of in (
                (f"accuracy ({protocol})", lambda s, t: metrics.vqa_accuracy(s, t, protocol)),
                ("exact", metrics.exact_match),
            )
        ]
    by_type = defaultdict(list)
    for r in rows:
        by_type[r["type"]].append(r)
    typed = [
        (f"  {name}", *measure(some)[0][1:])
        for name, some in sorted(by_type.items(), key=str)
        if name
    ]
    return measure(rows) + (typed if len(typed) > 1 else [])


def flat(table):
    count = table.pop("count")
    return [(name, value, count) for name, value in table.items()]


def submission(rows, kind):
    """What the official servers take: VQAv2, COCO captions; boxes in pixels for RefCOCO."""
    if kind in ("vqa", "caption"):
        name, value = ("question_id", "answer") if kind == "vqa" else ("image_id", "caption")
        return [{name: r[name], value: r["said"]} for r in rows if name in r]
    if kind != "ground":
        return []
    return [
        {
            "img_name": r["img_name"],
            "sent_id": r.get("sent_id"),
            "bbox": pixels(parse_box(r["said"]), r["size"]),
        }
        for r in rows
    ]


# ---------------------------------------------------------------------------------------------------------------------
# For people
def show(scores):
    width = max(len(name) for lines in scores.values() for name, _, _ in lines)
    print(f"{'source':<16}{'metric':<{width + 2}}{'score':>8}{'samples':>10}")
    for source, lines in scores.items():
        for i, (name, value, count) in enumerate(lines):
            print(f"{source if i == 0 else '':<16}{name:<{width + 2}}{value:>8.4g}{count:>10}")


def cell(exam, r):
    """(picture, boxes, text, colour) of one answer for the contact sheet, None if there is no picture."""
    item = next(iter(exam.items(r["number"], r["number"] + 1)))
    if not item.images:
        return None
    truth = (
        [v / s for v, s in zip(r["box"], (*r["size"], *r["size"]))]
        if r["box"]
        else parse_box(r["truth"][0])
    )
    boxes = [
        (truth, "asked" if exam.task == "region" else "true", sample.TRUE),
        (parse_box(r["said"]), "said", sample.NAMED),
    ]
    asked = r["asked"].split("<ImageHere>")[-1].split("USER:")[-1]
    for frame in ("ASSISTANT:", "Short answer:", "Short caption:", "Short phrase:", "Question:"):
        asked = asked.replace(frame, "")
    right = is_right(r, exam.kind)
    said = [f"{exam.name}: {asked.strip()}", f"said: {r['said']}"] + (
        [] if right else [f"true: {r['truth'][0]}"]
    )
    text = re.sub(r"</?(box|ref)>", "", "\n".join(said[:2] if exam.kind == "ground" else said))
    return item.images[0], [b for b in boxes if b[0]], text, sample.RIGHT if right else sample.WRONG


def contact_sheet(path, exams, rows):
    """Wrong and right answers by turns of the sources, with the true box and the one that was named."""
    by_name, piles = {e.name: e for e in exams}, {False: defaultdict(list), True: defaultdict(list)}
    for r in rows:
        if r["truth"] or r["box"]:
            piles[is_right(r, by_name[r["source"]].kind)][r["source"]].append(r)
    chosen = {False: [], True: []}
    for right, sources in piles.items():  # sources in turn, each begun elsewhere: other pictures
        for n in range(SHEET):
            for i, pile in enumerate(sources.values()):
                if n < len(pile):
                    chosen[right].append(pile[(n + 7 * i) % len(pile)])
    wrong = chosen[False][: max(SHEET // 2, SHEET - len(chosen[True]))]
    cells = [cell(by_name[r["source"]], r) for r in wrong + chosen[True][: SHEET - len(wrong)]]
    if not any(cells):
        raise BadInput(f"--sheet {path}: there is no answer with a picture to draw")
    sample.sheet([c for c in cells if c], path)


# ---------------------------------------------------------------------------------------------------------------------
# Start to end
def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--ckpt",
        help="our directory, a LLaVA-1.5 folder or the released InfMLLM file; default: the newest of out/",
    )
    add(
        "--branch",
        help="which branch sees pictures: its folder, or the name of one that is there; none: the base",
    )
    add("--tokenizer", help="sentencepiece model, where the checkpoint brings none")
    add(
        "--data",
        help=f"mixture file, all of whose sources are evaluated; default {TOY}, drawn if it is not there",
    )
    add("--pope", help="a POPE file instead, with its pictures in --images")
    add("--images", help="folder of POPE's pictures")
    add("--mme", help="MME's folder instead")
    add(
        "--task",
        choices=list(TASKS),
        help="only the sources of this task; with --pope and --mme: vqa or chat",
    )
    add("--limit", type=int, help="at most so many samples of each source")
    add("--batch", type=int, default=8, help="samples decoded together by a rank; default 8")
    add("--beams", type=int, help="beams of the search; default: the task's own")
    add(
        "--min-new-tokens",
        type=int,
        help="shortest answer in tokens; default: the task's own (captions: 8)",
    )
    add("--max-new-tokens", type=int, help="longest answer in tokens; default: the task's own")
    add(
        "--protocol",
        choices=["vqav2", "infmllm", "textvqa"],
        default="vqav2",
        help="rules of VQA accuracy",
    )
    add("--out", help="folder of the predictions; default out/evaluate/CHECKPOINT-DATA")
    add("--sheet", help="picture to write: right and wrong answers, with true and predicted boxes")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    add("--device", help="cpu or cuda; default: what there is")
    add(
        "--dtype",
        choices=list(sample.DTYPES),
        help="of weights and compute; default bf16 on cuda, fp32 on cpu",
    )
    args = parser.parse_args(argv)
    for name in ("limit", "batch", "beams", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if sum(map(bool, (args.data, args.pope, args.mme))) > 1:
        raise BadInput("choose one of --data, --pope and --mme")
    elif not any((args.data, args.pope, args.mme)) and args.min_new_tokens is None:
        args.min_new_tokens = 0  # the toy's captions may be shorter than the released 8
    if (args.pope or args.mme) and args.task not in (None, "vqa", "chat"):
        raise BadInput(f"--task {args.task}: yes-or-no questions are asked as vqa or chat")
    if args.images and not args.pope:
        raise BadInput("--images belongs to --pope; a mixture names its own")
    return args


def claim(folder, this):
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


def wait(ranks):
    if ranks.world > 1:
        dist.barrier()


def examine(args):
    """Answers and scores: {source: [(metric, score, count)]} and their folder; only rank 0 gets them."""
    rank, world, device = setup_ranks(
        args.device, timeout=24 * 3600
    )  # ranks do not finish together
    ranks = SimpleNamespace(rank=rank, world=world)
    path = Path(args.ckpt) if args.ckpt else sample.newest()
    model, tokenizer = sample.load_model(path, args.tokenizer, device, args.dtype, args.branch)
    if not (args.data or args.pope or args.mme):
        args.data = TOY
        if rank == 0 and not Path(TOY).exists():
            import toy

            print("no --data: drawing the toy world in out/toy", file=sys.stderr)
            toy.write("out/toy")
        wait(ranks)
    exams = open_exams(args, model, tokenizer)
    what = args.data or args.pope or args.mme
    parts = (*path.parts[-2:], *Path(args.branch or "").parts[-2:], Path(what).stem)
    named = "-".join(part for part in parts if part.strip("./"))
    folder = Path(args.out or f"out/evaluate/{named}")
    adapter = model.front.fc2.weight.detach()
    weights = zlib.crc32(adapter.float().cpu().numpy().tobytes())
    claim(
        folder,
        {
            "weights": weights,
            "data": str(what),
            "dtype": str(adapter.dtype),
            "sources": {e.name: e.count for e in exams},
            "batch": args.batch,
            "beams": args.beams,
            "length": [args.min_new_tokens, args.max_new_tokens],
            "task": args.task,
        },
    )
    decode(exams, model, tokenizer, args, ranks, folder)
    wait(ranks)
    scores = report(args, exams, folder) if rank == 0 else None
    if world > 1:
        dist.destroy_process_group()
    return scores, folder


def report(args, exams, folder):
    """The ranks' answers in one file, scored, drawn, and as the test servers take them."""
    rows = merge(folder)
    by_source = {e.name: [r for r in rows if r["source"] == e.name] for e in exams}
    scores = {e.name: score(by_source[e.name], e.kind, args.protocol) for e in exams}
    for e in exams:
        if sent := submission(by_source[e.name], e.kind):
            (folder / f"{e.name}.submission.json").write_text(json.dumps(sent))
    (folder / "scores.json").write_text(json.dumps(table(scores), indent=2))
    if args.sheet:
        contact_sheet(args.sheet, exams, rows)
    return scores


def table(scores):
    """The scores as JSON; those of one type or subtask as `type right`, since a type may be called like a metric."""
    return {
        name: {
            metric.replace("  ", "type ", 1): {"score": value, "count": count}
            for metric, value, count in lines
        }
        for name, lines in scores.items()
    }


def main(argv=None):
    args = parse(argv)
    scores, folder = examine(args)
    if scores is None:
        return
    if args.json:
        print(json.dumps(table(scores)))
    else:
        show(scores)
        print(f"answers: {folder / 'predictions.jsonl'}")


if __name__ == "__main__":
    sys.exit(sample.run(main))
