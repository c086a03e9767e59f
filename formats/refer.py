"""RefCOCO, RefCOCO+ and RefCOCOg as they are published: refs(unc).p or refs(umd).p, beside instances.json.

A sample per sentence of the refs of a split, chosen as the sets' own loader does. Its box and its picture's name
stand in instances.json."""

import io
import json
import pickle

import numpy as np

from formats.files import indexed
from formats.json_index import JsonIndex, id_number
from formats.records import Record, corners, named, need, need_list
from support.errors import BadInput
from support.files import whole

SPLITS = {  # name -> whether a ref's own split belongs to it: there is a testAB
    "train": "train".__eq__,
    "val": "val".__eq__,
    "test": lambda split: "test" in split,
    "testA": lambda split: "A" in split,
    "testB": lambda split: "B" in split,
    "all": lambda split: True,
}


class PlainUnpickler(pickle._Unpickler):
    """Of plain values: whatever else a pickle names is refused, so that nothing in it can run.

    Python's own in Python: the one in C reserves as much memory as a file asks for."""

    def find_class(self, module, name):
        raise ValueError(f"it names {module}.{name}, where only plain values belong")


def sentence_lines(path):
    """A line of JSON per sentence, as an array of bytes: the pickle is read once and not held in memory."""
    raw = whole(path)
    lines, size = [], 0
    try:
        for ref in PlainUnpickler(io.BytesIO(raw), encoding="utf-8", errors="replace").load():
            kept = {name: ref[name] for name in ("ref_id", "ann_id", "image_id")}
            kept["split"] = str(ref["split"])
            for said in ref["sentences"]:
                lines.append(json.dumps({**kept, "sent_id": said["sent_id"], "sent": said["sent"]}))
                size += len(lines[-1])
                if size > 2**16 + 4 * len(raw):  # one text may stand in many places
                    raise ValueError("more text than the file has")
    except Exception as e:  # bytes that are no pickle of refs raise almost anything
        raise BadInput(f"{path}: cannot be read as refs ({e!r:.200}); fetch it again") from e
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


class Refer:
    images = 1

    def __init__(self, source):
        self.source = source
        self.path = source.path("annotations")
        chosen = SPLITS[source.split_of(SPLITS)]
        instances = source.path("instances")
        self.boxes = JsonIndex(instances, "annotations", id=id_number)
        self.pictures = JsonIndex(instances, "images", id=id_number)
        lines = indexed(self.path, "refer", sentence_lines).tobytes().splitlines()
        refs = [json.loads(line) for line in lines]
        taken = [n for n, ref in enumerate(refs) if chosen(ref["split"])]
        self.lines = [lines[n] for n in taken]
        box_ids = [id_number(refs[n]["ann_id"]) for n in taken]
        picture_ids = [id_number(refs[n]["image_id"]) for n in taken]
        self.box_of = self.boxes.find(box_ids, "id")
        self.picture_of = self.pictures.find(picture_ids, "id")
        self.lengths = np.full(len(taken), 64)

    def read(self, number):
        fields = json.loads(self.lines[number])
        where = named(named(self.path, fields, "ref_id"), fields, "sent_id")
        phrase = need(fields, "sent", where)
        instance = self.boxes.read(self.box_of[number], f"{where}, its instance")
        picture = self.pictures.read(self.picture_of[number], f"{where}, its picture")
        # the ref has a file_name too, with the ref's number in it
        fields["img_name"] = need(picture, "file_name", where)
        image = self.source.image(fields["img_name"], where)
        box = corners(need_list(instance, "bbox", where), where)
        return Record(where, [image], phrase, [phrase], box, fields=fields)
