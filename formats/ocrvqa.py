"""OCR-VQA: an object, id -> {imageURL, questions, answers, split}; the picture is the id with the URL's ending."""

import os

import numpy as np

from formats.json_index import JsonIndex, count, id_number
from formats.records import named, need, need_list
from formats.vqa import Vqa
from support.errors import BadInput

SPLITS = {"train": 1, "val": 2, "test": 3}


class OcrVqa(Vqa):
    """A sample per question; the lists of questions and answers of a record are parallel."""

    def __init__(self, source):
        self.source = source
        path = source.path("annotations")
        self.records = JsonIndex(path, keyed="image_id", questions=count, split=id_number)
        tags = self.records.tags
        wanted = tags["split"] == SPLITS[source.split_of(SPLITS)]
        self.ends = np.where(wanted, tags["questions"], 0).cumsum()  # of the samples of each record
        self.lengths = np.full(self.ends[-1:].sum(), 64)

    def fields(self, number):
        record = self.ends.searchsorted(number, "right")
        where = f"{self.records.path}: record {record}"
        fields = self.records.read(record, where)
        where = named(where, fields, "image_id")
        questions = need_list(fields, "questions", where)
        answers = need_list(fields, "answers", where)
        if len(questions) != len(answers):
            raise BadInput(
                f"{where}: {len(questions)} questions and {len(answers)} answers; mend or remove it"
            )
        which = number - self.ends[record] + len(questions)
        fields |= {
            "question_id": f"{fields['image_id']}-{which}",
            "question": questions[which] if questions else "",
            "answers": answers[which : which + 1],
        }
        return where, fields

    def picture(self, fields, where):
        _, ending = os.path.splitext(need(fields, "imageURL", where))
        return fields["image_id"] + ending
