"""A task with its own prompt: how many of something there are.

    python -m examples.count train --stage 2 --data counts.toml
    python -m examples.count sample --image PICTURE --task count --prompt "red circles"
    python -m examples.count evaluate --data counts.toml

A [[source]] of counts.toml has `format = "vqa"` and `task = "count"`; its records are
{"image": "1.png", "question": "red circles", "answers": ["2"]}.
"""

import train
from formats import FORMATS
from sample import DECODING
from text.templates import MARK, TASKS, Task, plain_question

TASKS["count"] = Task(MARK + "How many {}? Number:", plain_question)
DECODING["count"] = dict(max_new_tokens=5)
FORMATS["vqa"][1].append("count")  # the tasks that a source of this format may name

if __name__ == "__main__":
    train.fork()
