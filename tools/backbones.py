"""The schooling of the toy's stand-ins for pretrained backbones.

python -m tools.backbones             # assets/toy: the stand-ins anew, 56 minutes on two cores; resumes by itself
"""

import argparse
import io
import math
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import data
import weights
from model import IGNORE, IMAGE, PIXEL_MEAN, PIXEL_STD, PRESETS, InfMLLM, Llama, ViT, init
from support.errors import BadInput
from support.metrics import iou
from text.boxes import parse_box
from text.tokenizer import Tokenizer
from toy import (
    COLOURS,
    SHAPES,
    SIDE,
    SIZES,
    caption,
    conversation,
    draw,
    full_name,
    phrases,
    questions,
    rng_of,
    scene,
)


def texts(seed=0, scenes=2000):
    """All that the tokenizer is trained on: every kind of prompt and answer, numbers left out."""
    for number in range(scenes):
        one, rng = scene(seed, "train", number), rng_of("tokenizer", seed, number)
        yield from (data.prompt("caption"), caption(one))
        for _, q, a in questions(one, rng):
            yield from (data.prompt("vqa", q), a)
        for phrase, t in phrases(one):
            yield from (
                data.prompt("ground", phrase),
                data.prompt("region", t.box_text),
                f"a {full_name(t)}",
            )
        for _, q, a in conversation(one, rng):
            yield from (data.prompt("chat", q), data.chat_turn(q), a)


def train_tokenizer(path):
    """A small sentencepiece model with LLaMA's conventions (unk 0, BOS 1, EOS 2, byte fallback, prefix space, nothing
    normalised), in which a number of a box is one piece: from 0.00 to 1.00 in steps of 0.01."""
    numbers = [f"{n / 100:.2f}" for n in range(101)]
    marks = ["<box>(", "),(", ")</box>"]
    sides = (side for text in texts() for side in text.split(data.HERE))
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
        user_defined_symbols=numbers + marks,
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


# names what lies in each patch of a drawing; the LLaMA reads scenes that are spelt out in its own word embeddings, as
# Vicuna has read the internet, and never gets a picture. No scene is common to the two.
# B scenes, C = P*P cells, T tokens, L = s*s patches, M supervised positions, W numbers that encode one edge.
CELLS = 4  # P of the toy preset: an object belongs to the cell in which its centre lies

WAVES = 6  # of a number: the edges of boxes are smooth for both stand-ins

KINDS = (list(COLOURS), SHAPES, list(SIZES))

TURNS = {
    0: (4, 4),
    1200: (8, 3),
    2400: (6, 4),
}  # from this step on: so many hard and easy turns about a scene

AIDS = (
    "reverse",
    "boxes",
    "order",
)  # lessons that no stage asks for, but that the others are learnt from

NOISE = 0.15  # on the symbolic prefix: what an adapter delivers will not be exact


@dataclass
class Schooling:
    steps: int
    batch: int  # scenes per step
    lr: float
    decay: float  # share of the steps in which the learning rate falls to zero


SCHOOL = {"vit": Schooling(3000, 32, 2e-3, 0.4), "llm": Schooling(5000, 16, 2e-3, 0.3)}


def waves(values):
    """(...) numbers from 0 to 1 -> (..., W): near numbers look alike, far ones do not."""
    k = math.pi * torch.arange(1, WAVES + 1)
    v = values[..., None]
    return torch.cat((2 * v - 1, torch.sin(k * v) / k.sqrt(), torch.cos(k * v) / k.sqrt()), dim=-1)


def cell_of(thing):
    return int(thing.cy * CELLS // SIDE) * CELLS + int(thing.cx * CELLS // SIDE)


class Seer(nn.Module):
    """The ViT with two linear heads that are thrown away: what covers a patch, what is centred in a cell of patches."""

    split = "train"

    def __init__(self, config, seed):
        super().__init__()
        self.vit = init(ViT(config), seed)
        self.sizes = [1 + len(kind) for kind in KINDS] + [
            4 * (2 * WAVES + 1)
        ]  # class 0: nothing is there
        self.heads = nn.ModuleList(
            init(nn.Linear(config.width, sum(self.sizes)), seed) for _ in range(2)
        )
        at = (torch.arange(config.side) + 0.5) / config.side  # 2-D sines, at the image's scale
        at = at[:, None] * math.pi * 2 ** torch.linspace(0, 3, config.width // 4)  # (s, Dv/4)
        at = torch.cat((at.sin(), at.cos()), 1)  # (s, Dv/2)
        rows, columns = (x.expand(config.side, config.side, -1) for x in (at[:, None], at[None]))
        with torch.no_grad():
            self.vit.positions[1:] = 0.5 * torch.cat((rows, columns), -1).flatten(0, 1)
            self.vit.patch_embed.weight.mul_(2)

    def forward(self, images):  # (B, 3, S, S) uint8
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
        x = self.vit((images.float() - mean) / std)[:, 1:].float()  # (B, L, Dv)
        x = F.layer_norm(x, x.shape[-1:])
        w = self.vit.config.side // CELLS
        cells = x.view(len(x), CELLS, w, CELLS, w, -1).mean((2, 4)).flatten(1, 2)  # (B, C, Dv)
        return torch.cat((self.heads[0](x), self.heads[1](cells)), 1)  # (B, L+C, sum of sizes)

    def batch(self, seed, split, numbers, step=0):
        scenes = [scene(seed, split, n) for n in numbers]
        images = torch.from_numpy(np.stack([np.asarray(draw(s)) for s in scenes])).permute(
            0, 3, 1, 2
        )
        classes, edges = zip(*(self.labels(s) for s in scenes))
        return images, torch.from_numpy(np.stack(classes)), torch.from_numpy(np.stack(edges))

    def labels(self, scene):
        """(L+C, 3) classes and (L+C, 4) edges of what covers each patch and of what is centred in each cell."""
        side = self.vit.config.side
        places = side**2 + CELLS**2
        classes, edges = np.zeros((places, 3), np.int64), np.zeros((places, 4), np.float32)
        at = (np.arange(side) + 0.5) * SIDE / side
        for t in scene.things:
            x1, y1, x2, y2 = t.box
            covered = ((at > y1 - 2) & (at < y2 + 2))[:, None] & ((at > x1 - 2) & (at < x2 + 2))
            where = [*np.flatnonzero(covered), side**2 + cell_of(t)]
            classes[where] = [
                1 + kind.index(v) for kind, v in zip(KINDS, (t.colour, t.shape, t.size))
            ]
            edges[where] = np.array(t.box) / SIDE
        return classes, edges

    def loss(self, batch, step):
        images, classes, edges = batch
        out, total, patches = self(images).float(), 0, self.vit.config.side**2
        for part in (slice(None, patches), slice(patches, None)):
            *kinds, at = out[:, part].split(self.sizes, -1)
            for k, scores in enumerate(kinds):
                weight = torch.tensor(
                    [0.3] + [1.0] * (scores.shape[-1] - 1)
                )  # most of a picture is ground
                total = total + F.cross_entropy(
                    scores.flatten(0, 1), classes[:, part, k].flatten(), weight
                )
            there = classes[:, part, 0] > 0
            total = (
                total
                + 4 * (at.unflatten(-1, (4, -1)) - waves(edges[:, part]))[there].square().mean()
            )
        return total

    @torch.no_grad()
    def gate(self, seed, split="heldout", scenes=256):
        """By cell: is it known that something is there, and what? Edges: mean error in pixels."""
        images, classes, edges = self.batch(seed, split, range(scenes))
        *kinds, at = self(images)[:, -(CELLS**2) :].split(self.sizes, -1)
        classes, edges = classes[:, -(CELLS**2) :], edges[:, -(CELLS**2) :]
        there = classes[..., 0] > 0
        result = {"something": ((kinds[0].argmax(-1) > 0) == there).float().mean()}
        for k, name in enumerate(("colour", "shape", "size")):
            result[name] = (kinds[k].argmax(-1) == classes[..., k])[there].float().mean()
        linear = (at.unflatten(-1, (4, -1))[..., 0] + 1) / 2
        result["pixels off"] = SIDE * (linear - edges)[there].abs().mean()
        return {k: round(float(v), 3) for k, v in result.items()}


def lessons(scene, rng, hard, easy):
    """(kind, prompt after the image, answer) about one scene: what the stages will ask, so many that are answered by
    comparing and counting and so many that are looked up; and AIDS: captions alone teach to look up by colour."""

    def tail(task, text=""):
        return data.prompt(task, text).split(data.HERE)[1]

    asked = [(kind, tail("vqa", q), a) for _ in range(2) for kind, q, a in questions(scene, rng)]
    compare = [lesson for lesson in asked if lesson[2] in ("yes", "no") or lesson[0] == "count"]
    look = [lesson for lesson in asked[: len(asked) // 2] if lesson not in compare]
    named = phrases(scene)
    for phrase, t in (rng.choice(named), rng.choice(named)):
        look.append(("ground", tail("ground", phrase), t.box_text))
    t = rng.choice(scene.things)
    look += [
        ("region", tail("region", t.box_text), f"a {full_name(t)}"),
        ("caption", tail("caption"), caption(scene)),
    ]
    across, down = (sorted(scene.things, key=key) for key in (lambda t: t.cx, lambda t: t.cy))
    look += [
        ("reverse", "Shapes:", ", ".join(f"{t.shape} {t.colour} {t.size}" for t in across)),
        ("boxes", "Boxes:", ", ".join(f"{t.name} {t.box_text}" for t in across)),
        ("order", "Downwards:", ", ".join(t.name for t in down)),
    ]
    kind, q, a = rng.choice(conversation(scene, rng))
    look.append((f"chat-{kind}", data.chat_turn(q), a))
    chosen = rng.sample(compare, min(hard, len(compare))) + rng.sample(look, easy)
    return rng.sample(chosen, len(chosen))


def overlap(one, other):
    boxes = parse_box(one), parse_box(other)
    return iou(*boxes) if all(boxes) else 0.0


def same(one, other):
    """The same answer, the same things in any order."""

    def parts(text):
        return sorted(text.lower().rstrip(".").replace(" and ", ", ").split(", "))

    return parts(one) == parts(other)


class Reader(nn.Module):
    """The LLaMA, and four matrices that tell the edges of a box apart in the sum of embeddings that is a cell."""

    split = "read"

    def __init__(self, config, seed, tokenizer):
        super().__init__()
        self.llm = init(Llama(config), seed)
        self.slots = nn.Parameter(torch.zeros(4, config.width, config.width))
        self.encode, self.decode = lru_cache(50_000)(tokenizer.encode), tokenizer.decode
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        piece = tokenizer.model.piece_to_id
        self.word = {w: piece("▁" + w) for kind in KINDS for w in kind}
        self.number = [piece(f"{n / 100:.2f}") for n in range(101)]
        assert tokenizer.pad not in (*self.word.values(), *self.number), (
            "a word of the toy world is not one piece"
        )
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            embed, n = self.llm.embed.weight, waves(torch.arange(101) / 100)
            embed.copy_(torch.randn(embed.shape, generator=rng) * 0.5)
            embed[self.number] = (
                n
                @ torch.randn(n.shape[1], config.width, generator=rng)
                * (0.5 / n.norm(dim=1).mean())
            )
            self.llm.lm_head.weight.copy_(embed * 0.1)
            for slot in self.slots:
                slot.copy_(torch.linalg.qr(torch.randn(slot.shape, generator=rng))[0])

    def symbols(self, scene):
        """(C, 7): the pieces of colour, shape, size and four edges of what is centred in each cell; -1: nothing."""
        cells = np.full((CELLS**2, 7), -1)
        for t in scene.things:
            words = [self.word[w] for w in (t.colour, t.shape, t.size)]
            cells[cell_of(t)] = words + [self.number[round(100 * v / SIDE)] for v in t.box]
        return cells

    def batch(self, seed, split, numbers, step=0):
        """tokens, targets, weights (B,T), cells (B,C,7) and [(row, first, past the last, kind)] of all answers."""
        rows, cells, answers, turns = (
            [],
            [],
            [],
            TURNS[max(first for first in TURNS if first <= step)],
        )
        for b, number in enumerate(numbers):
            one = scene(seed, split, number)
            tokens = [self.bos] + self.encode("<image>") + [IMAGE] * CELLS**2
            targets, weights = [IGNORE] * len(tokens), [0.0] * len(tokens)
            for kind, q, a in lessons(one, rng_of("lesson", seed, number), *turns):
                q, a = self.encode(q), self.encode(a) + [self.eos]
                answers.append(
                    (b, len(tokens) + len(q) - 1, len(tokens) + len(q) + len(a) - 1, kind)
                )
                tokens, targets = tokens + q + a, targets + [IGNORE] * len(q) + a
                weights += [0.0] * len(q) + [len(a) ** -0.5] * len(
                    a
                )  # else boxes and captions drown out yes and no
            rows.append((tokens[:-1], targets[1:], weights[1:]))
            cells.append(self.symbols(one))
        T = max(len(tokens) for tokens, _, _ in rows)
        filled = [
            [row[k] + [fill] * (T - len(row[k])) for row in rows]
            for k, fill in enumerate((0, IGNORE, 0.0))
        ]
        return *map(torch.tensor, filled), torch.from_numpy(np.stack(cells)), answers

    def forward(self, tokens, cells, noise=None):  # -> (B, T, D)
        x = self.llm.embed(tokens.clamp(min=0))
        e = self.llm.embed(cells.clamp(min=0))  # (B, C, 7, D)
        visual = e[:, :, :3].sum(2) + torch.einsum("bckd,kde->bce", e[:, :, 3:], self.slots)
        visual = torch.where(cells[:, :, :1] < 0, 0.0, visual)
        if noise is not None:
            visual = visual + NOISE * torch.randn(visual.shape, generator=noise)
        at = tokens[0].tolist().index(IMAGE)  # the same in every row
        return self.llm(
            torch.cat((x[:, :at], visual, x[:, at + CELLS**2 :]), 1)
        )  # (B, at + C + rest, D)

    def loss(self, batch, step):
        tokens, targets, weights, cells, _ = batch
        at = targets != IGNORE
        hidden = self(tokens, cells, torch.Generator().manual_seed(step))[at].float()  # (M, D)
        losses = F.cross_entropy(self.llm.head(hidden), targets[at], reduction="none")  # (M,)
        return (losses * weights[at]).sum() / weights[at].sum()

    @torch.no_grad()
    def gate(self, seed, split="heldout", scenes=200):
        """Share of right answers by kind, from a symbolic prefix; a box is right from IoU 0.5 on."""
        right, count = Counter(), Counter()
        for first in range(0, scenes, 50):
            tokens, targets, _, cells, answers = self.batch(
                seed, split, range(first, min(scenes, first + 50))
            )
            said = self.llm.head(self(tokens, cells)).argmax(-1)  # (B, T): right so far is greedy's
            for row, start, stop, kind in (a for a in answers if a[3] not in AIDS):
                ours, truth = said[row, start:stop], targets[row, start:stop]
                ours, truth = self.decode(ours.tolist()), self.decode(truth.tolist())
                ok = same(ours, truth) or overlap(ours, truth) >= 0.5
                for name in {kind.split("-")[0] if kind.startswith("chat") else kind, "all"}:
                    right[name] += ok
                    count[name] += 1
        return {kind: round(right[kind] / n, 3) for kind, n in sorted(count.items())}

    @torch.no_grad()
    def held_out(self, seed, split="heldout", scenes=200):
        """Cross-entropy per token of all answers about so many symbolic scenes, and the share of right ones."""
        total, tokens = 0.0, 0
        for first in range(0, scenes, 50):
            ids, targets, _, cells, _ = self.batch(
                seed, split, range(first, min(scenes, first + 50))
            )
            at = targets != IGNORE
            logits = self.llm.head(self(ids, cells)[at]).double()  # (M, V)
            total += F.cross_entropy(logits, targets[at], reduction="sum").item()
            tokens += int(at.sum())
        return {
            "loss": total / tokens,
            "tokens": tokens,
            "right": self.gate(seed, split, scenes)["all"],
        }


def reading(llm, tokenizer, slots="assets/toy/slots.safetensors", seed=0, scenes=200):
    """What is left of what an LLM could read before it saw pictures: Reader.held_out of a trained model's."""
    reader = Reader(llm.config, seed, tokenizer)
    reader.llm, reader.slots.data = llm, load_file(slots)["slots"]
    return reader.held_out(seed, "heldout", scenes)


def pupil(part, seed, tokenizer, config=None):
    config = config or PRESETS["toy"]()
    return Seer(config.vit, seed) if part == "vit" else Reader(config.llm, seed, tokenizer)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal before it is applied (Jordan et al., 2024; its Newton-Schulz iteration), scaled to the
    length of an AdamW update. torch's own works in bf16, a tenth as fast as this on processors that lack it."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {p.shape for p in group["params"]}:  # all matrices of one shape at once
            params = [p for p in group["params"] if p.shape == shape]
            for p in params:
                self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = torch.stack(
                [p.grad.lerp(self.state[p]["momentum"], 0.95) for p in params]
            )  # (n, out, in)
            if shape[0] > shape[1]:
                x = x.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
            for p, u in zip(params, x.mT if shape[0] > shape[1] else x):
                p.sub_(u, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)


def optimizers(net, lr):
    """Muon for the matrices inside, AdamW for the rest: half the steps that AdamW alone takes."""
    inside = {
        n: p
        for n, p in net.named_parameters()
        if p.ndim == 2 and ("blocks." in n or "layers." in n)
    }
    rest = [p for n, p in net.named_parameters() if n not in inside]
    return [
        Muon(inside.values(), lr=lr),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def school(part, scratch, seed, plan=None, config=None, stop=None, every=200):
    """Teach one stand-in on one core, on from its last checkpoint in `scratch`; the losses of its steps."""
    torch.set_num_threads(1)
    plan, file, losses = plan or SCHOOL[part], Path(scratch) / f"{part}.pt", []
    net = pupil(part, seed, Tokenizer(Path(scratch) / "tokenizer.model"), config)
    both, done, start = optimizers(net, plan.lr), 0, time.time()
    if file.is_file():
        state = torch.load(file)
        if state["seed"] != seed:
            raise BadInput(f"{file}: began with --seed {state['seed']}; take it, or delete it")
        net.load_state_dict(state["net"])
        for optimizer, held in zip(both, state["optimizers"]):
            optimizer.load_state_dict(held)
        done = state["step"]
    for step in range(done, min(plan.steps, stop or plan.steps)):
        for group in (g for o in both for g in o.param_groups):
            group["lr"] = plan.lr * min(
                1, (step + 1) / 100, (plan.steps - step) / (plan.decay * plan.steps)
            )
        batch = net.batch(seed, net.split, range(step * plan.batch, (step + 1) * plan.batch), step)
        loss = net.loss(batch, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 in (plan.steps, stop):
            held = {"net": net.state_dict(), "optimizers": [o.state_dict() for o in both]}
            torch.save({**held, "step": step + 1, "seed": seed}, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
            print(
                f"{part} step {step + 1} of {plan.steps}  loss {sum(losses[-every:]) / len(losses[-every:]):.3f}  "
                f"{time.time() - start:.0f} s  {net.gate(seed)}",
                flush=True,
            )
    return losses


def backbones(out="assets/toy", scratch="out/backbones", seed=0):
    """Both stand-ins at once, a core each; then one checkpoint of them, with an adapter that knows nothing yet."""
    scratch = Path(scratch)
    train_tokenizer(scratch / "tokenizer.model")
    with multiprocessing.get_context("spawn").Pool(len(SCHOOL)) as pool:
        pool.starmap(school, [(part, scratch, seed) for part in SCHOOL])
    assemble(out, scratch, seed)


def assemble(out, scratch, seed):
    tokenizer = Tokenizer(scratch / "tokenizer.model")
    model = init(InfMLLM(PRESETS["toy"]()), seed)
    vocab = model.config.llm.vocab
    assert vocab == tokenizer.size, (
        f"the toy preset has {vocab} pieces and its tokenizer {tokenizer.size}"
    )
    nets = {part: pupil(part, seed, tokenizer) for part in SCHOOL}
    for part, net in nets.items():
        net.load_state_dict(torch.load(scratch / f"{part}.pt")["net"])
        getattr(model, part).load_state_dict(getattr(net, part).state_dict())
    gates = {part: net.gate(seed) for part, net in nets.items()}
    weights.save(out, model, tokenizer, training={"backbones": {"seed": seed, "gates": gates}})
    save_file(
        {"slots": nets["llm"].slots.detach()}, Path(out) / "slots.safetensors"
    )  # for the test of the gate
    print(f"{out}: {gates}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="assets/toy", help="folder to write; default assets/toy")
    parser.add_argument("--scratch", default="out/backbones", help="where the training stands")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    backbones(args.out, args.scratch, args.seed)


if __name__ == "__main__":
    main()
