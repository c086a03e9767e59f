"""What the trained model says: the tasks, and a chat.

    python sample.py --image scene.png                                           # chat with the newest model of out/
    python sample.py --image scene.png --task ground --prompt "the small red circle" --save boxed.png
    python sample.py --image photos/ --task caption --save sheet.png             # a folder: one line a picture
    python sample.py --image scene.png --task vqa --prompt "what colour is the circle?" --json
    python sample.py --ckpt llava-1.5-7b-hf/ --image cat.jpg --prompt "What is the cat doing?"
    python sample.py --ckpt IAA/ --branch grounding --image cat.jpg --task ground --prompt "the left cat"
    python sample.py --ckpt InfMLLM_7B.bin --tokenizer vicuna-7b-v1.5/ --image cat.jpg
    python sample.py --ckpt out/stage1 --branch out/mm --image scene.png         # a branch of inner adaptors (IAA)

In a chat: /image FILE takes another picture, /reset forgets what was said, /box on draws the boxes that
the model names (box.png, box-2.png, ...), Ctrl-C stops an answer, /quit or Ctrl-D ends the chat.

Names of dimensions: B prompts (rows), T tokens of the longest prompt, K beams, V vocabulary, D width of
the LLM, N images, S pixels per side, P*P visual tokens of an image.
"""

import itertools
import json
import os
import re
import signal
import sys
from pathlib import Path

from support.threads import wait_briefly

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, save in a chat's answer
    wait_briefly()

import numpy as np
import torch
from torch.nn import functional as F

import weights
from formats.pictures import WHOLE, padded_region, peek, to_square, upright
from formats.records import clean
from model import IMAGE, KVCache
from support.commands import Parser, amount, natural, number, positive, run
from support.drawing import NAMED, check_target, draw_boxes, sheet, unused
from support.errors import BadInput
from support.processes import on_signals
from support.start import DTYPES, adapter_kind, load_model, newest
from text import encode_prompt
from text.boxes import format_box, parse_box
from text.templates import MARK, TASKS, chat_turn, own_words, prompt

# How each task is decoded: vqa and ground as released, with more room for a box, which takes up to 30 of
# LLaMA's pieces; of captions nothing was released.
DECODING = {
    "caption": dict(beams=5, max_new_tokens=30),
    "vqa": dict(beams=5, max_new_tokens=10, length_penalty=0.0),
    "ground": dict(beams=5, max_new_tokens=40),
    "region": dict(beams=5, max_new_tokens=30),
    "chat": dict(max_new_tokens=1024),
}
SETTINGS = ("beams", "min_new_tokens", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
NEVER = -1e9  # the score of a beam that is not there
ROWS = 8  # pictures of a folder that are answered together
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


# ---------------------------------------------------------------------------------------------------
# Generation


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
):
    """The new ids of every prompt, a list each, up to and without the eos, an id or several.

    images: (N,3,S,S), or a list of N pictures. tokens: a list of ids for each prompt, with P*P times
    IMAGE where an image stands. image_index: which image stands at each of these places; 0, 1, 2, ...
    if not given. temperature 0 is greedy; else prompt i draws from the stream of seed + i, or of
    seed[i], whatever the batch.

    Prompts without an image are answered by model.text_model. Where that is another model, they need
    a call of their own.
    """
    assert beams == 1 or temperature == 0, "beam search and sampling do not go together"
    with_image = {IMAGE in row for row in tokens}
    assert len(with_image) == 1 or model.text_model is model, (
        "prompts with images and prompts without are answered by different models: make two calls"
    )
    if with_image == {False}:
        model = model.text_model
    x, pad = embed_prompts(model, images, tokens, image_index)  # (B, T, D), (B, 1)
    max_new_tokens = min(max_new_tokens, model.config.llm.context - min(map(len, tokens)))
    eos = [eos] if isinstance(eos, int) else eos
    limits = (max_new_tokens, min_new_tokens, eos)
    if beams > 1:
        rows = beam_search(model.llm, x, pad, beams, length_penalty, *limits)
    else:
        seeds = range(seed, seed + len(tokens)) if isinstance(seed, int) else seed
        cache = KVCache(x.shape[1] + max_new_tokens)
        steps = decode(model.llm, cache, x, pad, *limits, seeds, temperature, top_k, top_p)
        rows = torch.stack(list(steps), dim=1).tolist()
    return [list(itertools.takewhile(lambda i: i not in eos, row)) for row in rows]


def embed_prompts(model, images, tokens, image_index=None):
    """Prompts padded on the left, as embeddings (B,T,D), and how much of each is padding, (B,1).

    None stands for the padding where all prompts are equally long."""
    device = model.llm.embed.weight.device
    lengths = [len(row) for row in tokens]
    T = max(lengths)
    ids = torch.tensor([[0] * (T - len(row)) + row for row in tokens], device=device)  # (B, T)
    x = model.llm.embed(ids.clamp(min=0))  # (B, T, D)
    if torch.is_autocast_enabled(device.type):
        x = x.to(torch.get_autocast_dtype(device.type))
    index = list(range(len(images)) if image_index is None else image_index)
    places = ids == IMAGE
    room = places.sum().item() / model.config.visual_tokens
    assert room == len(index), f"the prompts have room for {room:g} images, not for {len(index)}"
    if index:
        images = torch.stack(list(images)).to(device)
        visual = model.encode_images(images)  # (N, P*P, D): each image once
        x[places] = visual[index].flatten(0, 1).to(x.dtype)
    if min(lengths) == T:
        return x, None
    return x, T - torch.tensor(lengths, device=device)[:, None]


def around_padding(pad, start, T):
    """Positions (B,T) and mask (B,1,T,start+T) of T tokens that follow `start` others in their rows."""
    if pad is None:
        return None, None
    keys = torch.arange(start + T, device=pad.device)
    queries = keys[start:]
    causal = queries[:, None] >= keys  # (T, start+T)
    # padding looks at padding alone: of no query is everything hidden, which would give NaN
    alike = (queries >= pad)[:, :, None] == (keys >= pad)[:, None]  # (B, T, start+T)
    return (queries - pad).clamp(min=0), (causal & alike)[:, None]


def decode(
    llm,
    cache,
    x,
    pad,
    max_new_tokens,
    min_new_tokens,
    eos,
    seeds,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
):
    """Yield the next token of every row, (B,), until each row has had its eos.

    A token enters the cache when the next one is asked for."""
    if temperature:  # a row draws from a stream of its own, one number for each token
        numbers = [np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]
        numbers = torch.tensor(np.stack(numbers), device=x.device)  # (B, max_new_tokens)
    ends = torch.tensor(eos, device=x.device)
    done = False
    for n in range(max_new_tokens):
        positions, mask = around_padding(pad, cache.length, x.shape[1])
        hidden = llm(x, positions, mask, cache)  # (B, T, D), then (B, 1, D)
        logits = llm.head(hidden[:, -1]).float()  # (B, V)
        if n < min_new_tokens:
            logits[:, ends] = -torch.inf
        if temperature:
            token = draw(logits / temperature, numbers[:, n, None], top_k, top_p)
        else:
            token = logits.argmax(-1)
        yield token
        done = done | torch.isin(token, ends)
        if done.all():
            break
        x = llm.embed(token[:, None]).to(x.dtype)  # (B, 1, D)


def draw(logits, numbers, top_k=0, top_p=1.0):
    """One of the top_k likeliest tokens, and of these one of the fewest that make up top_p.

    logits (B,V); numbers (B,1), uniform in 0..1 -> (B,)"""
    V = logits.shape[1]
    likeliest, ids = logits.topk(min(top_k or V, V))  # (B, k), falling
    p = likeliest.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    total = p.double().cumsum(-1)
    place = torch.searchsorted(total, numbers * total[:, -1:], right=True)  # (B, 1)
    return ids.gather(1, place.clamp(max=ids.shape[1] - 1))[:, 0]


def beam_search(llm, x, pad, K, length_penalty, max_new_tokens, min_new_tokens, eos):
    """The best of K beams for each prompt, as transformers finds it with early_stopping=False.

    Each step takes the 2K best continuations. Those that end, if they are among the first K, retire;
    the K best of the others run on (K at most can end, so there are enough; each further eos takes K
    more). A prompt is decided when K beams have retired and the worst of them beats, in score per
    length ** length_penalty, the best one that still runs.

    The beams of a prompt are a tree that shares one row of the cache. Behind the prompt, each step adds
    K positions to the row, one for the last token of every beam, and `sees` says which positions of the
    row belong to a beam: those of its parent, and its own new one. So the keys and values of the prompt
    are held and read once, and nothing is moved when beams end or split.
    """
    B, T, _ = x.shape
    device = x.device
    rows = torch.arange(B, device=device)[:, None]  # y[rows, which] is (B,K,...) out of (B,2K,...)
    padding = torch.zeros_like(rows) if pad is None else pad  # (B, 1)
    sees = (torch.arange(T, device=device) >= padding)[:, None]  # (B, 1, T)
    own = torch.eye(K, dtype=torch.bool, device=device).expand(B, K, K)
    cache = KVCache(T + K * (max_new_tokens - 1))
    hidden = llm(x, *around_padding(pad, 0, T), cache)[:, -1:]  # (B, 1, D): one beam so far
    beams = torch.empty(B, 1, 0, dtype=torch.long, device=device)
    scores = torch.zeros(B, 1, device=device)
    stops = torch.tensor(eos, device=device)
    retired = torch.full((B, K, max_new_tokens), eos[0], device=device)
    retired_scores = torch.full((B, K), NEVER, device=device)
    undecided = torch.ones_like(rows, dtype=torch.bool)  # (B, 1)
    for n in range(1, max_new_tokens + 1):
        log_p = llm.head(hidden).float().log_softmax(-1)  # (B, K, V)
        if n <= min_new_tokens:
            log_p[:, :, stops] = -torch.inf
        V = log_p.shape[2]
        best, places = (log_p + scores[:, :, None]).flatten(1).topk(K + K * len(eos))  # (B, 2K)
        parents = places // V
        tokens = places % V
        longer = torch.cat((beams[rows, parents], tokens[:, :, None]), dim=2)  # (B, 2K, n)
        ends = torch.isin(tokens, stops) | (n == max_new_tokens)

        final = torch.where(ends & undecided, best / n**length_penalty, NEVER)
        pool = torch.cat((retired_scores, final[:, :K]), dim=1)  # (B, 2K)
        retired_scores, which = pool.topk(K)
        filled = F.pad(longer[:, :K], (0, max_new_tokens - n), value=eos[0])
        retired = torch.cat((retired, filled), dim=1)[rows, which]

        scores, which = best.masked_fill(ends, NEVER).topk(K)  # (B, K)
        undecided &= scores[:, :1] / n**length_penalty > retired_scores[:, -1:]
        if n == max_new_tokens or not undecided.any():
            break
        beams = longer[rows, which]
        sees = torch.cat((sees[rows, parents[rows, which]], own), dim=2)  # (B, K, T+K*n)
        x = llm.embed(beams[:, :, -1]).to(x.dtype)  # (B, K, D)
        positions = T + n - 1 - padding  # (B, 1): the beams of a prompt are equally long
        hidden = llm(x, positions, sees[:, None], cache)
    return retired[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------
# Pictures and text in, text out


def square(image, side, pad=False):
    """A picture as the model takes it, (3,S,S) uint8: squashed, or padded with the mean colour."""
    region = padded_region(image.size) if pad else WHOLE
    pixels = to_square(image, side, region)  # (S, S, 3)
    return torch.tensor(pixels).permute(2, 0, 1)


def check_length(ids, config, what):
    """A prompt that is too long is an error: cut, it would ask something else."""
    if len(ids) >= config.llm.context:
        raise BadInput(
            f"{what} has {len(ids)} tokens ({ids.count(IMAGE)} of them pictures) and the model's "
            f"context is {config.llm.context}; shorten it"
        )


def visible(text):
    """What a model says may hold commands to a terminal: control characters become the mark of an unknown one."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def generate(model, tokenizer, images, prompts, pad=False, seed=0, **settings):
    """The answers to prompts: full templates with <ImageHere> where an image stands, or their ids.

    images: for each prompt None, a PIL image or a list of them. pad: as square(); settings: those of
    generate_ids."""
    config = model.config
    tokens = []
    shown = []  # the pictures of each prompt, (3,S,S) each
    calls = {}  # with pictures and without: they may be for different models
    for i, (pictures, asked) in enumerate(zip(images, prompts, strict=True)):
        if not isinstance(pictures, list):
            pictures = [pictures] if pictures else []
        if isinstance(asked, str):
            asked = encode_prompt(tokenizer, asked, config.visual_tokens)
        check_length(asked, config, "the prompt")
        tokens.append(asked)
        shown.append([square(picture, config.vit.image_size, pad) for picture in pictures])
        calls.setdefault(IMAGE in asked, []).append(i)
    answers = [""] * len(tokens)
    for rows in calls.values():
        ids = generate_ids(
            model,
            sum([shown[i] for i in rows], []),
            [tokens[i] for i in rows],
            eos=tokenizer.stops,
            seed=[seed + i for i in rows],
            **settings,
        )
        for i, said in zip(rows, ids):
            answers[i] = visible(tokenizer.decode(said[: config.llm.context - len(tokens[i])]))
    return answers


class Chat:
    """A conversation. The cache keeps what was said, so that a turn computes only what is new."""

    def __init__(self, model, tokenizer, image=None):
        self.model = model
        self.tokenizer = tokenizer
        self.cache = KVCache(model.config.llm.context)
        self.start(image)

    def start(self, image=None):
        """Forget what was said, and talk about this picture."""
        self.image = image
        self.ids = []
        self.cache.length = 0

    def ask(self, question, seed=0, **settings):
        """Yield the answer piece by piece. It may be left at any point, and the talk goes on."""
        tokenizer, config = self.tokenizer, self.model.config
        if self.ids:
            turn = chat_turn(question, tokenizer.template)
            ids = [*self.ids, tokenizer.eos, *encode_prompt(tokenizer, turn, 0, bos=False)]
        else:
            mark = config.image_mark if self.image else ""
            turn = prompt("chat", question, mark, tokenizer.template)
            ids = encode_prompt(tokenizer, turn, config.visual_tokens)
        check_length(ids, config, "the conversation")
        pictures = []
        if IMAGE in ids[self.cache.length :]:
            pictures = [square(self.image, config.vit.image_size, pad=True)]
        yield from self.answer(ids, pictures, seed=seed + len(ids), **settings)

    @torch.inference_mode()
    def answer(self, ids, pictures, max_new_tokens=1024, min_new_tokens=0, seed=0, **sampling):
        """Yield the answer to these ids, of which the cache holds the first; pictures: of the others."""
        model = self.model if IMAGE in ids else self.model.text_model
        tokenizer, config = self.tokenizer, model.config
        self.ids = ids
        x, _ = embed_prompts(model, pictures, [ids[self.cache.length :]])  # (1, T, D)
        room = config.llm.context - len(ids)
        limits = (min(max_new_tokens, room), min_new_tokens, tokenizer.stops)
        said, shown = [], ""
        for token in decode(model.llm, self.cache, x, None, *limits, [seed], **sampling):
            if token.item() in tokenizer.stops:
                break
            said.append(token.item())
            self.ids.append(said[-1])
            text = visible(tokenizer.decode(said))
            if not text.endswith("\ufffd"):  # half of a character that comes in bytes
                yield text[len(shown) :]
                shown = text
        if said and text != shown:
            yield text[len(shown) :]


# ---------------------------------------------------------------------------------------------------
# Command line


def open_image(path):
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such image; name a file")
    return upright(peek((str(path), 0, -1)))


def model_flags(description):
    """A parser with the flags that sample.py and evaluate.py have in common."""
    parser = Parser(description)
    flag = parser.flag
    flag(
        "--ckpt", str, "our folder, LLaVA-1.5's, IAA's, or InfMLLM's file; default: newest of out/"
    )
    flag("--branch", str, "what sees pictures: a branch's folder or its name; none: the base")
    flag("--adapter", adapter_kind, "FILE.py:CLASS, where the model has an adapter of your own")
    flag("--tokenizer", str, "a tokenizer's file or folder, where the checkpoint brings none")
    flag("--device", str, "cpu or cuda; default: cuda where there is one")
    flag("--dtype", DTYPES, "of weights and compute; default: bf16 on cuda, fp32 on cpu")
    flag("--beams", number(int, 1, 100), "1 is greedy; default: the task's own")
    flag("--max-new-tokens", positive, "longest answer; default: the task's own")
    flag("--min-new-tokens", natural, "shortest answer; default: the task's own")
    return parser


def parse(argv=None):
    parser = model_flags(__doc__)
    flag = parser.flag
    flag("--image", str, "a picture, or a folder of them")
    flag("--task", TASKS, "what is asked; default: chat", "chat")
    flag(
        "--prompt", str, "the question; for ground the phrase, for region x1,y1,x2,y2 as fractions"
    )
    flag("--temperature", amount, "above 0: draw at random; default 0", 0.0)
    flag("--top-k", natural, "draw from so many likeliest tokens; default 0: all", 0)
    share = number(float, 1e-6, 1)
    flag("--top-p", share, "draw from the likeliest tokens of this share; default 1", 1.0)
    flag("--seed", natural, "of the draws; default 0", 0)
    flag("--json", bool, "a JSON object an answer: image, task, prompt, answer, box, pixels")
    flag("--save", str, "picture to write: the boxes drawn in, or a contact sheet of a folder")
    args = parser.parse_args(argv)
    args.folder = os.path.isdir(args.image or "")
    args.talk = args.task == "chat" and args.prompt is None
    refuse_contradictions(args)
    return args


def refuse_contradictions(args):
    """Flags that cannot both be meant."""
    searches = (args.beams or 1) > 1
    narrows = args.top_k > 0 or args.top_p < 1
    draws = args.temperature > 0
    wrong = {
        f"--task {args.task} needs --image; name a picture": args.task != "chat" and not args.image,
        f"{args.image}: no such image; check the name": not os.path.exists(args.image or "."),
        f"a chat is about one picture and {args.image} a folder; name a file, or add --prompt": (
            args.talk and args.folder
        ),
        "--json is for single answers; add --prompt": args.talk and args.json,
        "a chat streams and cannot use --beams; leave it out": args.talk and searches,
        "--save draws on a picture; name one with --image": args.save and not args.image,
        "--beams searches and --temperature draws; choose one": draws and searches,
        "--top-k and --top-p are about random draws; add --temperature": narrows and not draws,
    }
    for sentence, found in wrong.items():
        if found:
            raise BadInput(sentence)
    if args.save:
        check_target(args.save, args.image)


def decoding(task, asked):
    """Settings of generate_ids for a task: what is asked for, and for the rest its row of DECODING."""
    asked = {name: asked[name] for name in SETTINGS if asked.get(name) is not None}
    if asked.get("temperature"):
        asked["beams"] = 1
    return DECODING[task] | asked


def question(args):
    """What the task asks about: --prompt, as a box where it is one."""
    task = args.task
    text = clean(args.prompt or "", "--prompt").strip()
    if task == "caption" and text:
        raise BadInput("--task caption takes no --prompt; leave it out, or use --task chat")
    if task != "caption" and not text:
        raise BadInput(f"--task {task} needs a --prompt that is not empty; add one")
    if task == "region":
        box = [float(v) for v in re.findall(r"\d*\.?\d+", text)]
        if len(box) != 4:
            raise BadInput(
                f"--prompt {text!r}: --task region asks about a box; "
                "give its fractions as x1,y1,x2,y2"
            )
        text = format_box(box)
    return text


def answer_all(args):
    """One answer for each picture: printed, and drawn at the end."""
    paths = [args.image]
    if args.folder:
        files = sorted(Path(args.image).iterdir())
        paths = [str(path) for path in files if path.suffix.lower() in ENDINGS]
    if not paths:
        raise BadInput(
            f"{args.image}: holds no picture ({', '.join(ENDINGS)}); name another folder"
        )
    text = question(args)
    model, tokenizer = load(args)
    mark = model.config.image_mark if args.image else ""
    task, text = own_words(args.task, text, tokenizer.template)
    asked = prompt(task, text, mark, tokenizer.template).replace(MARK, mark)
    settings = decoding(task, vars(args))
    pad = TASKS[task].pad
    cells = []
    bad = 0
    for start in range(0, len(paths), ROWS):
        batch, images = [], []
        for path in paths[start : start + ROWS]:
            try:
                images.append(open_image(path) if path else None)
                batch.append(path)
            except BadInput as e:
                if not args.folder:
                    raise
                print(e, file=sys.stderr)
                bad += 1
        said = generate(model, tokenizer, images, [asked] * len(batch), pad, **settings)
        for path, image, text in zip(batch, images, said):
            box = parse_box(text)
            pixels = in_pixels(box, image)
            name = f"{path}: " if args.folder else ""
            line = name + text + (f"   pixels {pixels}" if pixels else "")
            if args.json:
                found = {"image": path, "task": args.task, "prompt": args.prompt}
                line = json.dumps(found | {"answer": text, "box": box, "pixels": pixels})
            print(line, flush=True)
            boxes = [(box, args.prompt or "", NAMED)] if box else []
            if args.task == "region":  # the box that was asked about
                boxes = [(parse_box(asked), text, NAMED)]
            cells.append((image, boxes, name + text, NAMED))
    if not cells:
        raise BadInput(
            f"{args.image}: none of its {bad} pictures could be read; name another folder"
        )
    if bad:
        print(f"{bad} of {len(paths)} pictures could not be read", file=sys.stderr)
    if not args.save:
        return
    image, boxes, _, _ = cells[0]
    if boxes and not args.folder:
        draw_boxes(image, boxes).save(args.save)
    else:
        sheet(cells, args.save)


def in_pixels(box, image):
    """A box in fractions, where there is one and a picture that it lies on, in pixels."""
    if box and image:
        return [round(v * side, 1) for v, side in zip(box, image.size * 2)]
    return None


def chat(args):
    """Questions from the terminal, or from a pipe, until there are no more."""
    image = open_image(args.image) if args.image else None
    if sys.stdin is None:
        raise BadInput(
            "a chat reads its questions from the input, and that is closed; add --prompt"
        )
    talk = Chat(*load(args), image)
    settings = decoding("chat", vars(args))
    settings.pop("beams", None)
    save = args.save
    mark = ""
    if sys.stdin.isatty():
        mark = "> "
        print("/image FILE   /reset   /box on|off   /quit   Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = read_line(mark)
            command, _, name = line.partition(" ")
            if line in ("/quit", "exit", "quit"):
                return
            if command == "/image":
                talk.start(open_image(name.strip()))
            elif command == "/reset":
                talk.start(talk.image)
            elif line == "/box on":
                save = args.save or "box.png"
            elif line == "/box off":
                save = None
            elif command.startswith("/"):
                print("the commands are /image FILE, /reset, /box on, /box off and /quit")
            elif line:
                box = parse_box(reply(talk, clean(line, "the question"), settings))
                if box and talk.image and save:
                    file = unused(save)
                    draw_boxes(talk.image, [(box, line, NAMED)]).save(file)
                    print(f"[{file}: the box in pixels is {in_pixels(box, talk.image)}]")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("that was not UTF-8")
        except BadInput as e:
            print(e, flush=True)


def read_line(mark):
    """The next line. Ctrl-C and Ctrl-D raise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(mark).strip()
    finally:
        signal.signal(signal.SIGINT, before)


def reply(talk, line, settings):
    """Print an answer as it comes. Ctrl-C ends it and not the chat.

    No exception is raised for that, as libraries in C lose some of them."""
    said = ""
    stops = []
    with on_signals(stops.append, [signal.SIGINT]):
        for piece in talk.ask(line, **settings):
            said += piece
            print(piece, end="", flush=True)
            if stops:
                print(" ...", end="")
                break
    print(flush=True)
    return said


def load(args):
    path = args.ckpt or newest()
    if not args.ckpt:
        print(f"model: {weights.find(path)}", file=sys.stderr)
    return load_model(path, args.tokenizer, args.device, args.dtype, args.branch)


def main(argv=None):
    args = parse(argv)
    answer = chat if args.talk else answer_all
    answer(args)


if __name__ == "__main__":
    sys.exit(run(main))
