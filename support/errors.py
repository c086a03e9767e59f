"""What is wrong with what a user brought, or with the machine: one sentence and exit code 2."""

import os
import re
import sys
from contextlib import suppress

import torch.distributed as dist

from support.ranks import silent_ranks


class BadInput(ValueError):
    """What a user brought is wrong. One sentence: the file, the record, the remedy.

    Names in a stranger's file may hold line ends or terminal commands: control characters become spaces.
    """

    def __init__(self, text):
        super().__init__("".join(c if c.isprintable() else " " for c in text))


def sentence(e):
    """What to say of bad input, a disk that refuses or a process that has gone; None: it is a bug."""
    text = " ".join(str(e).split())
    if isinstance(e, BadInput):
        return text.rpartition("BadInput: ")[2]  # from a loader process it comes with a traceback
    if isinstance(e, OSError):
        what = e.filename or "input or output"
        return f"{what}: {e.strerror or text}; mend that and start again, with --resume where a run had begun"
    if found := re.search(r"DataLoader worker \(pid.*", text):
        return (
            f"a loader process has gone ({found[0][:120]}), most likely killed for its memory; "
            "--resume goes on, and fewer --workers take less"
        )
    if not isinstance(e, dist.DistError) and "gloo" not in text:
        return None
    why = re.sub(r"^\[\S+\] |\. This is typically.*", "", text)[:120]
    if not dist.is_initialized():
        return (
            f"the ranks did not find one another ({why}); start all of them, under torchrun with "
            "--max-restarts as docs/RELIABILITY.md says"
        )
    gone = ", ".join(map(str, silent_ranks())) or "one that is back by now"
    return (
        f"no answer from rank {gone} ({why}): killed, stopped, or ended with a sentence of its own; "
        "start all ranks again, a training with --resume"
    )


def complain(e, who=""):
    """Say an error in a sentence and return the exit code 2; a bug is raised again."""
    said = sentence(e)
    if said is None:
        raise e
    if who:
        rank = f", rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        said = f"{who}{rank}: {said}"
    with suppress(OSError):  # where the output itself has gone
        print(said, file=sys.stderr, flush=True)
    if dist.is_initialized():
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(2)  # the other ranks may be gone: wait for nobody
    return 2
