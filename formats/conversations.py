"""Reader of one format."""

from formats.json_index import json_at, json_index
from formats.records import Record, clean, need
from support.errors import BadInput


def conversations(source):
    """LLaVA's JSON or JSONL: {id, image (none, one or a list), conversations: [{from: human|gpt, value}]}."""
    path = source.path("annotations")
    index = json_index(path)

    def read(number):
        where = f"{path}: record {number}"
        fields = json_at(path, *index[number, :2].tolist(), where)
        names = fields.get("image") or []
        names = (
            [names]
            if isinstance(names, str)
            else need(fields, "image", list, where)
            if names
            else []
        )
        said = need(fields, "conversations", list, where)
        if not all(isinstance(turn, dict) for turn in said):
            raise BadInput(
                f"{where}: a turn is no object with 'from' and 'value'; mend or remove it"
            )
        said = [(need(turn, "from", str, where), clean(turn.get("value"), where)) for turn in said]
        if said and said[0][0] != "human":
            said = said[1:]  # as LLaVA does: some begin with a half turn
        said = said[: len(said) // 2 * 2]  # a last question that nobody answered
        if not said or [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
            raise BadInput(
                f"{where}: turns must alternate between 'human' and 'gpt'; mend or remove it"
            )
        turns = [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]
        marks = sum(question.count("<image>") for question, _ in turns)
        if marks != len(names):
            raise BadInput(f"{where}: {marks} <image> for {len(names)} images; mend or remove it")
        refs = [source.image(clean(name, where), where) for name in names]
        return Record(
            where, refs, answers=[answer for _, answer in turns], turns=turns, fields=fields
        )

    return index[:, 1] - index[:, 0], index[:, 3], read
