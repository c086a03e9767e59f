"""TextCaps: {data: [{image_id, caption_str, reference_strs}]}, a record per caption; the picture is image_id.jpg.

Training takes every caption once; evaluation every picture once, with all its captions as references."""

import numpy as np

from formats.json_index import JsonIndex, id_number
from formats.records import Record, clean, named, need, need_list


class TextCaps:
    images = 1

    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"), "data", image_id=id_number)
        self.order = np.arange(len(self.records.lengths))
        if not source.train:
            _, first = np.unique(self.records.tags["image_id"], return_index=True)
            self.order = np.sort(first)
        self.lengths = self.records.lengths[self.order].clip(max=64)

    def read(self, number):
        record = self.order[number]
        where = f"{self.records.path}: record {record}"
        fields = self.records.read(record, where)
        where = named(where, fields, "caption_id")
        image = self.source.image(f"{need(fields, 'image_id', where)}.jpg", where)
        if self.source.train:
            answers = [need(fields, "caption_str", where)]
        else:
            answers = need_list(fields, "reference_strs", where)  # none in the test's file
            answers = [clean(answer, where) for answer in answers]
        return Record(where, [image], answers=answers, fields=fields)
