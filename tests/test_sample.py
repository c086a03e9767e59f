"""sample.py as people use it: strings in and out, the chat, the command line, the drawings."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from test_weights import released

import sample
import support.drawing
import support.start
import weights
from model import Config, InfMLLM, LlamaConfig, ViTConfig, init
from support.commands import run
from support.errors import BadInput
from text import Tokenizer, encode_prompt
from text.templates import MARK, SYSTEM, prompt

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets/toy/tokenizer.model"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny():
    """A model with clear opinions."""
    llm = LlamaConfig(Tokenizer(TOKENIZER).size, 32, 2, 2, 1, 48, context=300)
    model = init(InfMLLM(Config(ViTConfig(32, 8, 16, 2, 2, 32), llm, grid=2))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(12)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint and pictures: one wide, one tall, one small."""
    folder = tmp_path_factory.mktemp("sample")
    weights.save(folder / "ck", tiny(), Tokenizer(TOKENIZER))
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, (w, h) in {"wide": (90, 40), "tall": (40, 90), "small": (24, 24)}.items():
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(
            folder / f"photos/{name}.png"
        )
    (folder / "photos/notes.txt").write_text("no picture")
    (folder / "broken.png").write_text("no picture either")
    return folder


@pytest.fixture(scope="module")
def loaded(made):
    return support.start.load_model(made / "ck", device="cpu")


def command(capsys, *argv):
    """(exit code, what was printed, what was complained about) of sample.py in this process."""
    code = run(lambda: sample.main([str(a) for a in argv]))
    out, err = capsys.readouterr()
    return code, out, err


def test_strings_in_and_out_are_the_ids_of_generate_ids(loaded, made):
    model, tokenizer = loaded
    one, two = (Image.open(made / f"photos/{n}.png").convert("RGB") for n in ("wide", "tall"))
    texts = [
        prompt("vqa", "what is it?"),
        "no picture here",
        prompt("caption"),
        "<ImageHere> and <ImageHere>",
    ]
    said = sample.generate(model, tokenizer, [one, None, one, [two, one]], texts, max_new_tokens=9)
    pixels = torch.stack([sample.square(im, 32) for im in (one, one, two, one)])
    tokens = [encode_prompt(tokenizer, text, 4) for text in texts]
    ids = sample.generate_ids(model, pixels, tokens, max_new_tokens=9, eos=tokenizer.eos)
    assert said == [tokenizer.decode(row) for row in ids] and len(set(said)) == 4
    padded = sample.generate(model, tokenizer, [one], texts[:1], pad=True, max_new_tokens=9)
    assert padded != said[:1], "a padded picture is another picture"
    with pytest.raises(BadInput, match="300"):
        sample.generate(model, tokenizer, [None], ["long " * 300])


def whole(model, tokenizer, image, turns, n):
    """The answer to the last question, computed without a cache from turn to turn."""
    ids = encode_prompt(
        tokenizer, SYSTEM + f"USER: <image><ImageHere>\n{turns[0][0]} ASSISTANT:", 4
    )
    for (_, said), (question, _) in zip(turns, turns[1:]):
        ids += (
            said
            + [tokenizer.eos]
            + encode_prompt(tokenizer, f"USER: {question} ASSISTANT:", 4, bos=False)
        )
    return sample.generate_ids(
        model, sample.square(image, 32, pad=True)[None], [ids], max_new_tokens=n, eos=tokenizer.eos
    )[0]


def test_a_chat_with_its_cache_says_what_one_without_says(loaded, made, monkeypatch):
    model, tokenizer = loaded
    image, fed = sample.open_image(made / "photos/wide.png"), []
    forward = model.llm.forward
    monkeypatch.setattr(
        model.llm, "forward", lambda x, *a: fed.append(x.shape[1]) or forward(x, *a)
    )
    talk, turns = sample.Chat(model, tokenizer, image), []
    for question in ("what is it?", "and where?", "thank you"):
        fed.clear()
        text = "".join(talk.ask(question, max_new_tokens=12))
        asked = len(encode_prompt(tokenizer, f"USER: {question} ASSISTANT:", 4, bos=False))
        assert not turns or fed[0] <= asked + 2, (
            "a turn computes what is new: the last token, the eos, the question"
        )
        turns.append((question, None))
        said = whole(model, tokenizer, image, turns, 12)
        assert text == tokenizer.decode(said) and talk.ids[len(talk.ids) - len(said) :] == said
        turns[-1] = (question, said)


def test_an_answer_that_is_cut_short_is_what_the_next_turn_remembers(loaded, made):
    model, tokenizer = loaded
    image = sample.open_image(made / "photos/tall.png")
    talk = sample.Chat(model, tokenizer, image)
    answer = talk.ask("what is it?", max_new_tokens=30)
    next(answer)
    next(answer)
    answer.close()
    prompt_ids = encode_prompt(
        tokenizer, SYSTEM + "USER: <image><ImageHere>\nwhat is it? ASSISTANT:", 4
    )
    cut = talk.ids[len(prompt_ids) :]
    assert 2 <= len(cut) < 30
    text = "".join(talk.ask("and where?", max_new_tokens=10))
    assert text == tokenizer.decode(
        whole(model, tokenizer, image, [("what is it?", cut), ("and where?", None)], 10)
    )
    talk.start(image)
    again = "".join(talk.ask("what is it?", max_new_tokens=30))
    assert again.startswith(tokenizer.decode(cut).rstrip("\ufffd")), "a reset forgets all of it"


def test_a_chat_fills_its_context_and_says_so(loaded):
    talk = sample.Chat(*loaded)
    said = "".join(talk.ask("tell me everything", max_new_tokens=1024))
    assert said and len(talk.ids) <= 300
    if len(talk.ids) < 300:
        talk.ids += [5] * (299 - len(talk.ids))
    with pytest.raises(BadInput, match="context is 300"):
        next(talk.ask("go on"))


def test_the_chat_of_the_command_line_takes_its_commands(made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setattr(
        sample.Chat,
        "ask",
        lambda self, line, **_: iter(
            ["it is at ", "<box>(0.10,0.20),(0.50,0.90)</box>"] if self.image else ["blind"]
        ),
    )
    lines = [
        "hello",
        f"/image {made / 'photos/wide.png'}",
        "/box on",
        "where?",
        "/box off",
        "where?",
        "/nonsense",
        "/image nowhere.png",
        "/image " + "far " * 99 + "away.png",
        "/image broken.png",
        "",
        "  ",
        "/reset",
        "<ImageHere>",
        "/box on",
        "where?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = command(capsys, "--ckpt", made / "ck", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith("blind\n") and out.count("it is at <box>") == 3
    assert out.count("[box.png: the box in pixels is [9.0, 8.0, 45.0, 36.0]]") == 2
    for hint in (
        "the commands are",
        "nowhere.png: no such image",
        "away.png: no such image",
        "cannot be read as an image",
        "reserved mark",
    ):
        assert out.count(hint) == 1, hint
    assert Image.open("box.png").size[1] == 448


def test_ctrl_c_ends_the_answer_and_not_the_talk(made, capsys, monkeypatch):
    def interrupted(self, line, **_):
        yield "half an "
        if line == "one":
            os.kill(os.getpid(), signal.SIGINT)
            yield "word"
        yield "answer"

    monkeypatch.setattr(sample.Chat, "ask", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    code, out, err = command(capsys, "--ckpt", made / "ck", "--device", "cpu")
    assert (code, out, err) == (0, "half an word ...\nhalf an answer\n\n", "")


def test_a_closed_pipe_and_no_terminal_end_in_peace(made):
    p = subprocess.Popen(
        [sys.executable, ROOT / "sample.py", "--ckpt", made / "ck", "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    p.stdin.write(b"hello\n" * 3)
    p.stdin.flush()
    p.stdout.read(1)
    p.stdout.close()
    p.stdin.close()
    assert p.wait(60) == 0 and p.stderr.read() == b""


TASKS = [
    ("caption", None),
    ("vqa", "what is it?"),
    ("ground", "the dog"),
    ("region", "0.1,0.2,0.6,.7"),
    ("chat", "hello"),
]


@pytest.mark.parametrize("task, text", TASKS)
def test_every_task_answers_on_a_picture_and_on_a_folder(made, capsys, tmp_path, task, text):
    argv = ["--ckpt", made / "ck", "--device", "cpu", "--task", task, "--max-new-tokens", 6]
    argv += ["--prompt", text] if text else []
    code, out, err = command(
        capsys, *argv, "--image", made / "photos/wide.png", "--json", "--save", tmp_path / "a.png"
    )
    answer = json.loads(out)
    assert (code, err) == (0, "") and set(answer) == {
        "image",
        "task",
        "prompt",
        "answer",
        "box",
        "pixels",
    }
    assert (
        answer["task"] == task
        and answer["prompt"] == text
        and answer["answer"]
        and Image.open(tmp_path / "a.png")
    )
    if task == "region":  # the box that was asked about is drawn
        drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
        (h, w), box = drawn.shape[:2], [float(v) for v in text.split(",")]
        assert (
            drawn[round((box[1] + box[3]) / 2 * h), round(box[0] * w) - 1] == support.drawing.NAMED
        ).all()
    code, out, err = command(
        capsys, *argv, "--image", made / "photos", "--save", tmp_path / "b.png"
    )
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3) and [
        Path(line.split(": ")[0]).stem for line in lines
    ] == ["small", "tall", "wide"]
    assert Image.open(tmp_path / "b.png").width == 3 * (support.drawing.CELL + 8) + 8
    if task in ("caption", "ground"):
        alone = command(capsys, *argv, "--image", made / "photos/wide.png")[1]
        assert lines[2].endswith(alone.strip()), "a folder gives what each picture gives alone"


def test_sampling_is_repeatable_by_seed(made, capsys):
    argv = [
        "--ckpt",
        made / "ck",
        "--device",
        "cpu",
        "--image",
        made / "photos/wide.png",
        "--prompt",
        "hello",
        "--max-new-tokens",
        12,
        "--temperature",
        9,
        "--top-p",
        0.9,
        "--top-k",
        200,
    ]
    said = [command(capsys, *argv, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


WRONG = [
    (["--image", "nowhere.png"], "nowhere.png"),
    (["--image", "broken.png"], "broken.png"),
    (["--image", "photos", "--task", "vqa", "--prompt", " "], "--prompt"),
    (["--image", "photos/wide.png", "--task", "vqa"], "--prompt"),
    (["--image", "photos/wide.png", "--task", "chat", "--prompt", ""], "--prompt"),
    (["--image", "photos/wide.png", "--task", "vqa", "--prompt", "a <ImageHere> b"], "<ImageHere>"),
    (["--image", "photos/wide.png", "--prompt", "word " * 400], "context"),
    (["--image", "photos/wide.png", "--task", "caption", "--prompt", "x"], "--prompt"),
    (["--image", "photos/wide.png", "--task", "region", "--prompt", "here"], "x1,y1,x2,y2"),
    (["--image", "photos/wide.png", "--task", "region", "--prompt", "0.5,0.5,0.1,0.1"], "x1"),
    (["--image", "photos/wide.png", "--task", "region", "--prompt", "1,2,3,4"], "x1"),
    (["--task", "vqa", "--prompt", "x"], "--image"),
    (["--image", "photos"], "name a file"),
    (["--image", "photos/wide.png", "--json"], "--json"),
    (["--save", "x.png"], "--save"),
    (["--image", "photos/wide.png", "--beams", "3"], "--beams"),
    (["--image", "photos/wide.png", "--prompt", "x", "--beams", "0"], "--beams"),
    (
        ["--image", "photos/wide.png", "--prompt", "x", "--beams", "3", "--temperature", "1"],
        "choose one",
    ),
    (["--image", "photos/wide.png", "--prompt", "x", "--temperature", "-1"], "--temperature"),
    (["--image", "photos/wide.png", "--prompt", "x", "--temperature", "nan"], "--temperature"),
    (["--image", "photos/wide.png", "--prompt", "x", "--top-p", "0.5"], "--temperature"),
    (
        ["--image", "photos/wide.png", "--prompt", "x", "--temperature", "1", "--top-p", "0"],
        "--top-p",
    ),
    (["--image", "photos/wide.png", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
    (
        [
            "--image",
            "photos/wide.png",
            "--prompt",
            "x",
            "--max-new-tokens",
            "3",
            "--save",
            "no/such/x.png",
        ],
        "x.png",
    ),
    (
        [
            "--image",
            "photos/wide.png",
            "--prompt",
            "x",
            "--max-new-tokens",
            "3",
            "--save",
            "x.nonsense",
        ],
        "x.nonsense",
    ),
    (["--image", "ck", "--task", "caption"], "no picture"),
    (["--ckpt", "photos"], "photos"),
    (["--ckpt", "broken.png"], "broken.png"),
    (["--ckpt", "nowhere"], "nowhere"),
    (["--tokenizer", "broken.png"], "broken.png"),
]


@pytest.mark.parametrize(
    "argv, names", WRONG, ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else ""
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(made, capsys, monkeypatch, argv, names):
    monkeypatch.chdir(made)
    if "--ckpt" not in argv:
        argv = ["--ckpt", "ck", *argv]
    code, out, err = command(capsys, *argv, "--device", "cpu")
    assert code == 2 and names in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert out == "", "said before any work is done"


def test_without_a_checkpoint_it_takes_the_newest_or_says_what_makes_one(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, "--prompt", "x")
    assert code == 2 and "python train.py --stage all" in err
    (tmp_path / "out/stage3").mkdir(parents=True)  # a run that has saved nothing yet
    for name, age in (
        ("stage1/step-00000100", 5),
        ("stage2/step-00000002", 9),
        ("stage1/step-00000020", 1),
    ):
        weights.save(tmp_path / "out" / name, tiny(), Tokenizer(TOKENIZER))
        os.utime(tmp_path / "out" / name / "config.json", (age, age))
    assert str(support.start.newest()) == "out/stage2/step-00000002"
    named, _ = support.start.load_model(
        "out/stage1/step-00000020/model.safetensors", device="cpu"
    )  # as some name it
    assert torch.equal(named.llm.embed.weight, tiny().llm.embed.weight)


def test_it_opens_a_llava_folder_and_the_released_file(tmp_path, monkeypatch):
    folder = oracle.folder(oracle.llava(vocab_size=700), tmp_path / "llava")
    with pytest.raises(BadInput, match="no tokenizer.model; name LLaMA's with --tokenizer"):
        support.start.load_model(folder, device="cpu")
    model, _ = support.start.load_model(folder, TOKENIZER, device="cpu")
    assert model.config.adapter == "mlp" and model.config.image_mark == "<ImageHere>"
    args = sample.parse(["--image", str(ROOT), "--task", "vqa", "--prompt", "What?"])
    asked = sample.question(args).replace(MARK, model.config.image_mark)
    assert asked == "<ImageHere>Question:what? Short answer:"
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    assert support.start.load_model(folder, device="cpu")[1].size == Tokenizer(TOKENIZER).size
    with pytest.raises(BadInput, match="pieces, more than the 104"):
        support.start.load_model(
            oracle.folder(oracle.llava(), tmp_path / "other"), TOKENIZER, device="cpu"
        )

    ours = tiny()
    torch.save(released(ours), tmp_path / "InfMLLM.bin")
    monkeypatch.setattr(support.start.models, "PRESETS", {"infmllm-7b": lambda: ours.config})
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    model, tokenizer = support.start.load_model(tmp_path / "InfMLLM.bin", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))


@pytest.mark.parametrize("ground", ["black", "white", "gold", "noise"])
def test_a_drawn_box_is_where_it_was_named_and_its_label_is_read_on_any_ground(ground):
    image = Image.new("RGB", (640, 480), "black" if ground == "noise" else ground)
    if ground == "noise":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8))
    for box in ((0.25, 0.5, 0.75, 0.9), (0.0, 0.0, 1.0, 1.0), (0.9, 0.01, 1.0, 0.05)):
        drawn = np.asarray(
            support.drawing.draw_boxes(image, [(box, "a small dog", support.drawing.NAMED)])
        ).astype(int)
        x1, y1, x2, y2 = (round(v * s) for v, s in zip(box, (640, 480) * 2))
        named = abs(drawn - support.drawing.NAMED).sum(2) < 30
        assert named.sum() > 500
        middle = drawn[(y1 + y2) // 2]
        assert any(
            abs(middle[min(x, 639)] - support.drawing.NAMED).sum() < 30
            for x in range(max(0, x1 - 3), x1 + 4)
        )
        letters = drawn[named.any(1)].sum(2) < 60
        assert letters.sum() > 40, "dark letters on the label's own ground, whatever is behind it"


def test_labels_stay_inside_the_picture():
    image, long = (
        Image.new("RGB", (60, 60), "white"),
        "a label that is far too long for such a small picture " * 2,
    )
    for box in ((0.0, 0.0, 0.1, 0.1), (0.9, 0.9, 1.0, 1.0), (0.4, 0.0, 0.6, 1.0)):
        drawn = support.drawing.draw_boxes(image, [(box, long, support.drawing.WRONG)])
        assert drawn.size == (448, 448), "small pictures grow, so that the label can be read"
        assert (abs(np.asarray(drawn).astype(int) - support.drawing.WRONG).sum(2) < 30).sum() > 2000


def test_labels_of_boxes_that_nearly_coincide_do_not_hide_one_another():
    image = Image.new("RGB", (448, 448), "white")
    for box in (
        (0.2, 0.3, 0.6, 0.8),
        (0.0, 0.0, 1.0, 1.0),
        (0.3, 0.0, 0.7, 0.5),
        (0.3, 0.5, 0.7, 1.0),
    ):
        near = tuple(v * 0.98 for v in box)

        def ground(drawn, colour):
            return (abs(np.asarray(drawn).astype(int) - colour).sum(2) < 12).sum()

        both = support.drawing.draw_boxes(
            image,
            [(box, "a thing", support.drawing.TRUE), (near, "a thing", support.drawing.NAMED)],
        )
        alone = [
            support.drawing.draw_boxes(image, [(b, "a thing", c)])
            for b, c in ((box, support.drawing.TRUE), (near, support.drawing.NAMED))
        ]
        bare = [
            support.drawing.draw_boxes(image, [(b, "", c)])
            for b, c in ((box, support.drawing.TRUE), (near, support.drawing.NAMED))
        ]
        for one, line, colour in zip(alone, bare, (support.drawing.TRUE, support.drawing.NAMED)):
            label = ground(one, colour) - ground(line, colour)
            assert ground(both, colour) > 0.8 * label, (box, colour)


def test_a_sheet_has_room_for_its_longest_text(tmp_path):
    cells = [(Image.new("RGB", (9, 9)), [], "short", support.drawing.RIGHT)]
    support.drawing.sheet(cells * 5, tmp_path / "short.png")
    cells += [(Image.new("RGB", (9, 9)), [], "some words that need more lines " * 4, (0, 0, 0))]
    support.drawing.sheet(cells * 3, tmp_path / "long.png")
    short, long = (Image.open(tmp_path / f"{name}.png").height for name in ("short", "long"))
    assert long - short > 100, "two rows have room for four lines, and not for one"
