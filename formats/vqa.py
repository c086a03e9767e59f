"""VQAv2's pair of files (`questions`, `annotations`), or one list of {image, question, answers}."""

import re

from formats.json_index import JsonIndex, id_number
from formats.records import Record, clean, named, need, need_list
from support.errors import BadInput
from support.files import whole

PLACE = re.compile(r"[^{}]*(\{(:0?\d{1,2}d)?\})?[^{}]*")  # of an image_id in a file's name


ANSWERS = ("answers", "direct_answers", "answer")  # the field that has them


class Vqa:
    """Other sets of questions are kinds of it: they say where `records` lie and what `picture` is called."""

    images = 1
    answers = None  # the other file's records; a test split has none

    def __init__(self, source):
        self.source = source
        self.image_name = None
        if source.questions:
            path = source.path("questions")
            self.records = JsonIndex(path, "questions", question_id=id_number)
            self.image_name = source.image_name or official_name(path, source)
            if not PLACE.fullmatch(self.image_name):
                source.wrong(
                    f"`image_name` is {self.image_name!r}; it may hold one {{}} or {{:012d}}"
                )
            if source.annotations:
                path = source.path("annotations")
                self.answers = JsonIndex(path, "annotations", question_id=id_number)
                self.answer_of = self.answers.find(self.records.tags["question_id"], "question_id")
        else:
            self.records = JsonIndex(source.path("annotations"))
        self.lengths = self.records.lengths

    def read(self, number):
        where, fields = self.fields(number)
        question = need(fields, "question", where)
        image = self.source.image(self.picture(fields, where), where)
        name = next((name for name in ANSWERS if name in fields), "answer")
        answers = need_list(fields, name, where)
        answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
        answers = [clean(answer, where).strip() for answer in answers]
        if self.source.train and not answers:
            raise BadInput(f"{where}: has no answers; remove it")
        return Record(where, [image], question, answers, fields=fields)

    def fields(self, number):
        """(where it stands, the record of a question)"""
        where = f"{self.records.path}: record {number}"
        fields = self.records.read(number, where)
        where = named(where, fields, "question_id")
        if self.answers:
            fields |= self.answers.read(self.answer_of[number], f"{where}, its answers")
        return where, fields

    def picture(self, fields, where):
        if not self.image_name:
            return need(fields, "image", where)
        try:
            return self.image_name.format(fields.get("image_id"))
        except (ValueError, LookupError, TypeError) as e:
            raise BadInput(
                f"{where}: image_name {self.image_name!r} does not take its image_id ({e}); mend it"
            ) from e


def official_name(path, source):
    """VQAv2 names a picture by its number alone: COCO_<data_subtype>_<12 digits>.jpg."""
    found = re.search(rb'"data_subtype"\s*:\s*"([\w-]+)"', whole(path))
    if not found:
        raise BadInput(
            f"{path}: has no 'data_subtype'; add image_name = \"{{:012d}}.jpg\" to {source.toml}"
        )
    return f"COCO_{found[1].decode()}_{{:012d}}.jpg"
