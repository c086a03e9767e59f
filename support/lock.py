"""A folder that one run writes to."""

import fcntl
import os
import socket
from datetime import datetime

from support.errors import BadInput


def hold(folder):
    """Lock a folder until the file that this returns is closed, or the process ends, however it ends.

    The lock is the system's own (POSIX): loader processes do not inherit it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise BadInput(
            f"{folder}: another run writes there ({file.read().strip()}); "
            "stop it, wait for it, or name another --out"
        ) from None
    except OSError:
        print(f"{folder}: its file system has no locks; let one run at a time write there")
    file.truncate(0)
    now = datetime.now().isoformat(" ", "seconds")
    file.write(f"pid {os.getpid()} on {socket.gethostname()} since {now}\n")
    file.flush()
    return file
