"""The schooling of the toy's stand-ins for pretrained backbones, and their tokenizer.

    python -m tools.backbones             # assets/toy anew: an hour on two cores; resumes by itself

Two nets are taught, a core each, and never meet. The ViT names what lies in each patch of a drawing. The
LLaMA reads scenes that are spelt out in its own word embeddings, as Vicuna has read the internet, and never
gets a picture. No scene is common to the two. What comes out is one checkpoint of both, with an adapter
that knows nothing yet.

Names of dimensions: B scenes, C = P*P cells, T tokens, L = s*s patches, Dv width of the ViT, D of the LLaMA,
V vocabulary, M supervised positions, W numbers that encode one edge of a box.
"""

import argparse
import io
import math
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import toy
import weights
from model import IGNORE, IMAGE, PIXEL_MEAN, PIXEL_STD, PRESETS, InfMLLM, Llama, ViT, init
from support.errors import BadInput
from support.metrics import iou
from text import Tokenizer
from text.boxes import parse_box
from text.templates import HERE, chat_turn, prompt

CELLS = 4  # P of the toy preset: a thing belongs to the cell in which its centre lies
WAVES = 6  # of a number; W = 1 + 2 * WAVES
KINDS = (list(toy.COLOURS), toy.SHAPES, list(toy.SIZES))
TURNS = {
    0: (4, 4),
    1200: (8, 3),
    2400: (6, 4),
}  # from this step on: hard and easy turns about a scene
AIDS = ("reverse", "boxes", "order")  # lessons from which others are learnt; no stage asks for them
NOISE = 0.15  # on the symbolic scene: what an adapter delivers will not be exact


@dataclass
class Schooling:
    steps: int
    batch: int  # scenes per step
    lr: float
    decay: float  # share of the steps in which the learning rate falls to zero


SCHOOL = {"vit": Schooling(3000, 32, 2e-3, 0.4), "llm": Schooling(5000, 16, 2e-3, 0.3)}


# ---------------------------------------------------------------------------------------------------
# The tokenizer


def texts(seed=0, scenes=2000):
    """All that the tokenizer is trained on: every kind of prompt and answer."""
    for number in range(scenes):
        scene = toy.scene(seed, "train", number)
        rng = toy.rng_of("tokenizer", seed, number)
        yield prompt("caption")
        yield toy.caption(scene)
        for _, question, answer in toy.questions(scene, rng):
            yield prompt("vqa", question)
            yield answer
        for phrase, thing in toy.phrases(scene):
            yield prompt("ground", phrase)
            yield prompt("region", thing.box_text)
            yield f"a {thing.full_name}"
        for _, question, answer in toy.conversation(scene, rng):
            yield prompt("chat", question)
            yield chat_turn(question)
            yield answer


def train_tokenizer(path):
    """A small sentencepiece model with LLaMA's conventions: unk 0, BOS 1, EOS 2, byte fallback, a space in
    front, nothing normalised. A number of a box is one piece: 0.00 to 1.00 in steps of 0.01."""
    numbers = [f"{n / 100:.2f}" for n in range(101)]
    sides = (side for text in texts() for side in text.split(HERE))
    lines = (line for side in sides for line in side.split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=640,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=numbers + ["<box>(", "),(", ")</box>"],
        num_threads=1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=10_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())


# ---------------------------------------------------------------------------------------------------
# What the ViT is taught


def waves(values):
    """(...) numbers from 0 to 1 -> (..., W): near numbers look alike, far ones do not."""
    k = math.pi * torch.arange(1, WAVES + 1)
    v = values[..., None]
    return torch.cat((2 * v - 1, torch.sin(k * v) / k.sqrt(), torch.cos(k * v) / k.sqrt()), dim=-1)


def cell_of(thing):
    row, column = thing.cy * CELLS // toy.SIDE, thing.cx * CELLS // toy.SIDE
    return int(row) * CELLS + int(column)


class Seer(nn.Module):
    """The ViT with two linear heads that are thrown away: what covers a patch, what is centred in a cell."""

    split = "train"

    def __init__(self, config, seed):
        super().__init__()
        s, Dv = config.side, config.width
        self.vit = init(ViT(config), seed)
        # scores of colour, shape and size, of which class 0 is nothing, and four edges
        self.sizes = [1 + len(kind) for kind in KINDS] + [4 * (1 + 2 * WAVES)]
        self.patch_head = init(nn.Linear(Dv, sum(self.sizes)), seed)
        self.cell_head = init(nn.Linear(Dv, sum(self.sizes)), seed)
        # positions begin as sines in both directions, at the image's scale
        at = (torch.arange(s) + 0.5) / s
        at = at[:, None] * math.pi * 2 ** torch.linspace(0, 3, Dv // 4)  # (s, Dv/4)
        sines = torch.cat((at.sin(), at.cos()), dim=1)  # (s, Dv/2)
        rows = sines[:, None].expand(s, s, -1)
        columns = sines[None].expand(s, s, -1)
        with torch.no_grad():
            self.vit.positions[1:] = 0.5 * torch.cat((rows, columns), dim=-1).flatten(0, 1)
            self.vit.patch_embed.weight.mul_(2)

    def forward(self, images):  # (B, 3, S, S) uint8
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
        x = self.vit((images.float() - mean) / std)[:, 1:].float()  # (B, L, Dv)
        x = F.layer_norm(x, x.shape[-1:])
        w = self.vit.config.side // CELLS
        cells = x.view(len(x), CELLS, w, CELLS, w, -1).mean((2, 4)).flatten(1, 2)  # (B, C, Dv)
        return torch.cat(
            (self.patch_head(x), self.cell_head(cells)), dim=1
        )  # (B, L+C, sum of sizes)

    def batch(self, seed, split, numbers, step=0):
        """images (B,3,S,S), classes (B,L+C,3) and edges (B,L+C,4)."""
        scenes = [toy.scene(seed, split, number) for number in numbers]
        images = torch.from_numpy(np.stack([np.asarray(toy.draw(scene)) for scene in scenes]))
        classes, edges = zip(*(self.labels(scene) for scene in scenes))
        return images.permute(0, 3, 1, 2), torch.stack(classes), torch.stack(edges)

    def labels(self, scene):
        """Classes (L+C,3) and edges (L+C,4) of what covers each patch and of what is centred in each cell."""
        s = self.vit.config.side
        classes = torch.zeros(s**2 + CELLS**2, 3, dtype=torch.long)
        edges = torch.zeros(s**2 + CELLS**2, 4)
        at = (torch.arange(s) + 0.5) * toy.SIDE / s
        for t in scene.things:
            x1, y1, x2, y2 = t.box
            rows = (at > y1 - 2) & (at < y2 + 2)
            columns = (at > x1 - 2) & (at < x2 + 2)
            covered = (rows[:, None] & columns).flatten().nonzero()[:, 0]  # of L
            where = [*covered.tolist(), s**2 + cell_of(t)]
            words = zip(KINDS, (t.colour, t.shape, t.size))
            classes[where] = torch.tensor([1 + kind.index(word) for kind, word in words])
            edges[where] = torch.tensor(t.box) / toy.SIDE
        return classes, edges

    def loss(self, batch, step):
        images, classes, edges = batch
        out = self(images).float()
        patches = self.vit.config.side**2
        total = 0
        for part in (slice(None, patches), slice(patches, None)):
            *kinds, at = out[:, part].split(self.sizes, dim=-1)
            for k, scores in enumerate(kinds):
                weight = torch.ones(scores.shape[-1])
                weight[0] = 0.3  # most of a picture is ground
                wanted = classes[:, part, k].flatten()
                total = total + F.cross_entropy(scores.flatten(0, 1), wanted, weight)
            there = classes[:, part, 0] > 0
            off = at.unflatten(-1, (4, -1)) - waves(edges[:, part])  # (B, L or C, 4, W)
            total = total + 4 * off[there].square().mean()
        return total

    @torch.no_grad()
    def gate(self, seed, split="heldout", scenes=256):
        """By cell: is it known that something is there, and what? Edges: mean error in pixels."""
        images, classes, edges = self.batch(seed, split, range(scenes))
        cells = slice(-(CELLS**2), None)
        *kinds, at = self(images)[:, cells].split(self.sizes, dim=-1)
        classes, edges = classes[:, cells], edges[:, cells]
        there = classes[..., 0] > 0
        result = {"something": ((kinds[0].argmax(-1) > 0) == there).float().mean()}
        for k, name in enumerate(("colour", "shape", "size")):
            result[name] = (kinds[k].argmax(-1) == classes[..., k])[there].float().mean()
        linear = (at.unflatten(-1, (4, -1))[..., 0] + 1) / 2
        result["pixels off"] = toy.SIDE * (linear - edges)[there].abs().mean()
        return {name: round(float(v), 3) for name, v in result.items()}


# ---------------------------------------------------------------------------------------------------
# What the LLaMA is taught


def after_image(task, text=""):
    return prompt(task, text).split(HERE)[1]


def lessons(scene, rng, hard, easy):
    """(kind, prompt after the image, answer) about one scene: so many that are answered by comparing and
    counting, and so many that are looked up. Captions alone teach to look up by colour: hence AIDS."""
    asked = toy.questions(scene, rng)
    again = toy.questions(scene, rng)
    compare = [q for q in asked + again if q[2] in ("yes", "no") or q[0] == "count"]
    look = [q for q in asked if q not in compare]
    compare, look = (
        [(kind, after_image("vqa", question), answer) for kind, question, answer in chosen]
        for chosen in (compare, look)
    )
    named = toy.phrases(scene)
    for phrase, t in (rng.choice(named), rng.choice(named)):
        look.append(("ground", after_image("ground", phrase), t.box_text))
    t = rng.choice(scene.things)
    look.append(("region", after_image("region", t.box_text), f"a {t.full_name}"))
    look.append(("caption", after_image("caption"), toy.caption(scene)))
    across = sorted(scene.things, key=lambda t: t.cx)
    down = sorted(scene.things, key=lambda t: t.cy)
    look += [
        ("reverse", "Shapes:", ", ".join(f"{t.shape} {t.colour} {t.size}" for t in across)),
        ("boxes", "Boxes:", ", ".join(f"{t.name} {t.box_text}" for t in across)),
        ("order", "Downwards:", ", ".join(t.name for t in down)),
    ]
    kind, question, answer = rng.choice(toy.conversation(scene, rng))
    look.append((f"chat-{kind}", chat_turn(question), answer))
    chosen = rng.sample(compare, min(hard, len(compare))) + rng.sample(look, easy)
    return rng.sample(chosen, len(chosen))


def right(said, truth):
    """A box is right from IoU 0.5 on, a list in any order."""
    boxes = parse_box(said), parse_box(truth)
    if all(boxes):
        return iou(*boxes) >= 0.5
    return listed(said) == listed(truth)


def listed(text):
    return sorted(text.lower().rstrip(".").replace(" and ", ", ").split(", "))


class Reader(nn.Module):
    """The LLaMA, and four matrices that tell the edges of a box apart in the sum of embeddings that is a cell."""

    split = "read"

    def __init__(self, config, seed, tokenizer):
        super().__init__()
        D = config.width
        self.llm = init(Llama(config), seed)
        self.slots = nn.Parameter(torch.zeros(4, D, D))
        self.tokenizer = tokenizer
        piece = tokenizer.model.piece_to_id
        self.word = {word: piece("▁" + word) for kind in KINDS for word in kind}
        self.number = [piece(f"{n / 100:.2f}") for n in range(101)]
        assert tokenizer.pad not in (*self.word.values(), *self.number), (
            "a word of the toy world is not one piece"
        )
        rng = torch.Generator().manual_seed(seed)
        numbers = waves(torch.arange(101) / 100)  # (101, W)
        with torch.no_grad():
            embed = self.llm.embed.weight
            embed.copy_(torch.randn(embed.shape, generator=rng) * 0.5)
            scale = 0.5 / numbers.norm(dim=1).mean()
            embed[self.number] = (
                numbers @ torch.randn(numbers.shape[1], D, generator=rng) * scale
            )  # near numbers begin alike
            self.llm.lm_head.weight.copy_(embed * 0.1)
            for slot in self.slots:
                slot.copy_(torch.linalg.qr(torch.randn(D, D, generator=rng))[0])

    def symbols(self, scene):
        """(C,7): the pieces of colour, shape, size and four edges of what is centred in each cell; -1: nothing."""
        cells = torch.full((CELLS**2, 7), -1)
        for t in scene.things:
            words = [self.word[w] for w in (t.colour, t.shape, t.size)]
            edges = [self.number[round(100 * v / toy.SIDE)] for v in t.box]
            cells[cell_of(t)] = torch.tensor(words + edges)
        return cells

    def batch(self, seed, split, numbers, step=0):
        """tokens, targets, weights (B,T), cells (B,C,7) and (row, first, past the last, kind) of all answers."""
        hard, easy = TURNS[max(first for first in TURNS if first <= step)]
        encode = self.tokenizer.encode
        rows, cells, answers = [], [], []
        for b, number in enumerate(numbers):
            scene = toy.scene(seed, split, number)
            tokens = [self.tokenizer.bos] + encode("<image>") + [IMAGE] * CELLS**2
            targets = [IGNORE] * len(tokens)
            weights = [0.0] * len(tokens)
            rng = toy.rng_of("lesson", seed, number)
            for kind, question, answer in lessons(scene, rng, hard, easy):
                question = encode(question)
                answer = encode(answer) + [self.tokenizer.eos]
                tokens += question + answer
                targets += [IGNORE] * len(question) + answer
                # else boxes and captions would drown out yes and no
                weights += [0.0] * len(question) + [len(answer) ** -0.5] * len(answer)
                end = len(tokens) - 1
                answers.append((b, end - len(answer), end, kind))
            rows.append((tokens[:-1], targets[1:], weights[1:]))
            cells.append(self.symbols(scene))
        padded = [
            pad_sequence([torch.tensor(row) for row in column], True, fill)
            for column, fill in zip(zip(*rows), (0, IGNORE, 0.0))
        ]
        return *padded, torch.stack(cells), answers

    def forward(self, tokens, cells, noise=None):  # -> (B, T, D)
        x = self.llm.embed(tokens.clamp(min=0))
        pieces = self.llm.embed(cells.clamp(min=0))  # (B, C, 7, D)
        edges = torch.einsum("bckd,kde->bce", pieces[:, :, 3:], self.slots)
        visual = pieces[:, :, :3].sum(2) + edges  # (B, C, D)
        visual = torch.where(cells[:, :, :1] < 0, 0.0, visual)
        if noise is not None:
            visual = visual + NOISE * torch.randn(visual.shape, generator=noise)
        at = tokens[0].tolist().index(IMAGE)  # the same in every row
        return self.llm(torch.cat((x[:, :at], visual, x[:, at + CELLS**2 :]), dim=1))

    def loss(self, batch, step):
        tokens, targets, weights, cells, _ = batch
        at = targets != IGNORE
        hidden = self(tokens, cells, torch.Generator().manual_seed(step))[at].float()  # (M, D)
        losses = F.cross_entropy(self.llm.head(hidden), targets[at], reduction="none")  # (M,)
        return (losses * weights[at]).sum() / weights[at].sum()

    @torch.no_grad()
    def examine(self, seed, split, scenes):
        """-> loss per token of the answers about so many symbolic scenes, and {kind: share of right ones}"""
        score, count = Counter(), Counter()
        total, tokens = 0.0, 0
        for first in range(0, scenes, 50):
            numbers = range(first, min(scenes, first + 50))
            ids, targets, _, cells, answers = self.batch(seed, split, numbers)
            logits = self.llm.head(self(ids, cells))  # (B, T, V)
            at = targets != IGNORE
            total += F.cross_entropy(logits[at].double(), targets[at], reduction="sum").item()
            tokens += int(at.sum())
            said = logits.argmax(-1)  # (B, T): an answer that is right is what greedy decoding says
            for row, start, stop, kind in answers:
                if kind in AIDS:
                    continue
                ours = self.tokenizer.decode(said[row, start:stop].tolist())
                truth = self.tokenizer.decode(targets[row, start:stop].tolist())
                for name in (kind.split("-")[0] if kind.startswith("chat") else kind, "all"):
                    score[name] += right(ours, truth)
                    count[name] += 1
        return total / tokens, {
            kind: round(score[kind] / n, 3) for kind, n in sorted(count.items())
        }

    def gate(self, seed, split="heldout", scenes=200):
        return self.examine(seed, split, scenes)[1]


def reading(llm, tokenizer, slots="assets/toy/slots.safetensors", seed=0, scenes=200):
    """What is left of what an LLM could read before it saw pictures: (loss per token, share of right answers)."""
    reader = Reader(llm.config, seed, tokenizer)
    reader.llm = llm
    reader.slots.data = load_file(slots)["slots"]
    loss, shares = reader.examine(seed, "heldout", scenes)
    return loss, shares["all"]


# ---------------------------------------------------------------------------------------------------
# How both are taught


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal before it is applied (Jordan et al., 2024; its Newton-Schulz iteration), scaled
    to the length of an AdamW update. torch's own computes in bf16, ten times slower on CPUs that lack it."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {p.shape for p in group["params"]}:  # all matrices of one shape at once
            params = [p for p in group["params"] if p.shape == shape]
            updates = []
            for p in params:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                updates.append(p.grad.lerp(momentum, 0.95))
            x = torch.stack(updates)  # (n, out, in)
            tall = shape[0] > shape[1]
            if tall:
                x = x.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
            if tall:
                x = x.mT
            for p, update in zip(params, x):
                p.sub_(update, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)


def optimizers(net, lr):
    """Muon for the matrices inside, AdamW for the rest: half the steps that AdamW alone takes."""
    inside, rest = [], []
    for name, p in net.named_parameters():
        matrix = p.ndim == 2 and ("blocks." in name or "layers." in name)
        (inside if matrix else rest).append(p)
    return Muon(inside, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)


def pupil(part, seed, tokenizer, config=None):
    config = config or PRESETS["toy"]()
    if part == "vit":
        return Seer(config.vit, seed)
    return Reader(config.llm, seed, tokenizer)


def school(part, scratch, seed, plan=None, config=None, stop=None, every=200):
    """Teach one stand-in on one core, on from its last checkpoint in `scratch`; the losses of its steps."""
    torch.set_num_threads(1)
    plan = plan or SCHOOL[part]
    stop = stop or plan.steps
    file = Path(scratch) / f"{part}.pt"
    net = pupil(part, seed, Tokenizer(Path(scratch) / "tokenizer.model"), config)
    both = optimizers(net, plan.lr)
    done = 0
    if file.is_file():
        state = torch.load(file)
        if state["seed"] != seed:
            raise BadInput(f"{file}: began with --seed {state['seed']}; take it, or delete it")
        net.load_state_dict(state["net"])
        for optimizer, stored in zip(both, state["optimizers"]):
            optimizer.load_state_dict(stored)
        done = state["step"]
    losses = []
    start = time.time()
    for step in range(done, stop):
        rise = (step + 1) / 100
        fall = (plan.steps - step) / (plan.decay * plan.steps)
        numbers = range(step * plan.batch, (step + 1) * plan.batch)
        loss = net.loss(net.batch(seed, net.split, numbers, step), step)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = plan.lr * min(1, rise, fall)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == stop:
            states = [optimizer.state_dict() for optimizer in both]
            state = {"net": net.state_dict(), "optimizers": states, "step": step + 1, "seed": seed}
            torch.save(state, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
            recent = losses[-every:]
            print(
                f"{part} step {step + 1} of {plan.steps}  loss {sum(recent) / len(recent):.3f}  "
                f"{time.time() - start:.0f} s  {net.gate(seed)}",
                flush=True,
            )
    return losses


def assemble(out, scratch, seed):
    """One checkpoint of both stand-ins, and the slots, with which reading() asks the LLaMA."""
    tokenizer = Tokenizer(scratch / "tokenizer.model")
    model = init(InfMLLM(PRESETS["toy"]()), seed)
    vocab = model.config.llm.vocab
    assert vocab == tokenizer.size, (
        f"the toy preset has {vocab} pieces and its tokenizer {tokenizer.size}"
    )
    gates = {}
    for part in SCHOOL:
        net = pupil(part, seed, tokenizer)
        net.load_state_dict(torch.load(scratch / f"{part}.pt")["net"])
        getattr(model, part).load_state_dict(getattr(net, part).state_dict())
        gates[part] = net.gate(seed)
    weights.save(out, model, tokenizer, training={"backbones": {"seed": seed, "gates": gates}})
    save_file(
        {"slots": net.slots.detach()}, Path(out) / "slots.safetensors"
    )  # of the last, the LLaMA
    print(f"{out}: {gates}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="assets/toy", help="folder to write; default assets/toy")
    parser.add_argument("--scratch", default="out/backbones", help="where the training stands")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    scratch = Path(args.scratch)
    train_tokenizer(scratch / "tokenizer.model")
    with multiprocessing.get_context("spawn").Pool(len(SCHOOL)) as pool:
        pool.starmap(school, [(part, scratch, args.seed) for part in SCHOOL])
    assemble(args.out, scratch, args.seed)


if __name__ == "__main__":
    main()
