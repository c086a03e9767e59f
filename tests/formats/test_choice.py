"""formats/choice.py: VLMEvalKit's TSVs, and what becomes of their answers in evaluate.py."""

import base64
import csv

import pytest
from small import RED, picture

import evaluate
from evaluate import whole_questions
from formats.choice import Choice
from formats.pictures import peek
from support.errors import BadInput

BLUE, OTHER = (base64.b64encode(picture(*c)).decode() for c in ((), (RED,)))
COLUMNS = "index image question hint A B C D E F G H answer category l2-category".split()
ROWS = [
    {
        "index": 3,
        "image": BLUE,
        "question": "What\nis it?",
        "A": "a cat",
        "B": "a dog",
        "answer": "B",
    },
    {
        "index": 7,
        "image": 3,
        "question": 'A "quoted"\tone?',
        "hint": "Look\nclosely.",
        "answer": "A",
    }
    | dict(zip("ABCDEFGH", "12345678")),
    {"index": 8, "image": f"['{BLUE}', '{OTHER}']", "question": "Alike?", "A": "no", "B": "yes"},
]


def written(folder, rows=ROWS, **change):
    path = folder / "Set.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows({**row, **change} for row in rows)
    return path


def test_rows_with_several_lines_up_to_eight_options_and_pictures_by_reference(tmp_path):
    source = Choice(written(tmp_path))
    cat, quoted, alike = map(source.read, range(3))
    assert cat.text == (
        "Question: What\nis it?\nOptions:\nA. a cat\nB. a dog\n"
        "Please select the correct answer from the options above. \n"
    )
    assert quoted.text.startswith(
        'Hint: Look\nclosely.\nQuestion: A "quoted"\tone?\nOptions:\nA. 1\n'
    )
    assert list(quoted.fields["options"]) == list("ABCDEFGH") and quoted.answers == ["A"]
    colours = [peek(ref).image.getpixel((0, 0)) for r in (cat, quoted, alike) for ref in r.refs]
    assert [colour == RED for colour in colours] == [False, False, False, True]
    assert alike.answers == []  # of a test file


@pytest.mark.parametrize(
    "change, says",
    [
        ({"answer": "C"}, r"row 1 \(index 3\): its answer is 'C', none of A, B"),
        ({"A": ""}, "row 1 .* has 1 options"),
        ({"image": "12"}, "row 1 .* its image is '12', the index of no row"),
        ({"image": "x" * 99}, "row 1 .* its image is not base64"),
        ({"image": "QUJD" * 20}, "row 1 .* cannot be read as an image"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, says):
    source = Choice(written(tmp_path, ROWS[:1], **change))
    with pytest.raises(BadInput, match=says):
        for ref in source.read(0).refs:
            peek(ref, "row 1 (index 3)")


def test_a_file_that_is_none_of_them_is_refused(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("index\tquestion\n1\twhat?\n")
    with pytest.raises(BadInput, match="a.tsv: has no image, A, B"):
        Choice(path)
    with pytest.raises(BadInput, match="cannot be read as a TSV"):
        Choice(tmp_path / "none.tsv")


def answered(index, said, truth):
    options = {"A": "one", "B": "two"}
    return {"index": index, "said": said, "truth": [truth], "options": options}


def test_rotated_rows_are_one_question_that_is_right_if_all_are():
    rows = [
        answered("5", "A", "A"),
        answered("1000005", "B", "B"),  # the same with its options turned
        answered("6", "A", "A"),
        answered("1000006", "A", "B"),
        answered("2000006", "A", "A"),
        answered("7", "B", "B"),
    ]
    found = whole_questions(rows)
    assert [r["index"] for r in found] == ["5", "1000006", "7"]
    [(name, right, count)] = evaluate.score(
        [r | {"type": None, "box": None} for r in rows], "choice"
    )
    assert (name, round(right, 3), count) == ("accuracy (choice)", 0.667, 3)


@pytest.mark.parametrize("by", ["answer", "likelihood"])
def test_a_file_is_asked_and_scored_both_ways(made, tmp_path, monkeypatch, capsys, by):
    rows = [{**ROWS[0], "index": n, "category": "animals" if n % 2 else "things"} for n in range(6)]
    path = written(tmp_path, rows)
    flags = f"--ckpt ck --device cpu --task choice --data {path} --by {by} --max-new-tokens 5"
    monkeypatch.chdir(made)
    evaluate.main([*flags.split(), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "accuracy (choice)" in said and "  animals" in said and "of 6" in said
    if by == "likelihood":
        answers = [r["said"] for r in evaluate.read_rows(tmp_path / "out")]
        assert len(answers) == 6 and set(answers) <= {"A", "B"}
    with pytest.raises(BadInput, match="another by"):
        other = {"answer": "likelihood", "likelihood": "answer"}[by]
        evaluate.main([*flags.replace(by, other).split(), "--out", str(tmp_path / "out")])


def test_the_likeliest_letter_is_the_one_whose_tokens_have_the_least_loss(made, monkeypatch):
    import torch
    from PIL import Image

    from support.start import load_model
    from text import encode_turns
    from text.templates import prompt

    model, tokenizer = load_model(made / "ck", device="cpu")
    image = Image.open(made / "photos/wide.png").convert("RGB")
    text = prompt("chat", "which?")
    ids, _ = encode_turns(tokenizer, [(text, None)], model.config.visual_tokens)
    losses = {}
    for letter in "ABC":
        tokens, targets = encode_turns(tokenizer, [(text, letter)], model.config.visual_tokens)
        targets[-1] = evaluate.IGNORE  # the end is not asked for
        shown = evaluate.sample.square(image, model.config.vit.image_size, True)[None]
        with torch.inference_mode():
            losses[letter] = model(shown, torch.tensor([tokens]), torch.tensor([targets])).item()
    row = {"options": dict.fromkeys("ABC", "")}
    [found] = evaluate.likeliest(model, tokenizer, [[image]], [ids], [row])
    assert found == min(losses, key=losses.get)
