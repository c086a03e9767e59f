"""What a reader returns, and checks of what it has read."""

from dataclasses import dataclass

from formats.files import LONGEST
from support.errors import BadInput
from text.templates import HERE

KINDS = {str: "text", list: "a list", int: "a number"}


@dataclass
class Record:
    where: str  # file and record, for messages
    refs: list  # its images: (path, offset, size) each; size -1: the whole file
    text: str = ""  # the question, or the phrase
    answers: list = ()  # what people answered: references; of a conversation, one per turn
    box: tuple | None = None  # x1, y1, x2, y2 in pixels of the image
    turns: list = ()  # conversations: (question, answer) each, <image> where an image stands
    fields: dict = ()  # the record as it lies on disk: question_id, image_id, type, whatever else
    # what Data.samples adds; there, turns are (prompt, answer) of any task
    source: str = ""
    task: str = ""
    number: int = -1
    images: list = ()  # PIL, RGB, upright, whole
    size: tuple | None = None  # width, height of the first image
    prompt: str = ""  # the full template, of the first turn


def need(fields, key, kind, where):
    """fields[key], which must be a `kind`."""
    value = fields.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = type(value).__name__ if key in fields else "missing"
        raise BadInput(f"{where}: '{key}' is {found} but must be {KINDS[kind]}; mend or remove it")
    if kind is not str:
        return value
    if not value.strip():
        raise BadInput(f"{where}: '{key}' is empty; fill it or remove the record")
    return clean(value, where)


def clean(text, where):
    """Text that can be encoded, and cannot be taken for a placeholder."""
    if not isinstance(text, str):
        raise BadInput(f"{where}: holds {type(text).__name__} where text is due; mend it")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadInput(f"{where}: holds half a character (a surrogate); mend it") from e
    if len(text) > LONGEST // 8:
        raise BadInput(f"{where}: holds a text of {len(text)} characters; shorten it")
    if HERE in text:
        raise BadInput(f"{where}: holds the reserved mark {HERE}; remove it")
    return text
