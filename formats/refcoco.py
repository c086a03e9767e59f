"""Reader of one format."""

import numpy as np

from formats.json_index import json_at, json_index
from formats.records import Record, need
from support.errors import BadInput


def refcoco(source):
    """A list of {img_name, bbox: [x1,y1,x2,y2], sentences: [{sent, sent_id}], segment_id}: a sample per sentence."""
    path = source.path("annotations")
    index = json_index(path, by="sentences")

    def read(number):
        start, stop, which, _ = index[number].tolist()
        where = f"{path}: sample {number}"
        fields = json_at(path, start, stop, where)
        sentences = need(fields, "sentences", list, where)
        if which >= len(sentences) or not isinstance(sentences[which], dict):
            raise BadInput(
                f"{where}: its 'sentences' are no list of objects with 'sent'; mend or remove it"
            )
        fields |= sentences[which]
        phrase = need(fields, "sent", str, where)
        refs = [source.image(need(fields, "img_name", str, where), where)]
        return Record(
            where, refs, phrase, [phrase], tuple(need(fields, "bbox", list, where)), fields=fields
        )

    return (
        np.full(len(index), 64),
        None,
        read,
    )  # a record's bytes grow with its sentences, a sample's do not
