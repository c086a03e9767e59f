"""What the scripts have in common as commands: flags with bounds, and how they end."""

import argparse
import math
import os
import sys

from support.errors import BadInput, complain


class Parser(argparse.ArgumentParser):
    """A wrong flag is one sentence, as any other bad input."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def flag(self, name, kind, help, default=None):
        """kind: bool, the values that there are, or what reads the value"""
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif callable(kind):
            how = {"type": kind}
        else:
            how = {"choices": kind}
        self.add_argument(name, help=help, default=default, **how)

    def error(self, message):
        raise BadInput(f"{message}; --help lists the flags")


def number(kind, low, high=math.inf):
    """An argparse type: a number within bounds."""

    def read(text):
        limits = f"from {low}" + (f" to {high}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no number {limits}")
        return value

    return read


MOST = 2**31 - 1  # of what is counted, here and in the libraries below
positive = number(int, 1, MOST)
few = number(int, 1, 4096)
natural = number(int, 0, MOST)
amount = number(float, 0)
share = number(float, 0, 1)


def spell_out():
    """A terminal may lack the letters of an answer or of a name."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(main):
    """main() as a command: what a user brought wrong is one sentence and exit code 2."""
    spell_out()
    try:
        if sys.stdout is None:
            raise BadInput("the standard output is closed, so there is nowhere to answer; open it")
        main()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute()  # the reader has gone
    except (BadInput, OSError, RuntimeError) as e:
        code = complain(e)
        if not isinstance(e, BadInput):
            mute()
        return code
    return 0


def mute():
    """Drop in silence what is still to be flushed."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def layers(text):
    """0,1,5,6"""
    return sorted({natural(n) for n in text.split(",")})


def gpus(text):
    """8x80: how many, and their bytes"""
    count, _, size = text.lower().partition("x")
    return positive(count), amount(size) * 2**30


def word(text):
    """A name that is part of tensors' names."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no word such as mm")
    return text
