"""Small files, read whole."""

import json
from contextlib import contextmanager
from pathlib import Path

from support.errors import BadInput


@contextmanager
def reading(path):
    try:
        yield
    except (OSError, ValueError) as e:
        raise BadInput(
            f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check path and rights"
        ) from e


def whole(path):
    with reading(path):
        return Path(path).read_bytes()


def read_json(path):
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; it belongs beside the weights") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(
            f"{path}: is not readable JSON ({str(e)[:100]}); download or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is not a JSON object; download or copy it again")
    return value
