"""A world and a model small enough to train in a test, and train.py in processes of its own, started by the dozen."""

import json
import multiprocessing
import os
import random
import socket
import sys
from pathlib import Path

import torch
from PIL import Image

import support.ranks
import weights.checkpoint
from model import Config, InfMLLM, LlamaConfig, ViTConfig, init
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets/toy/tokenizer.model"
COLOURS = {
    "red": (222, 40, 44),
    "green": (36, 160, 56),
    "blue": (44, 84, 224),
    "cyan": (40, 200, 214),
}


def model(seed=0):
    vocab = Tokenizer(TOKENIZER).size
    config = Config(
        ViTConfig(16, 4, 16, 2, 2, 32), LlamaConfig(vocab, 32, 2, 2, 1, 48, context=256), grid=2
    )
    return init(InfMLLM(config), seed)


def world(folder, scenes=24, stages=(1, 2, 3)):
    """out/toy with a mixture per stage and a held-out one, and `start`, a checkpoint of a random model."""
    toy, rng = Path(folder) / "out/toy", random.Random(0)
    (toy / "images").mkdir(parents=True)
    chat, vqa, captions = [], [], []
    for n in range(scenes):
        colour = rng.choice(list(COLOURS))
        Image.new("RGB", (16, 16), COLOURS[colour]).save(toy / f"images/{n}.png")
        captions.append(
            {"image": f"{n}.png", "question": "what", "answers": [f"a {colour} ground"]}
        )
        vqa.append({"image": f"{n}.png", "question": "which colour?", "answers": [colour]})
        turns = [
            ("human", "say a colour"),
            ("gpt", f"{colour} " * rng.randint(1, 9)),
        ] * rng.randint(1, 2)
        chat.append(
            {"id": n, "conversations": [{"from": who, "value": text} for who, text in turns]}
        )
        if n % 3 == 0:  # two of three talk about no picture
            chat[-1]["image"] = f"{n}.png"
            chat[-1]["conversations"][0] = {"from": "human", "value": "<image>\nname it"}
    for name, rows in (("captions", captions), ("vqa", vqa), ("chat", chat)):
        (toy / f"{name}.json").write_text(json.dumps(rows))
    source = lambda name, kind: (
        f'[[source]]\nname = "{name}"\nformat = "{kind}"\nannotations = "{name}.json"\n'
        'images = "images"\n'
    )
    tables = {
        "captions": source("captions", "vqa") + "crop = false\n",
        "vqa": source("vqa", "vqa") + "crop = false\n",
        "chat": source("chat", "conversations"),
    }
    for name, used in {
        "stage1": ["captions"],
        "stage2": ["captions", "vqa"],
        "stage3": ["vqa", "chat"],
        "heldout": ["captions", "vqa", "chat"],
    }.items():
        (toy / f"{name}.toml").write_text("\n".join(tables[t] for t in used))
    weights.checkpoint.save(
        Path(folder) / "start", model(), Tokenizer(TOKENIZER), {"preset": "toy"}
    )
    return Path(folder)


class LowRank(torch.nn.Module):
    """A fork's module in the place of an nn.Linear: its own weights train and its base stays."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.base.frozen = True
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


SWAPPED = (
    "vit.blocks.0.q",
    "vit.blocks.1.fc1",
    "adapter.fc2",
    "llm.layers.0.q",
    "llm.layers.1.v",
    "llm.layers.0.o",
    "llm.layers.1.gate",
    "llm.lm_head",
)


def swap(model, names=SWAPPED):
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, LowRank(getattr(owner, leaf)))
    return model


def swapping(build):
    """support.start.build of a fork that swaps modules before anything is cast, wrapped or sharded."""

    def built(s, say=True):
        model, origins = build(s, say)
        return swap(model), origins

    return built


def recording(train, path):
    """train.gradients, which also writes the gradients of the first step to a file."""
    gradients = train.gradients

    def recorded(run, batches, supervised):
        loss = gradients(run, batches, supervised)
        if run.step == 0:
            grads = {
                n: train.in_one_piece(p.grad)
                for n, p in run.model.named_parameters()
                if p.requires_grad
            }
            if run.ranks.rank == 0:
                torch.save(grads, path)
        return loss

    return recorded


def child(folder, argv, env, record, slow, swapped):
    """train.main in a process of its own; what it says goes to a file."""
    os.environ.update(env)
    os.chdir(folder)
    name = f"said{env.get('RANK', '')}.txt"
    for number in (1, 2):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    import time

    import train

    update = train.update
    train.plot = lambda folder: None  # matplotlib takes longer than the run

    def slowed(*args):
        update(*args)
        time.sleep(slow)

    if swapped:
        train.start.build = swapping(train.start.build)
    if record:
        train.gradients = recording(train, record)
    if slow:
        train.update = slowed
    support.ranks.PATIENCE = 1  # the ranks of a test stand side by side
    Path("begun").write_text(str(os.getpid()))
    code = train.main([str(a) for a in argv])
    sys.stdout.flush()
    os._exit(code)


def start(folder, *argv, world=1, record=None, slow=0.0, differ=None, places=None, swapped=False):
    """-> processes that run train.py, `world` of them as ranks of one run; differ: {rank: flags of its own};
    places: {rank: a current folder of its own}."""
    os.environ["PYTHONPATH"] = str(ROOT)  # the server that forks them imports all once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    envs = (
        [{}]
        if world == 1
        else [
            {
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for r in range(world)
        ]
    )
    processes = [
        context.Process(
            target=child,
            args=(
                (places or {}).get(r, folder),
                (*argv, *(differ or {}).get(r, ())),
                env,
                record,
                slow,
                swapped,
            ),
        )
        for r, env in enumerate(envs)
    ]
    for p in processes:
        p.start()
    return processes


def finish(processes, seconds=60):
    for p in processes:
        p.join(seconds)
    codes = [p.exitcode for p in processes]
    for p in processes:
        if p.is_alive():
            p.kill()
    return codes


def said(folder):
    return "".join(p.read_text() for p in sorted(Path(folder).glob("said*.txt")))


def losses(out):
    return {
        r["step"]: r["loss"] for r in map(json.loads, open(Path(out) / "log.jsonl")) if "loss" in r
    }
