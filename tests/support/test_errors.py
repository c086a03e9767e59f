"""What a user brought wrong is one sentence; a bug stays one."""

import pytest

from support.errors import BadInput, complain


@pytest.mark.parametrize(
    "error, words",
    [
        (BadInput("a\n\x1b[2J.json: is\tbad; mend it"), "a [2J.json: is bad; mend it"),
        (OSError(28, "No space left", "out/log"), "out/log: No space left; mend that"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "most likely killed for its memory"),
    ],
)
def test_it_is_said_in_one_line_with_code_2(error, words, capsys):
    assert complain(error) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_bug_is_raised_again():
    for bug in (RuntimeError("shapes differ"), KeyError("a")):
        with pytest.raises(type(bug)):
            complain(bug)
