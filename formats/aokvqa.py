"""A-OKVQA: [{question_id, image_id, question, direct_answers: ten}]; the picture is COCO 2017's of that number."""

from formats.json_index import JsonIndex
from formats.vqa import Vqa


class AokVqa(Vqa):
    image_name = "{:012d}.jpg"

    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"))
        self.lengths = self.records.lengths.clip(max=64)  # most of a record are its rationales
