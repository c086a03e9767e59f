"""evaluate.py: the same file from any number of ranks and after any interruption, scored once, shown to people."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import TOKENIZER, one_thread, tiny  # noqa: F401  (one_thread is a fixture)
from test_sample import whole as without_cache

import evaluate
import sample
import support.commands
import support.drawing
import support.metrics
import support.start
import weights
from evaluate import is_right, parts, score, submission
from support.ranks import Ranks
from text import Tokenizer
from text.boxes import parse_box

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"captions": 7, "vqa": 11, "refs": 9, "regions": 5, "chat": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint and a mixture with a source of every kind, all of it small and not square."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    weights.save(folder / "ck", tiny(), Tokenizer(TOKENIZER))
    (folder / "images").mkdir()
    for n in range(12):
        Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(
            folder / f"images/{n}.png"
        )

    def write(name, what):
        return (folder / f"{name}.json").write_text(json.dumps(what))

    write(
        "captions",
        {
            "images": [{"id": n, "file_name": f"{n}.png"} for n in range(7)],
            "annotations": [
                {"id": n, "image_id": n % 7, "caption": f"a red square and a circle number {n}"}
                for n in range(14)
            ],
        },
    )
    kinds = ["colour", "count"]
    write(
        "vqa",
        [
            {
                "image": f"{n}.png",
                "question": f"how {'many ' * n}?",
                "answers": ["red"] * 10,
                "question_id": 70 + n,
                "type": kinds[n % 2],
            }
            for n in range(11)
        ],
    )

    def refs(count):
        return [
            {
                "img_name": f"{n}.png",
                "bbox": [5, 3, 25, 27],
                "segment_id": n,
                "sentences": [{"sent": f"the {'very ' * n} red one", "sent_id": 500 + n}],
            }
            for n in range(count)
        ]

    write("refs", refs(9))
    write("regions", refs(5))
    write(
        "chat",
        [
            {
                "id": str(n),
                "image": f"{n}.png",
                "types": ["colour", "ground"],
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat colour is it?"},
                    {"from": "gpt", "value": "It is red."},
                    {"from": "human", "value": "where is it?"},
                    {"from": "gpt", "value": "<box>(0.10,0.10),(0.50,0.90)</box>"},
                ],
            }
            for n in range(6)
        ],
    )
    formats = {
        "captions": "coco-caption",
        "vqa": "vqa",
        "refs": "refcoco",
        "regions": "refcoco",
        "chat": "conversations",
    }
    (folder / "all.toml").write_text(
        "".join(
            f'[[source]]\nname = "{name}"\nformat = "{kind}"\nannotations = "{name}.json"\nimages = "images"\n'
            + ('task = "region"\n' if name == "regions" else "")
            for name, kind in formats.items()
        )
    )
    return folder


def run(world, out, *more):
    evaluate.main(
        [
            "--ckpt",
            str(world / "ck"),
            "--data",
            str(world / "all.toml"),
            "--device",
            "cpu",
            "--batch",
            "2",
            "--max-new-tokens",
            "8",
            "--out",
            str(out),
            *map(str, more),
        ]
    )
    return (out / "predictions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(world):
    torch.set_num_threads(1)
    return run(world, world / "whole"), (world / "whole/scores.json").read_bytes()


def test_every_sample_is_answered_once_in_order_with_what_scoring_needs(whole):
    rows = [json.loads(line) for line in whole[0].splitlines()]
    assert [evaluate.key(r) for r in rows] == sorted(
        (name, n, turn)
        for name, count in COUNTS.items()
        for n in range(count)
        for turn in range(1 + (name == "chat"))
    )
    assert all(r["said"] for r in rows)

    def of(name):
        return next(r for r in rows if r["source"] == name)

    assert len(of("captions")["truth"]) == 2 and of("captions")["image_id"] == 0
    assert (
        of("refs")["box"] == [5, 3, 25, 27]
        and of("refs")["size"] == [50, 30]
        and of("refs")["sent_id"] == 500
    )
    assert of("chat")["truth"] == ["It is red."] and of("chat")["type"] == "colour"
    scores = json.loads(whole[1])
    assert {
        name: next(iter(table.values()))["count"] for name, table in scores.items()
    } == COUNTS | {"chat": 12}
    assert set(scores["vqa"]) == {"accuracy (vqav2)", "exact", "type colour", "type count"}


def test_answers_are_those_of_sample_py(world, whole):
    rows = [json.loads(line) for line in whole[0].splitlines()]
    model, tokenizer = support.start.load_model(world / "ck", device="cpu")
    for source, kind in (("vqa", "vqa"), ("refs", "ground"), ("captions", "caption")):
        r = next(r for r in rows if r["source"] == source and r["number"] == 3)
        image = sample.open_image(world / "images/3.png")
        settings = sample.DECODING[kind] | {"max_new_tokens": 8}
        assert sample.generate(model, tokenizer, [image], [r["asked"]], **settings) == [r["said"]]
    r = next(r for r in rows if (r["source"], r["number"], r["turn"]) == ("chat", 3, 1))
    past = [("what colour is it?", tokenizer.encode("It is red.")), ("where is it?", None)]
    assert tokenizer.decode(without_cache(model, tokenizer, image, past, 8)) == r["said"], (
        "the past is the true one"
    )


def test_ranks_share_the_work_in_whole_batches(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sample, "generate", lambda model, tokenizer, images, *_, **__: ["x"] * len(images)
    )
    model, tokenizer = support.start.load_model(world / "ck", device="cpu")
    exams, seen = evaluate.open_exams(model, tokenizer, world / "all.toml"), []
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        ranks = Ranks(rank, 2, torch.device("cpu"))
        evaluate.answer_exams(exams, model, tokenizer, tmp_path / f"{rank}", 1, {}, ranks)
        seen.append({evaluate.key(r) for r in evaluate.read_rows(tmp_path / f"{rank}")})
    assert (
        min(map(len, seen)) > 8
        and not seen[0] & seen[1]
        and len(seen[0] | seen[1]) == sum(COUNTS.values()) + 6
    )


def test_an_evaluation_killed_and_rerun_ends_with_the_same_file(
    world, whole, tmp_path, monkeypatch
):
    answer, calls = sample.generate, []

    def mortal(*args, **settings):
        calls.append(1)
        if len(calls) in (4, 9, 15):
            raise KeyboardInterrupt
        return answer(*args, **settings)

    monkeypatch.setattr(sample, "generate", mortal)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "e")
        assert not (tmp_path / "e/predictions.jsonl").exists()
        with open(tmp_path / "e/predictions.0.jsonl", "ab") as f:
            f.write(b'{"source": "vqa", "num')  # cut in half
    assert (
        run(world, tmp_path / "e") == whole[0]
        and (tmp_path / "e/scores.json").read_bytes() == whole[1]
    )
    batches = len(calls) - 3
    assert run(world, tmp_path / "e") == whole[0] and len(calls) == batches + 3, (
        "nothing is asked twice"
    )
    calls[:] = [0] * 20
    assert run(world, tmp_path / "f") == whole[0] and len(calls) - 20 == batches
    assert not list((tmp_path / "e").glob("predictions.*.jsonl"))


def test_two_ranks_score_to_the_last_digit_what_one_does(world, whole, tmp_path):
    """Two processes for real; then two that were stopped, finished by one."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "evaluate.py"),
        "--ckpt",
        str(world / "ck"),
        "--data",
        str(world / "all.toml"),
        "--device",
        "cpu",
        "--batch",
        "2",
        "--max-new-tokens",
        "8",
        "--out",
        str(tmp_path / "two"),
        "--json",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two/predictions.jsonl").read_bytes() == whole[0]
    assert (tmp_path / "two/scores.json").read_bytes() == whole[1]
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(whole[1])
    lines = whole[0].splitlines(keepends=True)
    (tmp_path / "two/predictions.jsonl").unlink()
    (tmp_path / "two/predictions.0.jsonl").write_bytes(b"".join(lines[:9]))
    (tmp_path / "two/predictions.1.jsonl").write_bytes(b"".join(lines[20:31])[:-7])
    assert run(world, tmp_path / "two") == whole[0]


def test_another_evaluation_does_not_mix_into_a_folder(world, whole, capsys):
    argv = [
        "--ckpt",
        str(world / "ck"),
        "--data",
        str(world / "all.toml"),
        "--device",
        "cpu",
        "--batch",
        "2",
    ]
    for more, names in (
        (["--max-new-tokens", "9"], "max_new_tokens"),
        (["--max-new-tokens", "8", "--limit", "3"], "sources"),
        (["--max-new-tokens", "8", "--beams", "2"], "beams"),
    ):
        code = support.commands.run(
            lambda more=more: evaluate.main([*argv, *more, "--out", str(world / "whole")])
        )
        err = capsys.readouterr().err
        assert code == 2 and names in err and err.count("\n") == 1


def row(said, truth=(), box=None, **more):
    return {
        "source": "s",
        "number": 0,
        "turn": 0,
        "asked": "",
        "said": said,
        "truth": list(truth),
        "box": box,
        "size": [200, 100],
        "type": None,
    } | more


def test_scores_by_hand():
    right, half = "<box>(0.10,0.20),(0.50,0.60)</box>", "<box>(0.10,0.20),(0.30,0.60)</box>"
    boxes = [row(said, ["x"], [20, 20, 100, 60]) for said in (right, half, "no", "0.1,0.2 0.5,0.6")]
    assert score(boxes, "ground") == [
        ("Acc@0.5", 0.5, 4),
        ("mean IoU", pytest.approx((1 + 0.5) / 4), 4),
        ("Acc@0.5, released parser", 0.75, 4),
    ]
    vqa = [
        row("Red", ["red"] * 10, type="colour"),
        row("2", ["two"] * 9 + ["three"], type="count"),
        row("7", ["two"] * 10, type="count"),
        row("anything"),
    ]
    assert score(vqa, "vqa") == [
        ("accuracy (vqav2)", pytest.approx(1 / 3), 3),
        ("exact", pytest.approx(1 / 3), 3),
        ("  colour", 0.0, 1),
        ("  count", 0.5, 2),
    ]
    assert score(vqa, "vqa", "infmllm")[0] == ("accuracy (infmllm)", pytest.approx(2 / 3), 3)
    talk = [
        row("It is red", ["It is red."], type="colour"),
        row("There: <box>(0.10,0.20),(0.40,0.60)</box>", [right], type="ground"),
        row("<box>(0.90,0.90),(0.95,0.95)</box>", [right], type="ground"),
    ]
    assert score(talk, "chat") == [
        ("right", pytest.approx(2 / 3), 3),
        ("  colour", 1.0, 1),
        ("  ground", 0.5, 2),
    ]
    captions = [
        row("a small blue cross and a red square", ["a red square and a small blue cross"]),
        row("a dog", ["a red cat", "a dog on a mat"]),
    ]
    cider, same = score(captions, "caption")
    said, truth = ([r[name] for r in captions] for name in ("said", "truth"))
    assert cider == ("CIDEr-D", *support.metrics.mean(support.metrics.cider(said, truth)))
    assert same == ("exact, any order", 0.5, 2)
    assert score([row("x")], "vqa")[0][2] == 0, "a test split has no answers, and no score"


def test_half_an_overlap_is_a_hit_and_no_box_is_a_miss_that_counts():
    halves = "<box>(0.00,0.00),(0.02,0.01)</box>"  # of 200 x 100 pixels: 4 x 1
    boxes = [row(halves, box=[0, 0, wide, 1]) for wide in (2, 1.99, 4)] + [
        row("no", box=[0, 0, 4, 1])
    ]
    hits, overlap, _ = score(boxes, "ground")
    assert hits == ("Acc@0.5", 2 / 4, 4)
    assert overlap == ("mean IoU", pytest.approx((0.5 + 1.99 / 4 + 1 + 0) / 4), 4)


def test_the_same_things_in_any_order_are_the_same():
    assert (
        parts("A cross, a dog and a cat.")
        == parts("a cat, a cross and a dog")
        != parts("a cat and a dog")
    )
    assert parts("a dog and a dog") != parts("a dog"), "how many counts"
    assert parts("a dog, a cat, and a cross") == parts("a cross, a cat and a dog")


def test_submission_files_are_what_the_servers_take(world, whole):
    def read(name):
        return json.loads((world / f"whole/{name}.submission.json").read_text())

    assert [sorted(e) for e in read("vqa")] == [["answer", "question_id"]] * 11 and read("vqa")[3][
        "question_id"
    ] == 73
    assert [sorted(e) for e in read("captions")] == [["caption", "image_id"]] * 7
    assert [e["sent_id"] for e in read("refs")] == list(range(500, 509))
    assert submission([row("<box>(0.10,0.20),(0.50,0.60)</box>", img_name="a.png")], "ground") == [
        {"img_name": "a.png", "sent_id": None, "bbox": [20.0, 20.0, 100.0, 60.0]}
    ]


def test_pope_and_mme_files_are_read_asked_and_scored(world, tmp_path, capsys):
    pope = [
        {
            "question_id": n,
            "image": f"{n}.png",
            "text": f"Is there a dog number {n}?",
            "label": ["yes", "no"][n % 2],
        }
        for n in range(5)
    ]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, pope)))
    common = ["--ckpt", str(world / "ck"), "--device", "cpu", "--max-new-tokens", "4", "--json"]
    evaluate.main(
        [
            *common,
            "--pope",
            str(tmp_path / "pope.json"),
            "--images",
            str(world / "images"),
            "--task",
            "chat",
            "--out",
            str(tmp_path / "p"),
        ]
    )
    scores = json.loads(capsys.readouterr().out)["pope"]
    assert scores["f1"]["count"] == 5 and set(scores) == {
        "accuracy",
        "precision",
        "recall",
        "f1",
        "yes_ratio",
    }
    asked = json.loads((tmp_path / "p/predictions.jsonl").read_text().splitlines()[0])["asked"]
    assert asked.endswith(
        "USER: <image><ImageHere>\nIs there a dog number 0?\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    picture = (world / "images/0.png").read_bytes()
    for subtask, places in (
        ("color", ("color", "color")),
        ("posters", ("posters/images", "posters/questions_answers_YN")),
    ):
        for folder in places:
            (tmp_path / "mme" / folder).mkdir(parents=True, exist_ok=True)
        for n in range(2):
            (tmp_path / "mme" / places[0] / f"{n}.png").write_bytes(picture)
            (tmp_path / "mme" / places[1] / f"{n}.txt").write_text(
                f"Is this red {subtask}? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
            )
    evaluate.main([*common, "--mme", str(tmp_path / "mme"), "--out", str(tmp_path / "m")])
    scores = json.loads(capsys.readouterr().out)["mme"]
    assert (
        scores["perception"]["count"] == 8
        and scores["type color"]["count"] == scores["type posters"]["count"] == 4
    )


def test_the_contact_sheet_shows_wrong_and_right_with_both_boxes(world, tmp_path, monkeypatch):
    def half_right(model, tokenizer, images, tokens, pad, **_):
        text = [tokenizer.decode([i for i in ids if i >= 0]) for ids in tokens]
        return [
            "<box>(0.10,0.10),(0.50,0.90)</box>"
            if t.count("very") % 2
            else "<box>(0.60,0.10),(0.90,0.90)</box>"
            for t in text
        ]

    monkeypatch.setattr(sample, "generate", half_right)
    run(world, tmp_path / "e", "--task", "ground", "--sheet", tmp_path / "sheet.png")
    assert [e for e in json.loads((tmp_path / "e/scores.json").read_text())] == ["refs"]
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert page.shape[1] == support.drawing.COLUMNS * (support.drawing.CELL + 8) + 8
    for colour in (
        support.drawing.RIGHT,
        support.drawing.WRONG,
        support.drawing.TRUE,
        support.drawing.NAMED,
    ):
        assert (abs(page - colour).sum(2) < 12).sum() > 300, colour
    rows = [
        json.loads(line) for line in (tmp_path / "e/predictions.jsonl").read_text().splitlines()
    ]
    assert [is_right(r, "ground") for r in rows] == [bool(n % 2) for n in range(9)] and parse_box(
        rows[0]["said"]
    )


WRONG = [
    (["--limit", "0"], "--limit"),
    (["--batch", "0"], "--batch"),
    (["--data", "nowhere.toml"], "nowhere.toml"),
    (["--data", "all.toml", "--mme", "x"], "not allowed with argument --data"),
    (["--data", "all.toml", "--ckpt", "images"], "images"),
    (["--data", "refs.json"], "refs.json"),
    (["--pope", "nowhere.json"], "nowhere.json"),
    (["--pope", "refs.json"], "line 1"),
    (["--mme", "images"], "images"),
    (["--images", "images"], "--pope"),
    (["--mme", "images", "--task", "ground"], "--task"),
    (["--data", "onlyrefs.toml", "--task", "vqa"], "--task vqa"),
    (["--data", "lost.toml"], "no-such.png"),
    (["--data", "long.toml"], "tokens"),
]


@pytest.mark.parametrize(
    "argv, names", WRONG, ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else ""
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(
    world, tmp_path, capsys, monkeypatch, argv, names
):
    monkeypatch.chdir(world)
    refs = '[[source]]\nname = "r"\nformat = "refcoco"\nannotations = "{}"\nimages = "images"\n'
    (world / "onlyrefs.toml").write_text(refs.format("refs.json"))
    record = {
        "img_name": "0.png",
        "bbox": [1, 1, 9, 9],
        "sentences": [{"sent": "it", "sent_id": 0}],
    }
    for name, change in (
        ("lost", {"img_name": "no-such.png"}),
        ("long", {"sentences": [{"sent": "very " * 400, "sent_id": 0}]}),
    ):
        (world / f"{name}.json").write_text(json.dumps([record, record | change]))
        (world / f"{name}.toml").write_text(refs.format(f"{name}.json"))
    argv = (["--ckpt", "ck"] if "--ckpt" not in argv else []) + argv
    argv += ["--device", "cpu", "--max-new-tokens", "3", "--out", str(tmp_path / "e")]
    code = support.commands.run(lambda: evaluate.main(argv))
    err = capsys.readouterr().err
    assert code == 2 and names in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_a_type_of_question_that_is_called_like_a_metric_does_not_hide_it():
    found = evaluate.table({"chat": [("right", 0.5, 4), ("  right", 1.0, 2)]})["chat"]
    assert found == {"right": {"score": 0.5, "count": 4}, "type right": {"score": 1.0, "count": 2}}
