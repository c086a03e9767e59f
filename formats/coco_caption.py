"""The official captions JSON: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}.

Training takes every caption once; evaluation every image once, with all its captions as references."""

import numpy as np

from formats.json_index import JsonIndex, id_number
from formats.records import Record, named, need


class CocoCaption:
    images = 1

    def __init__(self, source):
        self.source = source
        self.path = source.path("annotations")
        self.pictures = JsonIndex(self.path, "images", id=id_number)
        self.captions = JsonIndex(self.path, "annotations", image_id=id_number)
        self.order = np.argsort(
            self.captions.tags["image_id"], kind="stable"
        )  # an image's captions together
        image_ids = self.captions.tags["image_id"][self.order]
        first = np.arange(len(image_ids))
        if not source.train:
            _, first = np.unique(image_ids, return_index=True)
        self.bounds = np.append(first, len(image_ids))
        self.owner = self.pictures.find(image_ids[first], "id")
        self.lengths = self.captions.lengths[self.order[first]]

    def read(self, number):
        first, last = self.bounds[number : number + 2]
        where = f"{self.path}: annotation {self.order[first]}"
        captions = [self.captions.read(n, where) for n in self.order[first:last]]
        where = named(where, captions[0], "id")
        image = self.pictures.read(self.owner[number], f"{where}, its image")
        answers = [need(fields, "caption", where) for fields in captions]
        file = self.source.image(need(image, "file_name", where), where)
        return Record(where, [file], answers=answers, fields={**image, **captions[0]})
