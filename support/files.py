"""Small files, read whole."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from support.errors import BadInput


@contextmanager
def reading(path):
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError) as e:
        raise BadInput(
            f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check path and rights"
        ) from e


SMALL = 2**23  # bytes of a JSON file that is read whole


def regular(path):
    """The path of a file that has an end: a pipe or a device may have none."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path}: is no regular file; name one")
    return Path(path)


def whole(path):
    with reading(path):
        return regular(path).read_bytes()


def read_json(path, most=SMALL):
    try:
        if regular(path).stat().st_size > most:
            raise BadInput(f"{path}: has more than {most} bytes; it is not the file it should be")
        value = json.loads(Path(path).read_text("utf-8"))
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; it belongs beside the weights") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(
            f"{path}: is not readable JSON ({str(e)[:100]}); download or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is not a JSON object; download or copy it again")
    return value
