"""GQA: an object, question id -> {imageId, question, answer, types}; the picture is imageId.jpg."""

from formats.json_index import JsonIndex
from formats.records import need
from formats.vqa import Vqa


class Gqa(Vqa):
    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"), keyed="question_id")
        self.lengths = self.records.lengths.clip(max=64)  # most of a record is no text

    def fields(self, number):
        where, fields = super().fields(number)
        types = fields.pop("types", None)
        if isinstance(types, dict):
            fields["type"] = types.get("structural")  # verify, query, choose, logical or compare
        return where, fields

    def picture(self, fields, where):
        return f"{need(fields, 'imageId', where)}.jpg"
