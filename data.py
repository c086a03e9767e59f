"""Records on disk -> samples -> token ids and targets -> batches."""
from model import IGNORE, IMAGE

__all__ = ["IGNORE", "IMAGE", "BadInput"]


class BadInput(ValueError):
    """What a user brought is wrong. One sentence: the file, the record, the remedy. Scripts print it and exit 2."""
