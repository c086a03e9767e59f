"""Multiple-choice benchmarks as VLMEvalKit keeps them: tab-separated, a question a row, its picture in base64.

Columns: index, image (base64, the index of another row, or a list of them), question, A, B, C, ... (what is empty is no option),
answer (a letter; test files have none), and maybe hint and category. Held in memory whole, as it is only asked once."""

import ast
import base64
import csv
import string

from formats.records import Record
from support.errors import BadInput
from support.files import regular

csv.field_size_limit(2**30)  # a picture is a field
SHORTEST = 64  # letters of a picture in base64: what is shorter names another row


class Choice:
    def __init__(self, path):
        self.path = path
        try:
            with open(regular(path), encoding="utf-8-sig", newline="") as file:
                self.rows = list(csv.DictReader(file, delimiter="\t"))
        except (OSError, ValueError, csv.Error) as e:
            raise BadInput(f"{path}: cannot be read as a TSV ({e}); fetch it again") from e
        columns = set(self.rows[0]) if self.rows else set()
        missing = [name for name in ("index", "image", "question", "A", "B") if name not in columns]
        if missing:
            raise BadInput(
                f"{path}: has no {', '.join(missing)}; name a TSV of VLMEvalKit's with options"
            )
        self.place = {row["index"]: n for n, row in enumerate(self.rows)}

    def __len__(self):
        return len(self.rows)

    def read(self, number):
        row = self.rows[number]
        where = f"{self.path}: row {number + 1} (index {row['index']})"
        options = {name: row[name] for name in string.ascii_uppercase if row.get(name)}
        if len(options) < 2:
            raise BadInput(f"{where}: has {len(options)} options; remove it")
        answer = (row.get("answer") or "").strip()
        if answer and answer not in options:
            raise BadInput(
                f"{where}: its answer is {answer!r}, none of {', '.join(options)}; mend it"
            )
        pictures = [(self.picture(text, where), 0, -1) for text in listed(row["image"])]
        fields = {"index": row["index"], "options": options, "type": row.get("category") or None}
        text = wording(row.get("hint"), row["question"], options)
        return Record(where, pictures, text, [answer] if answer else [], fields=fields)

    def picture(self, text, where):
        """The bytes of a picture."""
        if len(text or "") < SHORTEST:
            if text not in self.place:
                raise BadInput(f"{where}: its image is {text!r}, the index of no row; mend it")
            text = self.rows[self.place[text]]["image"]
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as e:
            raise BadInput(f"{where}: its image is not base64 ({e}); fetch the file again") from e


def listed(text):
    """A picture, or several as Python writes a list of texts."""
    if text and text.startswith("["):
        try:
            return [str(item) for item in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return [text]  # which is then no base64
    return [text]


def wording(hint, question, options):
    """How VLMEvalKit asks."""
    lines = [f"Hint: {hint}"] if hint else []
    lines += [f"Question: {question}", "Options:"]
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([*lines, "Please select the correct answer from the options above. \n"])
