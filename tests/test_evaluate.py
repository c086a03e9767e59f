"""evaluate.py: the same file from any number of ranks and after any interruption, scored once, shown to people."""

import json
import multiprocessing
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image

import evaluate
import sample
import support.start
from evaluate import score, submission
from support import drawing, metrics
from support.commands import run
from text import encode_turns
from text.templates import chat_turn, prompt
from text.tokenizer import Tokenizer

MIXTURE = """
[[source]]
name = "captions"
format = "coco-caption"
annotations = "captions.json"
images = "images"

[[source]]
name = "vqa"
format = "vqa"
annotations = "vqa.json"
images = "images"

[[source]]
name = "refs"
format = "refcoco"
annotations = "refs.json"
images = "images"

[[source]]
name = "regions"
format = "refcoco"
annotations = "refs.json"
images = "images"
task = "region"

[[source]]
name = "chat"
format = "conversations"
annotations = "chat.json"
images = "images"
"""
ONE = """
[[source]]
name = "one"
format = "refcoco"
annotations = "NAME.json"
images = "images"
"""
RIGHT, HALF = "<box>(0.10,0.20),(0.50,0.60)</box>", "<box>(0.10,0.20),(0.30,0.60)</box>"
# a record each: # is its number, and as often "very" is said
PICTURE = '{"id": #, "file_name": "#.png"}'
CAPTIONS = """
    {"id": 1#, "image_id": #, "caption": "a red square"}, {"id": 2#, "image_id": #, "caption": "circle #"}
"""
QUESTION = """
    {"image": "#.png", "question": "how very many?", "question_id": 70#, "answers": ["red"], "type": "count"}
"""
PHRASE = """
    {"img_name": "#.png", "bbox": [5, 3, 25, 27], "sentences": [{"sent": "the very red one", "sent_id": 50#}]}
"""
TALK = r"""
    {"image": "#.png", "types": ["colour", "ground"], "conversations": [
        {"from": "human", "value": "<image>\nwhat colour is it?"}, {"from": "gpt", "value": "It is red."},
        {"from": "human", "value": "where is it?"}, {"from": "gpt", "value": "<box>(0.10,0.20),(0.50,0.60)</box>"}
    ]}
"""
POPE = """
    {"image": "0.png", "text": "Is it 0?", "label": "yes"}
    {"image": "1.png", "text": "Is it 1?", "label": "no"}
""".strip()
TURNS = {"captions": 1, "chat": 2, "refs": 1, "regions": 1, "vqa": 1}  # of each of the seven
BATCHES = 4 * 4 + 7  # of two samples each, a conversation being two


def listed(record):
    """Seven of it, as JSON."""
    records = [record.replace("#", str(n)).replace("very ", "very " * n) for n in range(7)]
    return f"[{','.join(records)}]"


@pytest.fixture(scope="module")
def data(made, tmp_path_factory):
    """A checkpoint and a mixture with a source of every kind, all of it small and not square."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "ck").symlink_to(made / "ck")
    (folder / "images").mkdir()
    for n in range(7):
        small.noise((50, 30), n).save(folder / f"images/{n}.png")
    files = {
        "captions": f'{{"images": {listed(PICTURE)}, "annotations": {listed(CAPTIONS)}}}',
        "vqa": listed(QUESTION),
        "refs": listed(PHRASE),
        "chat": listed(TALK),
        "lost": listed(PHRASE.replace("#.png", "no-such-#.png")),
        "long": listed(PHRASE.replace("very ", "very " * 400)),
        "pope": POPE,
    }
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
        (folder / f"{name}.toml").write_text(ONE.replace("NAME", name))
    (folder / "all.toml").write_text(MIXTURE)
    return folder


@pytest.fixture
def inside(data, monkeypatch):
    monkeypatch.chdir(data)


ALL = "--data all.toml --batch 2 --max-new-tokens 8 --out "


def ask(line):
    evaluate.main(f"--ckpt ck --device cpu {line}".split())


def written(out):
    return (out / "predictions.jsonl").read_bytes(), (out / "scores.json").read_bytes()


@pytest.fixture(scope="module")
def whole(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data)
        ask(ALL + "whole")
    return written(data / "whole")


def rows_of(predictions):
    return [json.loads(line) for line in predictions.splitlines()]


def test_every_sample_is_answered_once_in_order_with_what_scoring_needs(data, whole):
    rows = rows_of(whole[0])
    places = [(name, n, turn) for name in TURNS for n in range(7) for turn in range(TURNS[name])]
    assert [evaluate.key(r) for r in rows] == places
    assert all(r["said"] for r in rows)
    first = {r["source"]: r for r in reversed(rows)}
    assert first["captions"]["truth"] == ["a red square", "circle 0"]
    assert (first["refs"]["box"], first["refs"]["size"]) == ([5, 3, 25, 27], [50, 30])
    talk = [(r["truth"], r["type"]) for r in rows[7:9]]
    assert talk == [(["It is red."], "colour"), ([RIGHT], "ground")]
    scores = json.loads(whole[1])
    for name, turns in TURNS.items():
        assert scores[name].pop("records") == {"asked": 7, "of": 7, "unreadable": 0}
        assert max(entry["count"] for entry in scores[name].values()) == 7 * turns
    sent = {
        "vqa": {"question_id": 700, "answer": first["vqa"]["said"]},
        "captions": {"image_id": 0, "caption": first["captions"]["said"]},
        "refs": {"img_name": "0.png", "sent_id": 500, "bbox": None},
    }
    for name, entry in sent.items():
        entries = json.loads((data / f"whole/{name}.submission.json").read_text())
        assert entries[0] == entry and len(entries) == 7


def test_answers_are_those_of_sample_py(inside, whole):
    rows = {evaluate.key(r): r for r in rows_of(whole[0])}
    model, tokenizer = support.start.load_model("ck", device="cpu")
    image = sample.open_image("images/3.png")

    def answer(asked, **settings):
        return sample.generate(model, tokenizer, [image], [asked], **settings)[0]

    for source, task in (("vqa", "vqa"), ("captions", "caption")):
        r = rows[source, 3, 0]
        assert r["said"] == answer(r["asked"], **sample.DECODING[task] | {"max_new_tokens": 8})
    past = prompt("chat", "what colour is it?"), "It is red."
    talk, _ = encode_turns(tokenizer, [past, (chat_turn("where is it?"), None)], 4)
    said = answer(talk, pad=True, max_new_tokens=8)
    assert rows["chat", 3, 1]["said"] == said, "the past is the true one"


def test_an_evaluation_killed_and_rerun_ends_with_the_same_file(
    inside, whole, tmp_path, monkeypatch
):
    answer = sample.generate
    calls = []

    def mortal(*args, **settings):
        calls.append(1)
        if len(calls) in (4, 9, 15):
            raise KeyboardInterrupt
        return answer(*args, **settings)

    monkeypatch.setattr(sample, "generate", mortal)
    for lost in (0, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            ask(f"{ALL} {tmp_path}")
        assert not (tmp_path / "predictions.jsonl").exists()
        file = tmp_path / "predictions.0.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        kept = b"".join(lines[: len(lines) - lost])
        file.write_bytes(kept[:-9])  # a batch is cut in its second line, or in its first
    file.rename(tmp_path / "predictions.1.jsonl")  # of another rank
    for _ in range(2):
        ask(f"{ALL} {tmp_path}")
        assert written(tmp_path) == whole
        assert len(calls) == BATCHES + 6, "what is whole is not asked twice"
        assert not list(tmp_path.glob("predictions.*.jsonl"))


def as_rank(rank, port, out):
    env = f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    os.environ.update(pair.split("=") for pair in env.split())
    ask(f"{ALL} {out} --json")


def test_two_ranks_share_the_work_and_write_what_one_does(
    inside, whole, tmp_path, monkeypatch, capfd
):
    answer = sample.generate
    calls = tmp_path / "calls"

    def counted(*args, **settings):
        with open(calls, "a") as file:
            file.write(os.environ["RANK"])
        return answer(*args, **settings)

    monkeypatch.setattr(sample, "generate", counted)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_rank, args=(n, port, tmp_path)) for n in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert written(tmp_path) == whole
    assert json.loads(capfd.readouterr().out) == json.loads(whole[1]), "only one of them speaks"
    answered = calls.read_text()
    assert len(answered) == BATCHES and 8 <= answered.count("1") <= 15


# ---- scores ----------------------------------------------------------------------------------------------------------


def row(said, truth=(), box=None, **more):
    known = {"said": said, "truth": list(truth), "box": box, "size": [200, 100], "type": None}
    return known | more


def test_scores_of_boxes_by_hand():
    boxes = [row(said, ["x"], [20, 20, 100, 60]) for said in (RIGHT, HALF, "no", "0.1,0.2 0.5,0.6")]
    boxes.append(row(HALF, ["x"], [20, 20, 101, 60]))  # just under a half
    assert score(boxes, "ground") == [
        ("Acc@0.5", 2 / 5, 5),
        ("mean IoU", pytest.approx((1 + 0.5 + 40 / 81) / 5), 5),
        ("Acc@0.5, released parser", 3 / 5, 5),
    ]
    [sent] = submission([row(RIGHT, img_name="a.png")], "ground")
    assert sent == {"img_name": "a.png", "sent_id": None, "bbox": [20, 20, 100, 60]}


def test_scores_of_answers_by_hand():
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
    assert score(vqa, "vqa", "gqa")[0] == ("exact (gqa)", pytest.approx(1 / 3), 3)
    assert score(vqa[3:], "vqa")[0][2] == 0, "a test split has no answers, and no score"


def test_scores_of_a_talk_by_hand_and_a_type_called_like_a_metric_hides_nothing():
    talk = [
        row("It is red", ["It is red."], type="right"),
        row("There: <box>(0.10,0.20),(0.40,0.60)</box>", [RIGHT], type="ground"),
        row("<box>(0.90,0.90),(0.95,0.95)</box>", [RIGHT], type="ground"),
    ]
    found = score(talk, "chat")
    assert found == [("right", pytest.approx(2 / 3), 3), ("  ground", 0.5, 2), ("  right", 1.0, 1)]
    exam = evaluate.Exam("chat", "chat", "chat", 3, None)
    [kept] = evaluate.table({"chat": found}, [exam], []).values()
    assert list(kept) == ["right", "type ground", "type right", "records"]


def test_scores_of_captions_by_hand():
    same = ["a red square, a dog and a small blue cross"]
    captions = [
        row("A small blue cross, a dog, and a red square.", same),
        row("a dog and a dog", ["a red cat", "a dog"]),
        row("a cat", ["a dog", "a cat"]),
    ]
    cider = metrics.cider(*evaluate.columns(captions, "said", "truth"))
    found = [("CIDEr-D", *metrics.mean(cider)), ("exact, any order", 2 / 3, 3)]
    assert score(captions, "caption") == found


# ---- benchmarks, the sheet, the command line -------------------------------------------------------------------------


def test_pope_and_mme_files_are_read_asked_and_scored(inside, tmp_path, capsys):
    shortly = "--max-new-tokens 4 --json"
    ask(f"--pope pope.json --images images --task chat --out {tmp_path}/p {shortly}")
    scores = json.loads(capsys.readouterr().out)["pope"]
    assert list(scores) == ["accuracy", "precision", "recall", "f1", "yes_ratio", "records"]
    assert scores["f1"]["count"] == 2
    first = rows_of((tmp_path / "p/predictions.jsonl").read_bytes())[0]
    assert "\nIs it 0?\nAnswer the question using a single word" in first["asked"]
    folder = tmp_path / "mme"
    for pictures, texts in (("color", "color"), ("posters/images", "posters/questions_answers_YN")):
        small.write(folder / pictures / "0.png", small.picture())
        small.write(folder / texts / "0.txt", "Is it red?\tYes\nIs it blue?\tNo\n")
    ask(f"--mme {folder} --out {tmp_path}/m {shortly}")
    scores = json.loads(capsys.readouterr().out)["mme"]
    counts = [scores[name]["count"] for name in ("perception", "type color", "type posters")]
    assert counts == [4, 2, 2]


def test_the_contact_sheet_shows_wrong_and_right_with_both_boxes(inside, tmp_path, monkeypatch):
    def half_right(model, tokenizer, images, tokens, *_, **__):
        return [RIGHT, HALF][: len(tokens)]

    monkeypatch.setattr(sample, "generate", half_right)
    ask(f"{ALL} {tmp_path} --task ground --sheet {tmp_path}/sheet.png")
    assert list(json.loads((tmp_path / "scores.json").read_text())) == ["refs"]
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    for colour in (drawing.RIGHT, drawing.WRONG, drawing.TRUE, drawing.NAMED):
        assert (abs(page - colour).sum(2) < 12).sum() > 300, colour


def test_no_picture_comes_twice_on_the_contact_sheet(inside, whole, tmp_path, monkeypatch):
    cells = []
    monkeypatch.setattr(drawing, "sheet", lambda shown, path: cells.extend(shown))
    ask(f"{ALL} whole --sheet {tmp_path}/sheet.png")
    assert len({image.tobytes() for image, *_ in cells}) == len(cells) == 7


def test_a_limit_takes_a_random_sample_that_is_always_the_same_and_says_of_how_many(
    inside, tmp_path, capsys
):
    numbers = []
    for name in ("one", "two"):
        ask(f"--data refs.toml --limit 3 --max-new-tokens 2 --out {tmp_path}/{name}")
        assert "one 3 of 7\n" in capsys.readouterr().out
        rows = rows_of((tmp_path / name / "predictions.jsonl").read_bytes())
        numbers.append([r["number"] for r in rows])
    assert numbers[0] == numbers[1] != [0, 1, 2]
    assert len(set(numbers[0])) == 3


def test_a_bad_picture_ends_only_itself_is_counted_and_named_and_asked_once_it_is_mended(
    data, tmp_path, capsys, monkeypatch
):
    shutil.copytree(data, tmp_path / "own", symlinks=True)
    monkeypatch.chdir(tmp_path / "own")
    Path("images/3.png").write_text("no picture")
    ask("--data refs.toml --max-new-tokens 2 --out o")
    said, complaint = capsys.readouterr()
    assert "one 7 of 7 (1 could not be read)" in said
    assert "1 samples could not be read: o/unreadable.txt" in complaint
    assert "3.png" in Path("o/unreadable.txt").read_text()
    assert '"count": 6' in Path("o/scores.json").read_text()
    shutil.copy("images/2.png", "images/3.png")
    ask("--data refs.toml --max-new-tokens 2 --out o")
    assert '"count": 6' not in Path("o/scores.json").read_text()
    assert not Path("o/unreadable.txt").exists()


def test_answers_to_questions_that_have_changed_are_not_taken_for_those_of_today(
    data, tmp_path, capsys, monkeypatch
):
    shutil.copytree(data, tmp_path / "own", symlinks=True)
    monkeypatch.chdir(tmp_path / "own")
    file = Path("refs.json")
    before = file.read_text()
    line = "--data refs.toml --max-new-tokens 2 --out o"
    ask(line)
    predictions = Path("o/predictions.jsonl").read_bytes()
    for old, new in (("very very red one", "very very tan one"), ("5, 3, 25, 27", "5, 3, 25, 28")):
        file.write_text(before[::-1].replace(old[::-1], new[::-1], 1)[::-1])  # in the last record
        assert run(lambda: ask(line)) == 2
        assert "o: holds answers to what one asked before it" in capsys.readouterr().err
    file.write_text(before)
    ask(line)
    assert Path("o/predictions.jsonl").read_bytes() == predictions


def test_without_a_terminal_its_progress_is_said_with_the_time_gone_and_to_go(
    inside, tmp_path, capsys
):
    ask(f"--data refs.toml --batch 1 --max-new-tokens 2 --out {tmp_path}")
    line = r"\d+% answered, \d\d:\d\d gone, \d\d:\d\d to go"
    assert len(re.findall(line, capsys.readouterr().err)) == 6, "after all but the last of seven"


def test_commands_to_a_terminal_in_an_answer_do_not_reach_the_files(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b[2Jred\x9b")
    ask(f"--data refs.toml --max-new-tokens 2 --out {tmp_path}")
    rows = rows_of((tmp_path / "predictions.jsonl").read_bytes())
    assert {r["said"] for r in rows} == {"\ufffd[2Jred\ufffd"}


def test_the_help_names_the_beams_and_token_limits_of_every_task(capsys):
    names = {"caption": "caption are", "vqa": "(vqa)", "ground": "(ground)", "region": "(region)"}
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for task, settings in sample.DECODING.items():
        limits = f"{settings.get('beams', 1)} and {settings['max_new_tokens']}"
        assert f"{names.get(task, task)} {limits}" in said
        assert "min_new_tokens" not in settings, "an answer may be as short as it likes"


@pytest.mark.parametrize(
    "line, names",
    [
        ("--limit 0", "--limit"),
        ("--batch 0", "--batch"),
        ("--batch 5000", "--batch"),
        ("--data refs.toml --sheet images/0.png", "images/0.png: belongs to what is read"),
        ("--pope pope.json --images images --sheet images/0.png", "belongs to what is read"),
        ("--data refs.toml --sheet s.nonsense", "s.nonsense"),
        ("--data nowhere.toml", "nowhere.toml"),
        ("--data all.toml --mme x", "not allowed with argument --data"),
        ("--data all.toml --ckpt images", "images"),
        ("--data refs.toml --task vqa", "--task vqa"),
        ("--data lost.toml", "no-such-0.png"),
        ("--pope nowhere.json", "nowhere.json"),
        ("--pope refs.json", "line 1"),
        ("--pope pope.json --images nowhere", "nowhere/0.png"),
        ("--mme images", "images"),
        ("--mme images --task ground", "--task"),
        ("--images images", "--pope"),
        (ALL + "whole --max-new-tokens 9", "max_new_tokens"),
        (ALL + "whole --limit 3", "limit"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(
    inside, whole, tmp_path, capsys, line, names
):
    code = run(lambda: ask(f"--out {tmp_path}/e --max-new-tokens 3 {line}"))
    err = capsys.readouterr().err
    assert code == 2 and names in err and err.count("\n") == 1, err
