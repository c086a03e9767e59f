"""A look at a mixture before a week of compute: what a run would see of it, and what is wrong with it.

    python look.py out/toy/stage2.toml
    python look.py recipes/stage2.toml --preset infmllm-7b --tokenizer vicuna-7b-v1.5/ --records 1000 --show 32

Names what is missing and where it comes from. Of the rest it reads a random sample of every source as training
does, names the records that cannot be read, prints a table,
and draws pictures as the model will see them, with their boxes, prompts and answers.
"""

import sys
from itertools import groupby
from statistics import mean
from textwrap import shorten

from PIL import Image

from data import Data, some
from formats import load_mixture
from model import IGNORE, PRESETS
from support.commands import Parser, few, run
from support.drawing import TRUE, check_target, sheet
from support.errors import BadInput
from support.start import TOY_START
from text import Tokenizer
from text.boxes import parse_box
from text.templates import TEMPLATES

TEXT = 100  # letters of a prompt or an answer that a cell of the sheet has room for


def parse(argv):
    parser = Parser(__doc__)
    flag = parser.flag
    parser.add_argument("mixture", help="the TOML file")
    flag("--preset", PRESETS, "whose image size, visual tokens and context; default: toy", "toy")
    flag("--image-size", few, "pixels per side; default: the preset's")
    flag("--tokenizer", str, "default: the toy's", TOY_START)
    flag("--records", few, "how many of each source are read; default 200", 200)
    flag("--show", few, "how many pictures are drawn; default 16", 16)
    flag("--out", str, "picture to write; default: look.png", "look.png")
    return parser.parse_args(argv)


def look(data, source, limit):
    """([(tokens, targets, pictures)] of a random sample of a source, [what is wrong with the others])"""
    samples, problems = [], []
    for number in some(len(source), limit):
        try:
            samples.append(data.sample(source, number, 0))
        except BadInput as e:
            problems.append(e)
    return samples, problems


def row(source, samples, problems):
    """A line of the table."""
    tokens = [len(ids) for ids, _, _ in samples] or [0]
    answers = [sum(t != IGNORE for t in targets) for _, targets, _ in samples] or [0]
    pictures = [len(shown) for _, _, shown in samples] or [0]
    return (
        f"{source.name:<20}{source.task:<9}{len(source):>10,}{len(samples) + len(problems):>11,}"
        f"{len(problems):>12,}{mean(tokens):>9.0f}{max(tokens):>6}{mean(answers):>9.1f}{mean(pictures):>10.2f}"
    )


def cell(tokenizer, source, sample):
    """(picture, boxes, text, colour) for the contact sheet: what is asked and what is said to it, turn by turn."""
    tokens, targets, pictures = sample
    following = zip([*tokens[1:], targets[-1]], targets)  # these two are shifted by one
    lines, boxes = [], []
    system = TEMPLATES[tokenizer.template].system.strip()
    for asked, part in groupby(following, lambda pair: pair[1] == IGNORE):
        text = tokenizer.decode([token for token, _ in part]).replace(system, "")
        lines.append(("" if asked else "-> ") + shorten(text, TEXT))
        if box := parse_box(text):
            boxes.append((box, "", TRUE))
    return Image.fromarray(pictures[0]), boxes, f"{source.name}: " + "\n".join(lines), TRUE


def main(argv=None):
    args = parse(argv)
    config = PRESETS[args.preset]()
    tokenizer = Tokenizer(args.tokenizer)
    side = args.image_size or config.vit.image_size
    missing = []
    sources = load_mixture(args.mixture, missing=missing)
    for problem in missing:
        print(problem)
    if not sources:
        raise BadInput(f"{args.mixture}: none of its sources is there")
    data = Data(
        sources,
        tokenizer,
        side,
        config.visual_tokens,
        config.llm.context,
        image_mark=config.image_mark,
    )
    check_target(args.out, *[s.images and s.path("images") for s in data.sources])
    found = [(source, *look(data, source, args.records)) for source in data.sources]
    for _, _, problems in found:
        for problem in problems:
            print(problem)
    print(
        f"{'source':<20}{'task':<9}{'records':>10}{'looked at':>11}{'unreadable':>12}{'tokens':>9}{'most':>6}"
        f"{'answers':>9}{'pictures':>10}"
    )
    for source, samples, problems in found:
        print(row(source, samples, problems))
    cells = []
    for n in range(args.show):  # one of each source in turn
        for source, samples, _ in found:
            shown = [sample for sample in samples if sample[2]]
            if n < len(shown):
                cells.append((source, shown[n]))
    if cells:
        sheet([cell(tokenizer, *one) for one in cells[: args.show]], args.out)
        print(f"as the model will see them: {args.out}")


if __name__ == "__main__":
    sys.exit(run(main))
