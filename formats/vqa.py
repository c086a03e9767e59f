"""Reader of one format."""

import os
import re

from formats.files import read_at
from formats.json_index import json_at, json_index, match
from formats.records import Record, clean, need
from support.errors import BadInput


def official_name(source, path, index):
    """VQAv2 names a picture by its number alone: COCO_<data_subtype>_<12 digits>.jpg, unless `image_name` says else."""
    if source.image_name or not len(index):
        return source.image_name
    start, stop = int(index[0, 0]), int(index[-1, 1])
    around = read_at(path, 0, start) + read_at(path, stop, os.path.getsize(path) - stop)
    found = re.search(rb'"data_subtype"\s*:\s*"([\w-]+)"', around)
    if not found:
        raise BadInput(
            f"{path}: has no 'data_subtype'; add image_name = \"{{:012d}}.jpg\" to {source.toml}"
        )
    return f"COCO_{found[1].decode()}_{{:012d}}.jpg"


def vqa(source):
    """VQAv2's pair of files (`questions`, `annotations`), or one list of {image, question, answers}."""
    paired = source.questions is not None
    path = source.path("questions" if paired else "annotations")
    index = json_index(path, "questions", "question_id") if paired else json_index(path)
    other = (
        source.path("annotations") if paired and source.annotations else None
    )  # a test split has no answers
    if paired:
        template = official_name(source, path, index)
    if other:
        notes = json_index(other, "annotations", "question_id")
        joined = match(index[:, 2], notes[:, 2])

    def read(number):
        where = f"{path}: record {number}"
        fields = json_at(path, *index[number, :2].tolist(), where)
        question = need(fields, "question", str, where)
        if paired:
            image = need(fields, "image_id", int, where)
            try:
                name = template.format(image)
            except (ValueError, LookupError) as e:
                raise BadInput(
                    f"{where}: image_name {template!r} does not take its image_id ({e}); mend it"
                ) from e
        else:
            name = need(fields, "image", str, where)
        if other:
            if joined[number] < 0:
                raise BadInput(f"{where}: {other} has no answer to its question_id; remove it")
            fields |= json_at(other, *notes[joined[number], :2].tolist(), f"{where}, its answers")
        answers = fields.get("answers", fields.get("answer", []))
        answers = (
            [answers]
            if isinstance(answers, str)
            else need({"answers": answers}, "answers", list, where)
        )
        answers = [
            clean(a.get("answer") if isinstance(a, dict) else a, where).strip() for a in answers
        ]
        if source.train and not answers:
            raise BadInput(f"{where}: has no answers; remove it")
        return Record(where, [source.image(name, where)], question, answers, fields=fields)

    return index[:, 1] - index[:, 0], None, read
