"""A list of {img_name, bbox: [x1,y1,x2,y2], sentences: [{sent, sent_id}], segment_id}: a sample per sentence."""

import numpy as np

from formats.json_index import JsonIndex, count
from formats.records import Record, named, need, need_list


class RefCoco:
    images = 1

    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"), sentences=count)
        self.ends = self.records.tags["sentences"].cumsum()  # of the samples of each record
        # a record's bytes grow with its sentences, a sample's do not
        self.lengths = np.full(self.ends[-1:].sum(), 64)

    def read(self, number):
        record = self.ends.searchsorted(number, "right")
        where = f"{self.records.path}: record {record}"
        fields = self.records.read(record, where)
        where = named(where, fields, "segment_id")
        sentences = need_list(fields, "sentences", where)
        which = number - self.ends[record]  # counted from the last, -1
        sentence = sentences[which] if sentences else None
        phrase = need(sentence, "sent", where)
        where = named(where, sentence, "sent_id")
        fields |= sentence
        image = self.source.image(need(fields, "img_name", where), where)
        box = tuple(need_list(fields, "bbox", where))
        return Record(where, [image], phrase, [phrase], box, fields=fields)
