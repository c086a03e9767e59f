"""What a user brought is wrong, or the world is: one sentence each, exit code 2."""

import os
import re
import sys
from contextlib import suppress

import torch

from support.ranks import silent_ranks


class BadInput(ValueError):
    """What a user brought is wrong. One sentence: the file, the record, the remedy. Scripts print it and exit 2.
    Names in a stranger's file may hold line ends or a terminal's commands: they are said with blanks instead."""

    def __init__(self, text):
        super().__init__("".join(c if c.isprintable() else " " for c in text))


def sentence(e):
    """What to say of an error that is not the program's own: bad input, a disk that refuses, a process that has gone.
    None: it is a bug, and its traceback is wanted."""
    text = " ".join(str(e).split())
    if isinstance(e, BadInput):
        return text
    if isinstance(e, OSError):
        return (
            f"{e.filename or 'input or output'}: {e.strerror or text}; mend that and start again, with --resume "
            "where a run had begun"
        )
    if found := re.search(r"DataLoader worker \(pid.*", text):
        return (
            f"a loader process has gone ({found[0][:120]}), most likely killed for its memory; --resume goes on, "
            "and fewer --workers take less"
        )
    if not isinstance(e, torch.distributed.DistError) and "gloo" not in text:
        return None
    why = re.sub(r"^\[\S+\] |\. This is typically.*", "", text)[:120]
    if not torch.distributed.is_initialized():
        return f"the ranks did not find one another ({why}); start all of them"
    gone = ", ".join(map(str, silent_ranks())) or "one that is back by now"
    return (
        f"no answer from rank {gone} ({why}): killed, stopped, or ended with a sentence of its own; "
        "start all ranks again, a training with --resume"
    )


def complain(e, who=""):
    """Say an error in a sentence and return the exit code 2; a bug is raised again."""
    if (said := sentence(e)) is None:
        raise e
    if who:
        who += f", rank {os.environ['RANK']}: " if "RANK" in os.environ else ": "
    with suppress(OSError):  # where the output itself has gone
        print(who + said, file=sys.stderr, flush=True)
    if not torch.distributed.is_initialized():
        return 2
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(2)  # the other ranks may be gone: wait for nobody
