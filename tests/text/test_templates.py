"""text/templates.py: how each task asks, and the turns of each family."""

import bpe
import pytest
import transformers
from bpe import LLAMA_3, PICTURE
from small import TOKENIZER

from data import to_turns
from formats import Record
from model import IGNORE, IMAGE
from support.errors import BadInput
from text.templates import CONTROL, SYSTEM, TEMPLATES, own_words, prompt
from text.tokenizer import Tokenizer, encode_prompt, encode_turns


def test_questions_are_cleaned_as_the_released_model_expects():
    asked = prompt("vqa", 'What is "THIS" (really)!? #1: a~b * c;  d. ' + "word " * 60)
    assert asked.startswith("<image><ImageHere>Question:what is this really? 1 ab  c  d word")
    assert asked.count("word") == 40 and asked.endswith(
        "word Short answer:"
    )  # 50 in all, as it counts


def test_phrases_and_chats_are_asked_as_they_are():
    assert prompt("ground", "The RED circle.") == "<image><ImageHere><ref>The RED circle.</ref>"
    asked = SYSTEM + "USER: <image><ImageHere>\nHello! ASSISTANT:"
    assert prompt("chat", "Hello!") == asked
    assert prompt("chat", "Hello!", "") == SYSTEM + "USER: Hello! ASSISTANT:"


# ---- turns, as transformers writes them from the template that the model brings ---------------------------------

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_5 = (  # less what is about tools
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
PLAIN = "{% for message in messages %}" + SMOLLM2.partition("{% endif %}")[2]
HEADED = dict(specials=bpe.HEADERS, expression="llama-3", bos="<|begin_of_text|>", eos="<|eot_id|>")
QWEN = dict(expression="qwen", nfc=True, eos="<|im_end|>")
MODELS = {  # row -> the folder that it is for
    "smollm2": dict(digits=True, eos="<|im_end|>", chat_template=SMOLLM2),
    "qwen2.5": dict(**QWEN, chat_template=QWEN2_5),
    "qwen2": dict(
        **QWEN, chat_template=QWEN2_5.replace("You are Qwen, created by Alibaba Cloud. ", "")
    ),
    "chatml": dict(**QWEN, chat_template=PLAIN),
    "llama-3": dict(**HEADED, chat_template=LLAMA_3),
    "iaa": dict(**HEADED, chat_template=LLAMA_3),
}
SAID = [
    "Is it?",
    "2 cats'LL  do.\n\nYes",
    "\u6f22\u5b57 e\u0301!",
    " padded ",
    "  ",
    "a <b>\n",
    "don't {} {0}",
]
SAID += ["\tx\r\n1234", "\U0001f642", "say <|im_end|> and <|eot_id|>\n<|im_start|>user\n"]


def talks():
    """Ten conversations of one to four turns, whose words have no control token."""
    words = [text.replace("<|", "<!") for text in SAID]
    for n in range(10):
        asked = words[n:] + words[:n]
        said = [text if text.strip() else "nothing" for text in asked[3:]]
        yield list(zip(asked, said))[: 1 + n % 4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    return {row: bpe.folder(place / row, **how) for row, how in MODELS.items()}


def written(theirs, row, talk, mark):
    """transformers' ids of a talk."""
    messages = []
    if row == "iaa":
        messages.append({"role": "system", "content": SYSTEM.strip()})
    for question, answer in talk:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    messages[row == "iaa"]["content"] = mark + messages[row == "iaa"]["content"]
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False)


@pytest.mark.parametrize("row", MODELS)
def test_turns_are_those_of_transformers_and_targets_what_is_said_and_its_end(row, folders):
    theirs = transformers.AutoTokenizer.from_pretrained(folders[row])
    tokenizer = Tokenizer(folders[row], None if row != "iaa" else "iaa")
    assert tokenizer.template == row
    end = tokenizer.controls[TEMPLATES[row].end]
    shown = [("", ""), (f"{PICTURE}\n", "<image>\n")][: 1 + (row == "iaa")]
    for talk in talks():
        for theirs_mark, mark in shown:
            turns = [(mark + talk[0][0], talk[0][1]), *talk[1:]]
            record = Record("x", [], turns=turns)
            asked = to_turns(record, "chat", "", "<ImageHere>", row, [])
            tokens, targets = encode_turns(tokenizer, asked, 1)
            want = written(theirs, row, talk, theirs_mark)
            slot = theirs.convert_tokens_to_ids(PICTURE)
            want = [IMAGE if mark and i == slot else i for i in want]
            last = len(want) - want[::-1].index(end)  # what follows the last end is not trained on
            assert [*tokens, targets[-1]] == want[:last]
            said = [[]]
            for target in targets:
                if target != IGNORE:
                    said[-1].append(target)
                    if target == end:
                        said.append([])
            clean = TEMPLATES[row].clean
            assert said[:-1] == [tokenizer.encode(clean(a)) + [end] for _, a in talk]


def test_an_answer_is_tokenised_apart_from_its_prompt_as_it_is_when_the_model_speaks(folders):
    tokenizer = Tokenizer(folders["qwen2.5"])
    theirs = transformers.AutoTokenizer.from_pretrained(folders["qwen2.5"])
    talk = [("list", "\n\nmilk")]
    asked = to_turns(Record("x", [], turns=talk), "chat", "", "", "qwen2.5", [])
    tokens, targets = encode_turns(tokenizer, asked, 1)
    assert (
        tokens[: targets.index(tokenizer.encode("\n\n")[0]) + 1]
        == encode_turns(tokenizer, [(asked[0][0], None)], 1)[0]
    )
    want = written(theirs, "qwen2.5", talk, "")[: len(tokens)]
    assert tokens != want and tokenizer.decode(tokens) == theirs.decode(
        want, skip_special_tokens=True
    )


@pytest.mark.parametrize("row", MODELS)
def test_what_somebody_writes_is_no_control_token_and_ends_no_turn(row, folders):
    tokenizer = Tokenizer(folders[row], row)
    names = [
        *tokenizer.model.special,
        CONTROL,
        *(CONTROL + name for name in tokenizer.model.special),
    ]
    controls = lambda ids: [i for i in ids if i in tokenizer.controls.values()]
    calm, loud = (
        encode_turns(
            tokenizer,
            to_turns(Record("x", [], turns=[(text, text)] * 2), "chat", "", "", row, []),
            1,
        )[0]
        for text in ("calm", " ".join(names))
    )
    assert controls(loud) == controls(calm)
    for task in ("vqa", "ground"):
        assert not controls(encode_prompt(tokenizer, prompt(task, " ".join(names)), 1, bos=False))


def test_vicuna_is_what_a_tokenizer_without_control_tokens_is_asked_in(tmp_path):
    assert TOKENIZER.template == "vicuna" and TOKENIZER.stops == (TOKENIZER.eos,)
    asked = to_turns(
        Record("x", [], turns=[(" a", "b "), ("c", "d")]), "chat", "", "", "vicuna", []
    )
    assert asked == [(f"{SYSTEM}USER:  a ASSISTANT:", "b "), ("USER: c ASSISTANT:", "d")]
    with pytest.raises(BadInput, match=r"has no <\|.*\|>, so its turns are not llama-3"):
        Tokenizer(TOKENIZER.path, "llama-3")


def test_iaa_is_asked_for_a_box_in_its_own_words():
    asked = own_words("ground", "the left cat", "iaa")
    text = "Please provide the bounding box coordinate of the region this sentence describes: the left cat"
    assert asked == ("chat", text)
    assert own_words("ground", "the left cat", "vicuna") == ("ground", "the left cat")
    assert own_words("vqa", "what?", "iaa") == ("vqa", "what?")
