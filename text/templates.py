"""Tasks, prompts and turns."""

import re
from dataclasses import dataclass

HERE = "<ImageHere>"  # where the visual tokens go; reserved, so it may not stand in anybody's text
MARK = "<image><ImageHere>"  # what a conversation's <image> becomes; LLaVA's own models want HERE alone
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


PUNCTUATION = r"[.!\"()*#:;~]"
WORDS = 50  # at most


def plain_question(text):
    """Lower case, without punctuation, its spaces as they were: how the released model was asked."""
    words = re.sub(PUNCTUATION, "", text.lower()).rstrip(" ").split(" ")
    return " ".join(words[:WORDS])


def plain_caption(text):
    """Lower case, with a space for punctuation, and one between words: as BLIP-2 trains captions."""
    return " ".join(re.sub(PUNCTUATION, " ", text.lower()).split()[:WORDS])


@dataclass
class Task:
    template: str  # the prompt, {} for the text
    clean: object = str  # what is done to that text
    pad: bool = False  # pad to a square with the mean colour, instead of squashing


TASKS = {  # the prompts of captioning and of region captions are not published: those two are ours
    "caption": Task(MARK + "Short caption:"),
    "vqa": Task(MARK + "Question:{} Short answer:", plain_question),
    "ground": Task(MARK + "<ref>{}</ref>"),
    "region": Task(MARK + "{} Short phrase:"),
    "chat": Task("USER: {} ASSISTANT:", pad=True),
}


def chat_turn(question):
    return TASKS["chat"].template.format(question)


def prompt(task, text="", image_mark=MARK):
    """The full template of one question; of a chat its first turn, after the image (image_mark="": no image)."""
    if task != "chat":
        return TASKS[task].template.format(TASKS[task].clean(text))
    if image_mark:
        text = f"{image_mark}\n{text}"
    return SYSTEM + chat_turn(text)
