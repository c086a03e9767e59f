"""How every command reads its numbers and how it ends."""

import io
import sys

import pytest

from support.commands import Parser, amount, few, natural, number, positive, run
from support.errors import BadInput


@pytest.mark.parametrize(
    "kind, good, wrong",
    [
        (positive, "1 17", "0 -1 1.5 x"),
        (few, "1 4096", "0 4097"),
        (natural, "0 3", "-1 nan 99999999999999999999"),
        (amount, "0 2.5", "-0.1 nan inf x"),
        (number(float, 0.5, 1), "0.5 1", "0.4 1.1 nan"),
    ],
)
def test_numbers_out_of_bounds_are_bad_input_that_names_the_flag(kind, good, wrong):
    parser = Parser("")
    parser.flag("--n", kind, "a number")
    for text in good.split():
        assert parser.parse_args(["--n=" + text]).n == float(text)
    for text in wrong.split():
        with pytest.raises(BadInput, match=f"--n.*{text}.*no number from"):
            parser.parse_args(["--n=" + text])


@pytest.mark.parametrize(
    "error, code",
    [(BadInput("a.json: no"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 0), (None, 0)],
)
def test_a_command_ends_with_a_code_and_letters_that_the_terminal_lacks_are_spelt_out(
    error, code, monkeypatch
):
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("support.commands.mute", lambda: None)

    def main():
        print("é")
        if error:
            raise error

    assert run(main) == code
    screen.flush()
    assert screen.buffer.getvalue() == rb"\xe9" + b"\n"
