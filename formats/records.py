"""What a reader returns, and checks of what it has read."""

from dataclasses import dataclass, field

from formats.files import LONGEST
from support.errors import BadInput
from text.templates import HERE


@dataclass
class Record:
    where: str  # file and record, for messages
    refs: list  # its images: (path, offset, size) each, size -1: the whole file; or (bytes, 0, -1)
    text: str = ""  # the question, or the phrase
    answers: list = ()  # what people answered: references; of a conversation, one per turn
    box: tuple | None = None  # x1, y1, x2, y2 in pixels of the image
    turns: list = ()  # conversations: (question, answer) each, <image> where an image stands
    fields: dict = field(
        default_factory=dict
    )  # the record as it lies on disk: question_id, image_id, type, whatever else
    # what Data.samples adds; there, turns are (prompt, answer) of any task
    source: str = ""
    task: str = ""
    number: int = -1
    images: list = ()  # PIL, RGB, upright, whole
    size: tuple | None = None  # width, height of the first image
    prompt: str = ""  # the full template, of the first turn


def named(where, fields, key):
    """`where` with the record's own id, if it has one: the number in the file alone helps nobody to find it."""
    return f"{where} ({key} {str(fields[key])[:50]})" if key in fields else where


def need(fields, key, where):
    """fields[key], which must be text."""
    if not isinstance(fields, dict):
        fields = {}
    text = clean(fields.get(key, ""), f"{where}: '{key}'")
    if not text.strip():
        raise BadInput(f"{where}: '{key}' is missing or empty; fill it or remove the record")
    return text


def need_list(fields, key, where):
    """fields[key] as a list: one text may stand alone, and what is missing is empty."""
    value = fields.get(key) or []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise BadInput(f"{where}: '{key}' is {type(value).__name__} and no list; mend or remove it")
    return value


def corners(box, where):
    """[x, y, width, height] as the left, top, right and bottom edge."""
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        raise BadInput(
            f"{where}: {box} is no box of x, y, width, height; mend or remove it"
        ) from None
    return x, y, x + width, y + height


def clean(text, where):
    """Text that can be encoded, and cannot be taken for a placeholder."""
    try:
        str.encode(text)
    except (TypeError, UnicodeEncodeError) as e:
        raise BadInput(f"{where}: is no text in UTF-8 ({e}); mend it") from e
    if len(text) > LONGEST // 8:
        raise BadInput(f"{where}: holds a text of {len(text)} characters; shorten it")
    if HERE in text:
        raise BadInput(f"{where}: holds the reserved mark {HERE}; remove it")
    return text
