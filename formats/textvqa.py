"""TextVQA: {data: [{question_id, image_id, question, answers: ten}]}; the picture is image_id.jpg."""

from formats.json_index import JsonIndex
from formats.records import need
from formats.vqa import Vqa


class TextVqa(Vqa):
    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"), "data")
        self.lengths = self.records.lengths

    def picture(self, fields, where):
        return f"{need(fields, 'image_id', where)}.jpg"
