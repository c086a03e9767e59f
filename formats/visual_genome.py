"""Visual Genome's regions: [{id, regions: [{region_id, phrase, x, y, width, height}]}], a sample per region.

The picture is id.jpg, in VG_100K or VG_100K_2. Some regions lead out of it; what lies inside counts."""

import os

import numpy as np

from formats.json_index import JsonIndex, count
from formats.pictures import peek
from formats.records import Record, corners, named, need, need_list


class VisualGenome:
    images = 1

    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"), regions=count)
        self.ends = self.records.tags["regions"].cumsum()  # of the samples of each record
        self.lengths = np.full(self.ends[-1:].sum(), 64)

    def read(self, number):
        record = self.ends.searchsorted(number, "right")
        where = f"{self.records.path}: record {record}"
        fields = self.records.read(record, where)
        where = named(where, fields, "id")
        regions = need_list(fields, "regions", where)
        region = regions[number - self.ends[record]] if regions else None
        phrase = need(region, "phrase", where)
        where = named(where, region, "region_id")
        name = f"{fields.get('id')}.jpg"
        image = self.source.image(f"VG_100K/{name}", where)
        if not os.path.exists(image[0]):
            image = self.source.image(f"VG_100K_2/{name}", where)
        box = corners([region.get(side) for side in ("x", "y", "width", "height")], where)
        width, height = peek(image, where).size
        box = tuple(np.clip(box, 0, (width, height, width, height)).tolist())
        fields = {"img_name": name, "sent_id": region.get("region_id")}
        return Record(where, [image], phrase, [phrase], box, fields=fields)
