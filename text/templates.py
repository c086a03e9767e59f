"""Tasks, prompts and turns."""

import re
from dataclasses import dataclass, field

HERE = "<ImageHere>"  # where the visual tokens go; reserved, so it may not stand in anybody's text
MARK = "<image><ImageHere>"  # what a conversation's <image> becomes; LLaVA's own models want HERE alone
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CONTROL = "\ufdd0"  # in a prompt the next <...> is a control token; no text keeps this character

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
    "chat": Task("{}", pad=True),  # as the model's template has it
}


@dataclass
class Template:
    """Turns, as a model was trained with them. {} is what somebody says."""

    turn: str  # a question, up to where its answer begins
    opening: str = "{}"  # the system turn
    system: str = ""  # what that says; nothing: there is none
    end: str = ""  # the control token that ends an answer; none: the tokenizer's EOS
    between: str = ""  # what stands behind it, where another turn follows
    clean: object = str  # what is done to questions and answers
    tasks: dict = field(default_factory=dict)  # which sample.py asks in a turn, in these words

    @property
    def controls(self):
        return set(re.findall(f"{CONTROL}(<[^>]+>)", self.opening + self.turn))


START, END = (f"{CONTROL}<|im_{name}|>" for name in ("start", "end"))
CHATML = dict(
    opening=f"{START}system\n{{}}{END}\n",
    turn=f"{START}user\n{{}}{END}\n{START}assistant\n",
    end="<|im_end|>",
    between="\n",
)
HEAD, NECK, EOT = (
    f"{CONTROL}<|{name}|>" for name in ("start_header_id", "end_header_id", "eot_id")
)
LLAMA_3 = dict(
    opening=f"{HEAD}system{NECK}\n\n{{}}{EOT}",
    turn=f"{HEAD}user{NECK}\n\n{{}}{EOT}{HEAD}assistant{NECK}\n\n",
    end="<|eot_id|>",
    clean=str.strip,
)
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2 = "You are a helpful assistant."
IAA_GROUND = "Please provide the bounding box coordinate of the region this sentence describes: {}"
TEMPLATES = {  # the first that fits a tokenizer is taken
    "smollm2": Template(**CHATML, system=SMOLLM2),
    "qwen2.5": Template(**CHATML, system=f"You are Qwen, created by Alibaba Cloud. {QWEN2}"),
    "qwen2": Template(**CHATML, system=QWEN2),
    # without a system turn. For Qwen3 our choice: its own puts an empty <think> before an answer
    "chatml": Template(**CHATML),
    "iaa": Template(**LLAMA_3, system=SYSTEM.strip(), tasks={"ground": IAA_GROUND}),
    "llama-3": Template(**LLAMA_3),  # 3.0's own; 3.1 and 3.2 put a system turn with a date in front
    "vicuna": Template("USER: {} ASSISTANT:", system=SYSTEM),
}


def own_words(task, text, template):
    """(task, text): a chat in the template's own words, where the model was trained on the task like that."""
    words = TEMPLATES[template].tasks.get(task)
    return ("chat", words.format(text)) if words else (task, text)


def as_text(text):
    """What somebody wrote can name a control token, but not be one."""
    return text.replace(CONTROL, "")


def chat_turn(question, template="vicuna", first=False):
    """A question of a chat, up to where its answer begins; of the first one with what stands before it."""
    row = TEMPLATES[template]
    before = row.between
    if first:
        before = row.opening.format(row.system) if row.system else ""
    return before + row.turn.format(as_text(row.clean(question)))


def prompt(task, text="", image_mark=MARK, template="vicuna"):
    """The full prompt of one question; of a chat its first turn, after the image (image_mark="": no image).

    Tasks other than chat are asked without turns, whatever the template."""
    if task != "chat":
        return TASKS[task].template.format(as_text(TASKS[task].clean(text)))
    if image_mark:
        text = f"{image_mark}\n{text}"
    return chat_turn(text, template, first=True)
