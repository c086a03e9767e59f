"""sample.py: decoding as transformers does it, strings in and out, the chat, the command line."""

import io
import json
import os
import shlex
import shutil
import signal
import sys
from itertools import islice, takewhile
from pathlib import Path

import bpe
import oracle
import pytest
import tiny
import torch
from PIL import Image

import sample
import support.start
import weights
from model import IMAGE
from support.commands import run
from support.drawing import NAMED
from support.errors import BadInput
from text import Tokenizer, encode_prompt
from text.templates import chat_turn, prompt

# ---- decoding --------------------------------------------------------------------------------------------------------

CELLS, SLOT = 16, 100  # visual tokens of an image, and transformers' id for their places
EOS = 103


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model and ours, from one folder; logits spread wide, so that rounding decides nothing."""
    theirs = oracle.llava(num_key_value_heads=2)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(5)
    folder = oracle.folder(theirs, tmp_path_factory.mktemp("llava"))
    return theirs, weights.load_llava(folder)


def prompts(*shapes):
    """(text before, images, text after) each -> rows of ids with IMAGE, and the images in their order."""
    rows = []
    for seed, (before, n, after) in enumerate(shapes):
        text = tiny.text(before + after, seed)
        rows.append(text[:before] + [IMAGE] * CELLS * n + text[before:])
    count = sum(n for _, n, _ in shapes)
    return rows, torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(0))


UNEQUAL = prompts((3, 1, 4), (1, 0, 2), (5, 2, 1), (9, 0, 3), (2, 1, 9))
MODES = [
    dict(),
    dict(min_new_tokens=9),
    dict(beams=2, length_penalty=2.0),
    dict(beams=5, length_penalty=0.0),
    dict(beams=5, min_new_tokens=8),
    dict(beams=3, length_penalty=-1.0),
]


@torch.no_grad()
def expected(theirs, rows, images, eos, max_new_tokens, beams=1, **settings):
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    ids[ids == IMAGE] = SLOT
    if len(images):
        settings["pixel_values"] = images
    out = theirs.generate(
        input_ids=ids,
        attention_mask=ids > 0,
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        eos_token_id=eos,
        pad_token_id=0,
        do_sample=False,
        **settings,
    )
    said = out[:, T:].tolist()
    stops = [eos] if isinstance(eos, int) else eos
    return [list(takewhile(lambda i: i not in stops, row)) for row in said]


def common(theirs, rows, images):
    """A token that greedy decoding says in the middle of things: as an eos it ends rows at different places."""
    said = [i for row in expected(theirs, rows, images, EOS, 16) for i in row[2:10]]
    return max(said, key=said.count)


@pytest.mark.parametrize("rows, images", [UNEQUAL, prompts((3, 0, 4))], ids=["batch", "text"])
@pytest.mark.parametrize("mode", MODES + [dict(beams=5, max_new_tokens=1)], ids=str)
def test_ids_are_those_of_transformers(pair, rows, images, mode):
    theirs, ours = pair
    for eos in (EOS, common(theirs, rows, images)):
        settings = dict(max_new_tokens=13, eos=eos) | mode
        want = expected(theirs, rows, images, **settings)
        assert sample.generate_ids(ours, images, rows, **settings) == want


@pytest.mark.parametrize("beams", [1, 3])
def test_any_of_several_tokens_ends_an_answer(pair, beams):
    theirs, ours = pair
    rows, images = UNEQUAL
    said = expected(theirs, rows, images, EOS, 13)
    stops = (said[0][4], said[1][7], EOS)
    settings = dict(max_new_tokens=13, min_new_tokens=2, beams=beams)
    want = expected(theirs, rows, images, list(stops), **settings)
    assert sample.generate_ids(ours, images, rows, eos=stops, **settings) == want
    assert len({len(row) for row in want}) > 1


def test_a_batch_draws_what_each_row_draws_alone(pair):
    _, ours = pair
    rows, images = UNEQUAL
    drawn = dict(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.9)
    together = sample.generate_ids(ours, images, rows, seed=7, **drawn)
    for i, own in enumerate(images.split([1, 0, 2, 0, 1])):
        row = rows[i]
        assert sample.generate_ids(ours, own, [row], seed=[7 + i], **drawn) == [together[i]]


def inputs_of(owner, name, monkeypatch):
    """What a method is given as its first argument, call after call."""
    method = getattr(owner, name)
    given = []

    def recorded(x, *more):
        given.append(x)
        return method(x, *more)

    monkeypatch.setattr(owner, name, recorded)
    return given


def test_prompts_on_one_picture_encode_it_once(pair, monkeypatch):
    _, ours = pair
    rows, images = prompts((3, 1, 4), (2, 1, 5), (1, 2, 1))
    shared = [0, 1, 1, 0]
    encoded = inputs_of(ours, "encode_images", monkeypatch)
    apart = sample.generate_ids(ours, images[shared], rows, max_new_tokens=8)
    assert sample.generate_ids(ours, images[:2], rows, shared, max_new_tokens=8) == apart
    assert len(encoded[1]) == 2


def test_it_computes_what_is_new_and_stops_when_every_row_is_done(pair, monkeypatch):
    _, ours = pair
    rows, images = prompts((3, 1, 4), (9, 0, 3))
    one, two = sample.generate_ids(ours, images, rows, max_new_tokens=40, eos=EOS)
    eos = next(i for i in one if i in two)  # what both say, sooner or later
    steps = max(one.index(eos), two.index(eos))
    computed = inputs_of(ours.llm, "forward", monkeypatch)
    sample.generate_ids(ours, images, rows, max_new_tokens=40, eos=eos)
    assert [x.shape[:2] for x in computed[1:]] == [(2, 1)] * steps and 3 <= steps < 39


@pytest.mark.parametrize(
    "top_k, top_p, shares",
    [
        (0, 1, [3, 4, 1, 2]),
        (3, 1, [3, 4, 0, 2]),
        (9, 0.6, [3, 4, 0, 0]),
        (2, 0.5, [0, 1, 0, 0]),  # the share is one of what top_k has left
    ],
)
def test_draws_follow_softmax_after_temperature_top_k_and_top_p(
    pair, monkeypatch, top_k, top_p, shares
):
    _, ours = pair
    logits = torch.tensor([9.0, 16, 1, 4]).log()
    monkeypatch.setattr(ours.llm, "head", lambda hidden: logits.expand(len(hidden), 4))
    drawn = dict(temperature=2, top_k=top_k, top_p=top_p, max_new_tokens=1, eos=-1)
    said = sample.generate_ids(ours, [], [[3]] * 4000, **drawn)
    seen = torch.bincount(torch.tensor(said)[:, 0], minlength=4)
    wanted = 4000 * torch.tensor(shares) / sum(shares)
    assert (seen - wanted).abs().max() < 120


# ---- pictures and text in, text out ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(made):
    return support.start.load_model(made / "ck", device="cpu")


def test_strings_in_and_out_are_the_ids_of_generate_ids(loaded, made):
    model, tokenizer = loaded
    one, two = (sample.open_image(made / f"photos/{name}.png") for name in ("wide", "tall"))
    texts = [prompt("vqa", "what is it?"), "no picture here", "<ImageHere> and <ImageHere>"]
    drawn = dict(max_new_tokens=9, temperature=2.0, seed=5)
    said = sample.generate(model, tokenizer, [one, None, [two, one]], texts, **drawn)
    pixels = [sample.square(image, 32) for image in (one, two, one)]
    tokens = [encode_prompt(tokenizer, text, 4) for text in texts]
    ids = sample.generate_ids(model, pixels, tokens, eos=tokenizer.eos, **drawn)
    assert said == [sample.visible(tokenizer.decode(row)) for row in ids]
    assert len(set(said)) == 3
    padded = sample.generate(model, tokenizer, [one], texts[:1], pad=True, **drawn)
    assert padded != said[:1], "a padded picture is another picture"


def test_a_chat_with_its_cache_says_what_one_without_says_also_after_an_answer_cut_short(
    loaded, made, monkeypatch
):
    model, tokenizer = loaded
    image = sample.open_image(made / "photos/wide.png")
    picture = sample.square(image, 32, pad=True)

    def without_cache(ids):
        return sample.generate_ids(model, [picture], [ids], max_new_tokens=12)[0]

    talk = sample.Chat(model, tokenizer, image)
    answer = talk.ask("what?", max_new_tokens=12)
    cut = "".join(islice(answer, 2))
    answer.close()
    first = encode_prompt(tokenizer, prompt("chat", "what?"), 4)
    whole = without_cache(first)
    shown = whole[:3]  # the first of these has no letter of its own
    assert talk.ids == first + shown and cut == tokenizer.decode(shown)
    turn = encode_prompt(tokenizer, "USER: and where? ASSISTANT:", 4, bos=False)
    asked = [*talk.ids, tokenizer.eos, *turn]
    computed = inputs_of(model.llm, "forward", monkeypatch)
    said = "".join(talk.ask("and where?", max_new_tokens=12))
    assert computed[0].shape[1] <= len(turn) + 2, "the last token, the eos, the question"
    want = without_cache(asked)
    assert talk.ids == asked + want and said == tokenizer.decode(want)
    talk.start(image)
    assert "".join(talk.ask("what?", max_new_tokens=12))
    assert talk.ids == first + whole, "a reset forgets all of it"


def test_a_character_that_comes_in_bytes_is_shown_once_it_is_whole(loaded, monkeypatch):
    tokens = [torch.tensor(i) for i in loaded[1].encode("so 🙂 it is")]
    monkeypatch.setattr(sample, "decode", lambda *_, **__: iter(tokens))
    assert "".join(sample.Chat(*loaded).ask("hello")) == "so 🙂 it is"


def test_a_chat_in_other_turns_ends_and_goes_on_as_its_template_has_it(
    loaded, tmp_path, monkeypatch
):
    """A sentence in bytes, as an LLM with byte-level BPE says it."""
    model, _ = loaded
    tokenizer = Tokenizer(bpe.folder(tmp_path, eos="<|im_end|>"))
    words = [i for part in ("so ", "🙂", " it is") for i in tokenizer.encode(part)]
    said = [torch.tensor(i) for i in (*words, tokenizer.stops[-1], 7)]
    monkeypatch.setattr(sample, "decode", lambda *_, **__: iter(said))
    monkeypatch.setattr(sample, "embed_prompts", lambda *_: (torch.zeros(1, 1, 1), None))
    talk = sample.Chat(model, tokenizer)
    shown = list(talk.ask("what?"))
    assert "".join(shown) == "so 🙂 it is" and not any("\ufffd" in piece for piece in shown)
    asked = encode_prompt(tokenizer, prompt("chat", "what?", "", "chatml"), 4)
    assert talk.ids == asked + words
    list(talk.ask("and?"))
    turn = encode_prompt(tokenizer, chat_turn("and?", "chatml"), 4, bos=False)
    start, end = (tokenizer.controls[f"<|im_{name}|>"] for name in ("start", "end"))
    assert talk.ids == [*asked, *words, end, *turn, *words]
    assert turn[: len(tokenizer.encode("\n")) + 1] == [*tokenizer.encode("\n"), start]


def test_a_chat_fills_its_context_and_says_so(loaded):
    talk = sample.Chat(*loaded)
    assert "".join(talk.ask("tell me everything", max_new_tokens=1024))
    assert len(talk.ids) == 300
    with pytest.raises(BadInput, match="context is 300"):
        next(talk.ask("go on"))


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(made, tmp_path, capsys, monkeypatch):
    """sample.py beside `made`'s files -> (exit code, what was printed, what was complained about)"""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def command(line, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        argv = shlex.split("--ckpt ck --device cpu " + line)
        code = run(lambda: sample.main(argv))
        return code, *capsys.readouterr()

    return command


WIDE = "--image photos/wide.png "
BOX = "<box>(0.10,0.20),(0.50,0.90)</box>"


def test_the_chat_of_the_command_line_takes_its_commands(command, monkeypatch):
    def ask(self, line, **_):
        return iter(["it is at ", BOX] if self.image else ["blind"])

    monkeypatch.setattr(sample.Chat, "ask", ask)
    typed = f"""hello
/image photos/wide.png
/box on
where?
/box off
where?
/nonsense
/image nowhere.png
/image {"far " * 99}away.png
/image broken.png


/reset
<ImageHere>
/box on
where?
"""
    code, out, err = command("", typed)
    assert (code, err) == (0, "")
    assert out.startswith("blind\n")
    assert out.count("it is at <box>") == 3
    for name in ("box.png", "box-2.png"):  # the second does not overwrite the first
        assert out.count(f"[{name}: the box in pixels is [9.0, 8.0, 45.0, 36.0]]") == 1
        assert Image.open(name)
    for hint in (
        "the commands are",
        "nowhere.png: no such image",
        "away.png: no such image",
        "cannot be read as an image",
        "reserved mark",
    ):
        assert out.count(hint) == 1, hint


@pytest.mark.parametrize("word", ["/quit", "exit", "quit"])
def test_a_chat_ends_when_it_is_told_to(command, word):
    assert command("", f"{word}\nhello\n") == (0, "", "")


def test_without_a_checkpoint_it_says_which_one_it_took(command):
    folder = Path("out/stage2/step-00000007")
    shutil.copytree("ck", folder)
    code, _, err = command("--ckpt '' --prompt hello --max-new-tokens 2")
    assert (code, err) == (0, f"model: {folder}\n")


def test_commands_to_a_terminal_are_shown_as_unknown_characters(command, monkeypatch):
    said = "\x1b[2Jone\r\x07\u009b8two".encode()
    tokenizer = Tokenizer("ck")
    ids = [tokenizer.model.piece_to_id(f"<0x{byte:02X}>") for byte in said]
    monkeypatch.setattr(sample, "decode", lambda *_, **__: (torch.tensor([i]) for i in ids))
    shown = "\ufffd[2Jone\ufffd\ufffd\ufffd8two\n"
    assert command("--prompt hello") == (0, shown, "")
    assert command("", "hello\n") == (0, shown + "\n", "")


def test_ctrl_c_ends_the_answer_and_not_the_talk(command, monkeypatch):
    def interrupted(self, line, **_):
        yield "half an "
        if line == "one":
            os.kill(os.getpid(), signal.SIGINT)
            yield "word"
        yield "answer"

    monkeypatch.setattr(sample.Chat, "ask", interrupted)
    assert command("", "one\ntwo\n") == (0, "half an word ...\nhalf an answer\n\n", "")


@pytest.mark.parametrize(
    "task, text",
    [("caption", ""), ("region", "0.1,0.2,0.6,.7"), ("chat", "hello")],
)
def test_every_task_answers_on_a_picture_and_on_a_folder(command, task, text):
    flags = f"--task {task} --prompt '{text}' --max-new-tokens 6"
    code, out, err = command(flags + " --image photos/wide.png --json --save one.png")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    said = answer.pop("answer")
    asked = {"image": "photos/wide.png", "task": task, "prompt": text}
    assert said and answer == asked | {"box": None, "pixels": None}
    drawn = Image.open("one.png").convert("RGB")
    if task == "region":  # the box that was asked about is drawn
        w, h = drawn.size
        assert drawn.getpixel((round(0.1 * w) - 1, round(0.45 * h))) == NAMED
    code, out, err = command(flags + " --image photos --save all.png")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[2] == f"photos/wide.png: {said}", "a folder gives what each picture gives alone"
    assert Image.open("all.png").width > 3 * 256


def test_a_bad_picture_of_a_folder_ends_only_itself_and_is_named_and_counted(command):
    shutil.copytree("photos", "mixed")
    shutil.copy("broken.png", "mixed/aaa.png")
    flags = " --task caption --max-new-tokens 6"
    code, out, err = command("--image mixed" + flags)
    assert code == 0 and "mixed/aaa.png" in err and "1 of 4 pictures could not be read\n" in err
    assert out == command("--image photos" + flags)[1].replace("photos/", "mixed/")


def test_a_box_that_is_named_is_given_in_pixels_of_its_picture(command, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: [BOX])
    _, out, _ = command("--image photos/wide.png --task ground --prompt dog --json")
    answer = json.loads(out)
    assert answer["box"] == [0.1, 0.2, 0.5, 0.9]
    assert answer["pixels"] == [9, 8, 45, 36]


def test_a_single_answer_is_the_first_of_a_chat(command):
    flags = WIDE + "--max-new-tokens 6 "
    _, said, _ = command(flags + "--prompt hello")
    assert command(flags, "hello\n") == (0, said + "\n", "")


@pytest.mark.parametrize("task", ["vqa --beams 2", "chat"])
def test_the_longest_answer_that_is_asked_for_is_that_of_the_context(command, task):
    flags = f"{WIDE} --task {task} --prompt hello --min-new-tokens 300 --max-new-tokens"
    code, said, _ = command(f"{flags} 20000000")
    assert code == 0 and said == command(f"{flags} 300")[1]


def test_sampling_is_repeatable_by_seed(command):
    flags = WIDE + "--task vqa --prompt hello --temperature 9 --top-k 200 --top-p 0.9"
    said = [command(f"{flags} --seed {seed}")[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "line, names",
    [
        ("--image nowhere.png", "nowhere.png"),
        ("--image broken.png", "broken.png"),
        ("--image photos", "name a file"),
        ("--image ck --task caption", "no picture"),
        ("--image '' --task vqa --prompt x", "--image"),
        ("--task vqa --prompt ' '", "--prompt"),
        ("--task chat --prompt ''", "--prompt"),
        ("--task caption --prompt x", "--prompt"),
        ("--prompt 'a <ImageHere> b'", "<ImageHere>"),
        ("--prompt " + "word" * 400, "context"),
        ("--task region --prompt here", "x1,y1,x2,y2"),
        ("--json", "--json"),
        ("--beams 3", "--beams"),
        ("--prompt x --beams 0", "--beams"),
        ("--prompt x --beams 3000", "--beams"),
        ("--prompt x --beams 3 --temperature 1", "choose one"),
        ("--prompt x --temperature -1", "--temperature"),
        ("--prompt x --top-p 0.5", "--temperature"),
        ("--prompt x --top-k 5", "--temperature"),
        ("--prompt x --temperature 1 --top-p 0", "--top-p"),
        ("--prompt x --max-new-tokens 0", "--max-new-tokens"),
        ("--prompt x --save no/such/x.png", "x.png"),
        ("--prompt x --save x.nonsense", "x.nonsense"),
        ("--prompt x --save photos/../photos/wide.png", "wide.png: belongs to what is read"),
        ("--image photos --task caption --save photos/tall.png", "belongs to what is read"),
        ("--image '' --save x.png", "--save"),
        ("--ckpt photos", "photos"),
        ("--ckpt broken.png", "broken.png"),
        ("--tokenizer broken.png", "broken.png"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(command, line, names):
    code, out, err = command(WIDE + line)
    assert code == 2 and names in err and err.count("\n") == 1, err
    assert out == "", "said before any work is done"
