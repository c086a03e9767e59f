"""What the trained model says: the tasks, and a chat.

    python sample.py --image scene.png                                           # chat with the newest model of out/
    python sample.py --image scene.png --task ground --prompt "the small red circle" --save boxed.png
    python sample.py --image photos/ --task caption --save sheet.png             # a folder: one line a picture
    python sample.py --image scene.png --task vqa --prompt "what colour is the circle?" --json
    python sample.py --ckpt llava-1.5-7b-hf/ --image cat.jpg --prompt "What is the cat doing?"
    python sample.py --ckpt InfMLLM_7B.bin --tokenizer vicuna-7b-v1.5/ --image cat.jpg
    python sample.py --ckpt out/stage1 --branch out/mm --image scene.png         # a branch of inner adaptors (IAA)

A call is answered by one branch. It sees the pictures; what is asked without one is answered by its base alone.
In a chat: /image FILE takes another picture, /reset forgets what was said, /box on draws the boxes that the model
names, Ctrl-C stops an answer, Ctrl-D ends.
"""

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import weights
from formats.pictures import WHOLE, padded_region, peek, to_square, upright
from formats.records import clean
from model import IMAGE, PRESETS, Cache
from support.drawing import NAMED, check_target, draw_boxes, sheet, write_picture
from support.errors import BadInput, complain
from support.files import read_json
from support.processes import on_signals
from text.boxes import format_box, parse_box
from text.templates import HERE, MARK, TASKS, chat_turn, prompt
from text.tokenizer import Tokenizer, encode_prompt

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: at once, but in a chat's answer

DECODING = {  # as released (captions: min 8); a box of ours takes up to 30 of LLaMA's pieces, hence some more room
    "caption": dict(beams=5, max_new_tokens=30, min_new_tokens=8),
    "vqa": dict(beams=5, max_new_tokens=10, length_penalty=0.0),
    "ground": dict(beams=5, max_new_tokens=40),
    "region": dict(beams=5, max_new_tokens=30),
    "chat": dict(beams=1, max_new_tokens=1024),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

ROWS = 8  # pictures of a folder that are answered together

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


# ---------------------------------------------------------------------------------------------------------------------
# Generation. Names of dimensions: B prompts, K beams, T tokens of the longest prompt, V vocabulary
@torch.inference_mode()
def generate_ids(
    model,
    images,
    tokens,
    image_index=None,
    max_new_tokens=64,
    min_new_tokens=0,
    eos=2,
    beams=1,
    length_penalty=1.0,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
) -> list[list[int]]:
    """The new ids of every prompt, up to and without the eos.

    images (N,3,S,S); tokens: ids per prompt, with runs of P*P times IMAGE; image_index: which image stands at each run
    (0, 1, 2, ... if not given). temperature 0 is greedy; else prompt i draws from the stream of seed + i, or of
    seed[i], whatever the batch.

    One branch a call: the active one where there are images, the base alone where there is none; never both.
    """
    if model.llm.active and not all(IMAGE in row for row in tokens):
        assert not any(IMAGE in row for row in tokens), (
            "text alone is the base's and not the branch's: two calls"
        )
        with model.using(None):
            return generate_ids(
                model,
                images,
                tokens,
                image_index,
                max_new_tokens,
                min_new_tokens,
                eos,
                beams,
                length_penalty,
                temperature,
                top_k,
                top_p,
                seed,
            )
    assert beams == 1 or temperature == 0, "beam search and sampling do not go together"
    x, pad = prefix(model, images, tokens, image_index)  # (B, T, D)
    B, T = x.shape[:2]
    if beams > 1:
        rows = beam_search(
            model.llm, x, pad, beams, max_new_tokens, min_new_tokens, eos, length_penalty
        )
    else:
        cache = Cache(model.config.llm, B, T + max_new_tokens, x.device, x.dtype, model.llm.inner)
        choose = (
            greedy
            if temperature == 0
            else sampler(temperature, top_k, top_p, seed, B, max_new_tokens, x.device)
        )
        new, done, ask = [], set(), 1 if x.device.type == "cpu" else 8
        for token in steps(model.llm, cache, x, pad, choose, max_new_tokens, min_new_tokens, eos):
            new.append(token)
            if len(new) % ask:
                continue  # asking waits for a GPU, which runs ahead of Python
            for ids in new[-ask:]:
                done.update(b for b, i in enumerate(ids.tolist()) if i == eos)
            if len(done) == B:
                break
        rows = torch.stack(new, 1).tolist() if new else [[] for _ in tokens]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def prefix(model, images, tokens, image_index=None):
    """Embeddings of the prompts (B,T,D), padded on the left, and pad (B,): None where all are of one length."""
    device, longest = model.llm.embed.weight.device, max(map(len, tokens))
    ids = torch.tensor(
        [[0] * (longest - len(row)) + row for row in tokens], device=device
    )  # (B, T)
    x = model.llm.ends.embed(ids.clamp(min=0))
    if torch.is_autocast_enabled(device.type):
        x = x.to(torch.get_autocast_dtype(device.type))
    at, cells = ids == IMAGE, model.config.visual_tokens
    runs = sum(row.count(IMAGE) for row in tokens) / cells
    index = list(range(len(images))) if image_index is None else list(image_index)
    assert runs == len(index), (
        f"the prompts have room for {runs:g} images ({cells} tokens each), not for {len(index)}"
    )
    if index:
        visual = model.encode_images(images.to(device))  # (N, P*P, D): each image once
        x[at] = visual[torch.tensor(index, device=device)].flatten(0, 1).to(x.dtype)
    pad = [longest - len(row) for row in tokens]
    return x, torch.tensor(pad, device=device) if any(pad) else None


def next_logits(llm, cache, x, pad):
    """x (B,T,D) -> logits (B,V) of what follows the last position; the others' are not made."""
    return llm.head(llm(x, cache, pad)[:, -1]).float()


def steps(llm, cache, x, pad, choose, max_new_tokens, min_new_tokens, eos):
    """Yields the next token of every row, (B,), and takes it into the cache when asked for another."""
    for n in range(max_new_tokens):
        logits = next_logits(llm, cache, x, pad)
        if n < min_new_tokens:
            logits.select(1, eos).fill_(-torch.inf)
        token = choose(logits, n)
        yield token
        x = F.embedding(token[:, None], llm.ends.embed.weight).to(x.dtype)  # (B, 1, D)


def greedy(logits, n):
    return logits.argmax(-1)


def sampler(temperature, top_k, top_p, seed, rows, length, device):
    seeds = range(seed, seed + rows) if isinstance(seed, int) else seed
    u = np.stack([np.random.default_rng(s).random(length) for s in seeds])  # one number a token
    u = torch.from_numpy(u).to(device)

    def choose(logits, n):
        p, ids = probabilities(logits / temperature, top_k, top_p)
        total = p.double().cumsum(-1)  # (B, top_k or V)
        at = torch.searchsorted(total, u[:, n : n + 1] * total[:, -1:], right=True)
        return ids.gather(1, at.clamp(max=p.shape[1] - 1))[:, 0]

    return choose


def probabilities(logits, top_k, top_p):
    """Of the top_k likeliest tokens, and of these the fewest that make up top_p: (B, k) falling, and their ids."""
    top, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))
    p = top.softmax(-1)
    return p.masked_fill(p.cumsum(-1) - p >= top_p, 0) if top_p < 1 else p, ids


def beam_search(llm, x, pad, K, max_new_tokens, min_new_tokens, eos, length_penalty):
    """The best of K beams per prompt, as transformers' generate finds it with early_stopping=False.

    Of the 2K best continuations those that end retire, if they are among the first K; the K best of the others run on
    (K at most can end, so there are enough). A prompt is done when K have retired and the worst of them beats, in
    score per length ** length_penalty, the best that still runs.

    The beams of a prompt are a tree: one row of the cache, to which each step adds K positions, and a mask of who
    descends from whom. So the prompt's keys and values are held and read once, and nothing is ever moved.
    """
    (B, T), device, none = x.shape[:2], x.device, -1e9
    cache = Cache(llm.config, B, T + K * (max_new_tokens - 1), device, x.dtype, llm.inner)
    own = torch.eye(K, dtype=torch.bool, device=device).expand(B, K, K)
    sees = torch.arange(T, device=device) >= (0 if pad is None else pad[:, None, None])
    sees = sees.expand(B, 1, T)  # (B, running beams, positions)
    tokens = torch.zeros(B, 1, 0, dtype=torch.long, device=device)  # of the running beams
    scores = torch.zeros(B, 1, device=device)  # right after the prompt: one beam
    retired = torch.full((B, K, max_new_tokens), eos, device=device)
    retired_scores = torch.full((B, K), none, device=device, dtype=torch.float32)
    undecided = torch.ones(B, 1, dtype=torch.bool, device=device)
    for n in range(1, max_new_tokens + 1):
        if n == 1:
            logits = next_logits(llm, cache, x, pad)[:, None]  # (B, 1, V)
        else:
            logits = llm.head(
                llm(x, cache, pad, tree=(T + n - 2, sees[:, None]))
            ).float()  # (B, K, V)
        gains, V = logits.log_softmax(-1), logits.shape[2]
        if n <= min_new_tokens:
            gains[:, :, eos] = -torch.inf
        assert V >= 2 * K, f"{K} beams need a vocabulary of {2 * K}, and this has {V}"
        best, at = (gains + scores[:, :, None]).flatten(1).topk(2 * K)  # (B, 2K)
        source, token = at // V, at % V
        told = torch.cat((take(tokens, source), token[:, :, None]), 2)  # (B, 2K, n)
        ended = (token == eos) | (n == max_new_tokens)

        retires = ended & undecided
        retires[:, K:] = False
        merged = torch.cat(
            (retired_scores, torch.where(retires, best / n**length_penalty, none)), 1
        )  # (B, 3K)
        retired_scores, which = merged.topk(K)
        retired = take(
            torch.cat((retired, F.pad(told, (0, max_new_tokens - n), value=eos)), 1), which
        )

        scores, which = (best + ended * none).topk(K)  # (B, K) run on
        undecided &= scores[:, :1] / n**length_penalty > retired_scores.amin(1, keepdim=True)
        if n == max_new_tokens or not undecided.any():
            break
        tokens = take(told, which)
        sees = torch.cat((take(sees, take(source, which)), own), 2)  # (B, K, T + K*n)
        x = llm.ends.embed(tokens[:, :, -1]).to(x.dtype)  # (B, K, D)
    return retired[:, 0].tolist()


def take(x, which):
    """x (B,K,...) at which (B,k) of its second dimension."""
    return x.gather(
        1, which.view(*which.shape, *[1] * (x.dim() - 2)).expand(*which.shape, *x.shape[2:])
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and text in, text out
def square(image, side, pad=False):
    """A picture as evaluation sees it, (3,S,S) uint8: squashed, or padded with the mean colour as in a chat."""
    return torch.from_numpy(
        to_square(image, side, padded_region(image.size) if pad else WHOLE).copy()
    ).permute(2, 0, 1)


def stack(squares, config):
    side = config.vit.image_size
    return torch.stack(squares) if squares else torch.zeros(0, 3, side, side, dtype=torch.uint8)


def check_length(ids, config, what):
    """An error, not a cut: a prompt without its end asks something else."""
    if len(ids) < config.llm.context:
        return
    raise BadInput(
        f"{what} has {len(ids)} tokens ({ids.count(IMAGE)} of them pictures) and the model's context is "
        f"{config.llm.context}; shorten it"
    )


def generate(model, tokenizer, images, prompts, pad=False, **settings) -> list[str]:
    """The answers to full templates with <ImageHere>. images: one entry a prompt, None, a PIL image or a list of them;
    the same object is encoded once. pad: as in a chat; settings: those of generate_ids."""
    tokens = [encode_prompt(tokenizer, text, model.config.visual_tokens) for text in prompts]
    for ids, text in zip(tokens, prompts):
        check_length(ids, model.config, f"the prompt {text[:60]!r}")
    images = [
        [] if entry is None else entry if isinstance(entry, list) else [entry] for entry in images
    ]
    for pictures, text in zip(images, prompts, strict=True):
        assert text.count(HERE) == len(pictures), (
            f"{text.count(HERE)} {HERE} in the prompt, {len(pictures)} images"
        )
    return answer(model, tokenizer, images, tokens, pad, **settings)


def answer(model, tokenizer, images, tokens, pad=False, **settings) -> list[str]:
    """The same for prompts in ids and lists of images; a conversation's past has ids that no text stands for."""
    if (
        model.llm.active and any(images) and not all(images)
    ):  # text alone is the base's: a call for each
        said, seed = {}, settings.pop("seed", 0)
        for seen in (True, False):
            which = [i for i, pictures in enumerate(images) if bool(pictures) == seen]
            said |= zip(
                which,
                answer(
                    model,
                    tokenizer,
                    [images[i] for i in which],
                    [tokens[i] for i in which],
                    pad,
                    seed=[seed + i for i in which],
                    **settings,
                ),
            )
        return [said[i] for i in range(len(tokens))]
    config = model.config
    different = {id(picture): picture for pictures in images for picture in pictures}
    index = [list(different).index(id(picture)) for pictures in images for picture in pictures]
    pixels = stack(
        [square(picture, config.vit.image_size, pad) for picture in different.values()], config
    )
    rows = generate_ids(model, pixels, tokens, index, eos=tokenizer.eos, **settings)
    return [
        tokenizer.decode(row[: config.llm.context - len(ids)]) for row, ids in zip(rows, tokens)
    ]


class Chat:
    """A conversation. What was said stays in the cache of keys and values; a turn computes only what is new."""

    def __init__(self, model, tokenizer, image=None):
        self.model, self.tokenizer, weight = model, tokenizer, model.llm.embed.weight
        self.cache = Cache(
            model.config.llm,
            1,
            model.config.llm.context,
            weight.device,
            weight.dtype,
            model.llm.inner,
        )
        self.start(image)

    def start(self, image=None):
        self.image, self.ids, self.cache.length = image, [], 0

    def ask(self, question, **chosen):
        """Yields the answer, a word or a part of one at a time. It may be left at any point, and the talk goes on."""
        with self.model.using(self.model.llm.active if self.image else None):
            yield from self.turn(question, **chosen)

    @torch.inference_mode()
    def turn(self, question, max_new_tokens=1024, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        model, tokenizer, config = self.model, self.tokenizer, self.model.config
        mark = config.image_mark if self.image else ""
        if self.ids:
            asked = [tokenizer.eos] + encode_prompt(tokenizer, chat_turn(question), 0, bos=False)
        else:
            asked = encode_prompt(tokenizer, prompt("chat", question, mark), config.visual_tokens)
        ids = self.ids + asked
        check_length(ids, config, "the conversation")
        pictures = (
            [square(self.image, config.vit.image_size, pad=True)]
            if self.image and not self.cache.length
            else []
        )
        x, _ = prefix(model, stack(pictures, config), [ids[self.cache.length :]])
        room = min(max_new_tokens, config.llm.context - len(ids))
        choose = (
            sampler(temperature, top_k, top_p, seed + len(ids), 1, room, x.device)
            if temperature
            else greedy
        )
        said, text, shown = [], "", 0
        for token in steps(model.llm, self.cache, x, None, choose, room, 0, tokenizer.eos):
            if not said:
                self.ids = ids  # the question counts once it has been read
            if token.item() == tokenizer.eos:
                break
            said.append(token.item())
            self.ids.append(token.item())
            text = tokenizer.decode(said)
            if text.endswith("\ufffd"):
                continue  # half of a character that comes in bytes
            yield text[shown:]
            shown = len(text)
        if text[shown:]:
            yield text[shown:]


# ---------------------------------------------------------------------------------------------------------------------
# Models from wherever they come
def newest(folder="out"):
    """The checkpoint that was written last in out/stage1, out/stage2, ..."""
    found = []
    for run in Path(folder).glob("stage*"):
        try:
            found.append(weights.find(run))
        except BadInput:
            continue  # a run that has saved nothing yet
    if not found:
        raise BadInput(
            f"{folder}/: holds no trained model; python train.py --stage all makes one, "
            "or name one with --ckpt"
        )
    return max(found, key=lambda path: (path / "config.json").stat().st_mtime)


def load_model(path=None, tokenizer=None, device=None, dtype=None, branch=None):
    """(model, tokenizer) from our directory, a LLaVA-1.5 folder or the released InfMLLM file; the newest of out/.
    branch: see take_branch."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[dtype] if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    path = Path(path) if path else newest()
    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_file():
        model, folder = weights.load_infmllm(path, PRESETS["infmllm-7b"](), dtype), path.parent
    elif (path / "config.json").is_file() and "model_type" in read_json(path / "config.json"):
        if read_json(path / "config.json")["model_type"] == "IAA":
            raise BadInput(f"{path}: {weights.LLAMA_3}; weights.load_iaa reads its weights")
        model, folder = weights.load_llava(path, dtype), path
    else:
        folder = weights.find(path)
        model = weights.load(folder, dtype=dtype)
    if not tokenizer and not (folder / "tokenizer.model").is_file():
        raise BadInput(f"{folder}: has no tokenizer.model; name LLaMA's with --tokenizer")
    tokenizer = Tokenizer(tokenizer or folder)
    if tokenizer.size > model.config.llm.vocab:
        raise BadInput(
            f"{tokenizer.path}: has {tokenizer.size} pieces, more than the {model.config.llm.vocab} of "
            f"{path}; name the tokenizer that belongs to the model"
        )
    if branch:
        take_branch(model, branch, dtype)
    return model.to(device).eval(), tokenizer


def take_branch(model, branch, dtype=None):
    """The branch that answers: one that the model has, one that is saved in a folder, or none, the base alone."""
    has = model.llm.branches
    if branch == "none":
        model.use(None)
    elif branch in has:
        model.use(branch)
    elif Path(branch).exists():
        weights.add_branch(model, branch, dtype)
    else:
        raise BadInput(
            f"--branch {branch}: is neither a folder nor a branch of the model, which has "
            f"{', '.join(has) or 'none'}; name a branch's folder"
        )


def open_image(path):
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such image; check the name")
    if os.path.isdir(path):
        raise BadInput(f"{path}: is a folder, not an image; name a file")
    return upright(peek((str(path), 0, -1), "what you named")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Command line
def question(args, mark):
    """The template that --task and --prompt make."""
    task, text = args.task, clean(args.prompt or "", "--prompt").strip()
    if task == "caption" and text:
        raise BadInput("--task caption takes no --prompt; leave it out, or use --task chat")
    if task != "caption" and not text:
        raise BadInput(f"--task {task} needs a --prompt that is not empty; add one")
    if task == "region":
        numbers = [float(v) for v in re.findall(r"\d*\.?\d+", text)]
        if len(numbers) != 4:
            raise BadInput(
                f"--prompt {text!r}: --task region asks about a box; give its fractions as x1,y1,x2,y2"
            )
        text = format_box(numbers)
    if task == "chat":
        return prompt("chat", text, mark if args.image else "")
    return prompt(task, text).replace(MARK, mark)


def settings(args):
    """Decoding of the task, with what the command line says instead."""
    chosen = dict(
        DECODING[args.task],
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.temperature:
        chosen["beams"] = 1
    for name in ("beams", "min_new_tokens", "max_new_tokens"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    if not args.ckpt and args.min_new_tokens is None:
        chosen["min_new_tokens"] = 0  # the toy's captions are short
    chosen["min_new_tokens"] = min(chosen.get("min_new_tokens", 0), chosen["max_new_tokens"])
    return chosen


def answer_all(model, tokenizer, args):
    """One answer a picture: printed, as a line of JSON if asked, and drawn at the end."""
    asked, cells = question(args, model.config.image_mark), []
    folder = args.image and os.path.isdir(args.image)
    paths = (
        [args.image]
        if not folder
        else sorted(str(p) for p in Path(args.image).iterdir() if p.suffix.lower() in ENDINGS)
    )
    if not paths:
        raise BadInput(
            f"{args.image}: holds no picture ({', '.join(ENDINGS)}); name another folder"
        )
    for at in range(0, len(paths), ROWS):
        images = [path and open_image(path) for path in paths[at : at + ROWS]]
        said = generate(
            model,
            tokenizer,
            images,
            [asked] * len(images),
            pad=TASKS[args.task].pad,
            **settings(args),
        )
        for path, image, text in zip(paths[at : at + ROWS], images, said):
            box = parse_box(text)
            pixels = box and image and [round(v * s, 1) for v, s in zip(box, image.size * 2)]
            found = {
                "image": path,
                "task": args.task,
                "prompt": args.prompt,
                "answer": text,
                "box": box,
                "pixels": pixels,
            }
            line = (
                (f"{path}: " if folder else "") + text + (f"   pixels {pixels}" if pixels else "")
            )
            print(json.dumps(found) if args.json else line, flush=True)
            shown, label = (
                (parse_box(asked), text) if args.task == "region" else (box, args.prompt or "")
            )
            if args.save:
                cells.append((image, [(shown, label, NAMED)] if shown else [], text, NAMED))
    if not args.save:
        return
    if not folder and cells[0][1]:
        write_picture(draw_boxes(*cells[0][:2]), args.save)
    else:
        sheet(
            [
                (image, boxes, f"{Path(p).name}: {said}" if folder else said, colour)
                for p, (image, boxes, said, colour) in zip(paths, cells)
            ],
            args.save,
        )


def reply(talk, line, chosen):
    """Stream one answer; Ctrl-C ends it and not the talk. No exception, as libraries in C lose some of them."""
    said, enough = "", []
    with on_signals(enough.append, [signal.SIGINT]):
        for piece in talk.ask(line, **chosen):
            said += piece
            print(piece, end="", flush=True)
            if enough:
                print(" ...", end="")
                break
    print(flush=True)
    return said


def ask(mark):
    """The next line; Ctrl-C and Ctrl-D raise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(mark).strip()
    finally:
        signal.signal(signal.SIGINT, before)


def chat(model, tokenizer, args):
    """Questions from the terminal, or from a pipe, until there are no more."""
    image = open_image(args.image) if args.image else None
    if sys.stdin is None:
        raise BadInput(
            "a chat reads its questions from the input, and that is closed; add --prompt"
        )
    talk, save, terminal = Chat(model, tokenizer, image), args.save, sys.stdin.isatty()
    chosen = {
        k: v
        for k, v in settings(args).items()
        if k not in ("beams", "min_new_tokens", "length_penalty")
    }
    if terminal:
        print("/image FILE   /reset   /box on|off   Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = ask("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            return print()
        except UnicodeDecodeError:
            print("that was not UTF-8")
            continue
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command == "/image":
                image = open_image(rest.strip())
                talk.start(image)
            elif command == "/reset":
                talk.start(image)
            elif line in ("/box on", "/box off"):
                save = (args.save or "box.png") if rest == "on" else None
            elif command.startswith("/"):
                print("the commands are /image FILE, /reset, /box on and /box off")
            else:
                box = parse_box(reply(talk, clean(line, "the question"), chosen))
                if not (box and image and save):
                    continue
                write_picture(draw_boxes(image, [(box, line, NAMED)]), save)
                print(
                    f"[{save}: the box in pixels is {[round(v * s, 1) for v, s in zip(box, image.size * 2)]}]"
                )
        except BadInput as e:
            print(e, flush=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--ckpt",
        help="our directory, a LLaVA-1.5 folder or the released InfMLLM file; default: the newest of out/",
    )
    add(
        "--branch",
        help="which branch sees pictures: its folder, or the name of one that is there; none: the base",
    )
    add("--tokenizer", help="sentencepiece model, where the checkpoint brings none")
    add("--image", help="a picture, or a folder of them")
    add("--task", choices=list(TASKS), default="chat", help="what is asked; default chat")
    add(
        "--prompt",
        help="vqa, chat: the question; ground: the phrase; region: x1,y1,x2,y2 as fractions",
    )
    add("--beams", type=int, help="beams of the search; 1 is greedy; default: the task's own")
    add(
        "--min-new-tokens",
        type=int,
        help="shortest answer in tokens; default: the task's own (captions: 8)",
    )
    add("--max-new-tokens", type=int, help="longest answer in tokens; default: the task's own")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="above 0: draw at random instead of searching; default 0",
    )
    add("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: from all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens that make up this share; default 1",
    )
    add("--seed", type=int, default=0, help="of the draws; default 0")
    add(
        "--json",
        action="store_true",
        help="a JSON object an answer: image, task, prompt, answer, box, pixels",
    )
    add("--save", help="picture to write: the boxes drawn in, or a contact sheet of a folder")
    add("--device", help="cpu or cuda; default: what there is")
    add(
        "--dtype",
        choices=list(DTYPES),
        help="of weights and compute; default bf16 on cuda, fp32 on cpu",
    )
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """What contradicts itself or cannot be."""
    if args.task != "chat" and not args.image:
        raise BadInput(f"--task {args.task} needs --image; name a picture")
    if args.image and not os.path.exists(args.image):
        raise BadInput(f"{args.image}: no such image; check the name")
    talks = args.task == "chat" and args.prompt is None
    if talks and args.image and os.path.isdir(args.image):
        raise BadInput("a chat is about one picture; name a file")
    if talks and args.json:
        raise BadInput("--json is for single answers; add --prompt")
    if talks and (args.beams or 1) > 1:
        raise BadInput("a chat streams and cannot use --beams; leave it out")
    if args.save and not args.image:
        raise BadInput("--save draws on a picture; name one with --image")
    if args.save:
        check_target(args.save)
    for name, least in (
        ("beams", 1),
        ("max_new_tokens", 1),
        ("temperature", 0),
        ("top_k", 0),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not 0 < args.top_p <= 1:
        raise BadInput(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.temperature and (args.beams or 1) > 1:
        raise BadInput("--beams searches and --temperature draws; choose one")
    if not args.temperature and (args.top_k or args.top_p < 1):
        raise BadInput("--top-k and --top-p are about random draws; add --temperature")
    if args.device and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"--device {args.device}: torch finds no GPU; use --device cpu")


def main(argv=None):
    args = parse(argv)
    if args.prompt is not None or args.task != "chat":
        question(args, MARK)  # before the model is read
    model, tokenizer = load_model(args.ckpt, args.tokenizer, args.device, args.dtype, args.branch)
    if args.task == "chat" and args.prompt is None:
        chat(model, tokenizer, args)
    else:
        answer_all(model, tokenizer, args)


def run(main):
    """main() as a command: what a user brought wrong is one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # there are answers that a terminal has no letters for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute()  # the reader has gone
    except (BadInput, OSError, RuntimeError) as e:
        code = complain(e)
        if not isinstance(e, BadInput):
            mute()
        return code
    return 0


def mute():
    """What is still to be flushed goes nowhere, and nothing is said of it."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(run(main))
