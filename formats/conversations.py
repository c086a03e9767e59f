"""LLaVA's JSON or JSONL: {id, image (none, one or a list), conversations: [{from: human|gpt, value}]}."""

from formats.json_index import JsonIndex
from formats.records import Record, clean, named, need, need_list
from support.errors import BadInput


class Conversations:
    def __init__(self, source):
        self.source = source
        self.records = JsonIndex(source.path("annotations"))
        self.lengths = self.records.lengths
        self.images = self.records.images

    def read(self, number):
        where = f"{self.records.path}: record {number}"
        fields = self.records.read(number, where)
        where = named(where, fields, "id")
        names = need_list(fields, "image", where)
        images = [self.source.image(clean(name, where), where) for name in names]
        turns = need_list(fields, "conversations", where)
        return conversation(where, turns, images, fields)


def conversation(where, turns, images, fields, add_marks=False):
    """[{from, value}, ...] and their pictures -> Record. `add_marks`: where no turn has one, pictures come first."""
    turns = to_pairs(turns, where)
    marks = sum(question.count("<image>") for question, _ in turns)
    if add_marks and not marks:
        marks = len(images)
        question, answer = turns[0]
        turns[0] = "<image>\n" * marks + question, answer
    if marks != len(images):
        raise BadInput(f"{where}: {marks} <image> for {len(images)} images; mend or remove it")
    if marks == 1:
        turns = [(in_front(question), answer) for question, answer in turns]
    answers = [answer for _, answer in turns]
    return Record(where, images, answers=answers, turns=turns, fields=fields)


def in_front(question):
    """The picture before the question, wherever its mark stands: so LLaVA trains, and so everybody asks."""
    if "<image>" not in question:
        return question
    text = question.replace("<image>", "").strip()
    return f"<image>\n{text}".strip()


def to_pairs(turns, where):
    """[{from, value}, ...] -> [(question, answer), ...]."""
    speakers = [need(turn, "from", where) for turn in turns]
    texts = [clean(turn.get("value"), where) for turn in turns]
    if speakers[:1] != ["human"]:  # as LLaVA does: some begin with half a turn
        del speakers[:1], texts[:1]
    pairs = len(texts) // 2  # nobody answered a last question
    if pairs == 0 or speakers[: 2 * pairs] != ["human", "gpt"] * pairs:
        raise BadInput(
            f"{where}: turns must alternate between 'human' and 'gpt'; mend or remove it"
        )
    return list(zip(texts[0::2], texts[1::2]))
