"""Reader of one format."""

import numpy as np

from formats.json_index import json_at, json_index, match
from formats.records import Record, need
from support.errors import BadInput


def coco_caption(source):
    """The official captions JSON: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}.
    Training takes every caption once; evaluation every image once, with all its captions as references."""
    path = source.path("annotations")
    images, captions = (
        json_index(path, *by) for by in (("images", "id"), ("annotations", "image_id"))
    )
    captions = captions[np.argsort(captions[:, 2], kind="stable")]  # an image's captions together
    first = (
        np.arange(len(captions))
        if source.train
        else np.unique(captions[:, 2], return_index=True)[1]
    )
    last = np.append(first[1:], len(captions))
    owner = match(captions[first, 2], images[:, 2])

    def read(number):
        where = f"{path}: caption {number}"
        if owner[number] < 0:
            raise BadInput(f"{where}: no entry of 'images' has its image_id; mend or remove it")
        each = [
            json_at(path, *span, where)
            for span in captions[first[number] : last[number], :2].tolist()
        ]
        image = json_at(path, *images[owner[number], :2].tolist(), f"{where}, its image")
        answers = [need(fields, "caption", str, where) for fields in each]
        refs = [source.image(need(image, "file_name", str, where), where)]
        return Record(where, refs, answers=answers, fields={**image, **each[0]})

    return captions[first, 1] - captions[first, 0], None, read
