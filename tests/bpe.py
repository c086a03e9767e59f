"""Byte-level BPE trained by the `tokenizers` library as GPT-2's, LLaMA-3's and Qwen's were, and strings to try it on."""

import json
import random
import sys
import unicodedata
from collections import defaultdict
from functools import cache

import tiny
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from text.bpe import GPT_2

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {"gpt-2": GPT_2, "llama-3": QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"), "qwen": QWEN}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
PICTURE = "<|reserved_special_token_44|>"  # what the released IAA has in the place of a picture
HEADERS += ["<|eot_id|>", PICTURE]
LLAMA_3 = (  # its chat_template
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@cache
def characters():
    """{category: its characters}, of all that Python's Unicode knows and a text can have."""
    found = defaultdict(list)
    for n in range(sys.maxunicode + 1):
        found[unicodedata.category(chr(n))].append(chr(n))
    del found["Cs"], found["Cn"]
    return list(found.values())


SCRAPS = [
    "'s",
    "'S",
    "'ll",
    "'Ll",
    "'RE",
    "'\u017f",
    "\r\n",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "\x1c",
    "\x85",
]
SCRAPS += [
    "e\u0301",
    "\u1100\u1161\u11a8",
    "\u00c5",
    "12345",
    "0.12",
    "\u0663\u06f4",
    "don't",
    " the",
    "The",
]
SCRAPS += ["aaaaaaaaaaaaa", " picture", "\U0001f642", "\u6f22\u5b57", "\ufdd0", *CHATML, *HEADERS]


def strings(count, seed=0):
    """Pieces of text, spaces, contractions, names of control tokens, and characters of every category."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 25)):
            part = rng.choice(rng.choice([SCRAPS, rng.choice(characters())]))
            parts.append(part * rng.choice([1, 1, 1, 2, 5]))
        yield "".join(parts)


@cache
def trained(expression, nfc=False, digits=False, size=900):
    """The tokenizer.json as a dict, without special tokens: trained on what the project says of itself."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if expression != "gpt-2":
        steps.append(pre_tokenizers.Split(Regex(EXPRESSIONS[expression]), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression == "gpt-2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    texts = [(tiny.ROOT / name).read_text() for name in ("README.md", "LOG.md", "docs/DATA.md")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*texts, *strings(300, seed=1)], trainer)
    return json.loads(tokenizer.to_str())


def folder(path, specials=CHATML, bos=None, eos=None, chat_template=None, **how):
    """A user's folder: tokenizer.json with these special tokens, and what stands beside it."""
    tokenizer = tokenizers.Tokenizer.from_str(
        json.dumps(trained(how.pop("expression", "gpt-2"), **how))
    )
    tokenizer.add_special_tokens(specials)
    if bos:
        pair = (bos, tokenizer.token_to_id(bos))
        single = f"{bos} $A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[pair]
        )
    path.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": eos, "bos_token": bos, "chat_template": chat_template}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    return path
