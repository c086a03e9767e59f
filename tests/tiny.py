"""A world and a model small enough to train in a test, and train.py in processes of its own, started by the dozen."""

import json
import multiprocessing
import os
import random
import runpy
import shlex
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import support.log
import support.ranks
import weights.checkpoint
from model import IGNORE, IMAGE, Config, InfMLLM, LlamaConfig, ViTConfig, init
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets/toy/tokenizer.model"


# what the backbones of today have and CLIP and LLaMA-2 do not
TODAY = dict(
    vit=dict(act="gelu_pytorch_tanh", prefix=0, post_norm=True, pixel_mean=[0.5] * 3),
    llm=dict(head_dim=24, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True),
)


def model(seed=0, pixels=16, context=256, vit=(), llm=()):
    vit = ViTConfig(pixels, pixels // 4, 16, 2, 2, 32, **dict(vit))
    llm = LlamaConfig(Tokenizer(TOKENIZER).size, 32, 2, 2, 1, 48, context=context, **dict(llm))
    return init(InfMLLM(Config(vit, llm, grid=2)), seed)


def world(folder):
    """out/toy with a mixture per stage and a held-out one, and `start`, a checkpoint of a random model."""
    toy, rng = Path(folder) / "out/toy", random.Random(0)
    (toy / "images").mkdir(parents=True)
    rows = {"captions": [], "vqa": [], "chat": []}
    for n in range(24):
        name = f"{n}.png"
        colour = rng.choice(["red", "green", "blue", "cyan"])
        Image.new("RGB", (16, 16), colour).save(toy / "images" / name)
        caption = {"question": "what", "answers": [f"a {colour} ground"]}
        rows["captions"].append({"image": name} | caption)
        rows["vqa"].append({"image": name, "question": "which colour?", "answers": [colour]})
        asked = {"from": "human", "value": "say a colour"}
        said = {"from": "gpt", "value": f"{colour} " * rng.randint(1, 9)}
        chat = {"id": n, "conversations": [asked, said] * rng.randint(1, 2)}
        if n % 3 == 0:  # two of three talk about no picture
            chat["image"] = name
            chat["conversations"][0] = {"from": "human", "value": "<image>\nname it"}
        rows["chat"].append(chat)
    tables = {}
    for name, records in rows.items():
        (toy / f"{name}.json").write_text(json.dumps(records))
        kind = "conversations" if name == "chat" else "vqa"
        tables[name] = (
            f'[[source]]\nname = "{name}"\nformat = "{kind}"\nannotations = "{name}.json"\n'
            'images = "images"\ncrop = false\n'
        )
    for mixture, names in {
        "stage1": ["captions"],
        "stage2": ["captions", "vqa"],
        "stage3": ["vqa", "chat"],
        "heldout": ["captions", "vqa", "chat"],
    }.items():
        (toy / f"{mixture}.toml").write_text("\n".join(tables[name] for name in names))
    tokenizer = Tokenizer(TOKENIZER)
    weights.checkpoint.save(Path(folder) / "start", model(), tokenizer, {"preset": "toy"})
    return Path(folder)


def talk(folder):
    """What sample.py is asked about: `ck`, a model with clear opinions (its answers differ from picture to picture and
    from prompt to prompt), and pictures."""
    talker = model(pixels=32, context=300)
    for p in talker.parameters():
        if p.ndim > 1:
            p.data *= 12
    weights.checkpoint.save(folder / "ck", talker, Tokenizer(TOKENIZER))
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, (w, h) in {"wide": (90, 40), "tall": (40, 90), "small": (24, 24)}.items():
        pixels = rng.integers(0, 255, (h, w, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{name}.png")
    (folder / "photos/notes.txt").write_text("no picture")
    (folder / "broken.png").write_text("no picture either")
    return folder


def same(a, b):
    """Whether two models have equal weights of equal dtypes."""
    for name, p in a.named_parameters():
        q = b.get_parameter(name)
        if p.dtype != q.dtype or not torch.equal(p, q):
            return False
    return True


IMG = [IMAGE] * 4  # where an image of `network` stands in a row of tokens


def network(layers=2, vit=(), llm=(), **changed):
    """A random model of 32 pixels and 50 words, whose weights are large enough to matter."""
    vit = ViTConfig(32, 8, 24, 2, 3, 40, **dict(vit))
    llm = LlamaConfig(50, 32, layers, 4, 2, 48, **dict(llm))
    m = init(InfMLLM(Config(vit, llm, **dict(grid=2) | changed)))
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(6)  # 0.02 is too timid for a test of anything
            else:
                rng = torch.Generator().manual_seed(p.numel())
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return m


def text(n, seed=1):
    return torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def pictures(n, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 32, 32), generator=rng).byte()


def rows(*lists):
    """Rows of unequal length as one (B,T), padded with 0."""
    T = max(map(len, lists))
    return torch.tensor([row + [0] * (T - len(row)) for row in lists])


def batch():
    """Images, tokens and targets of two rows with an image and one without."""
    tokens = rows([1] + IMG + text(7), [1] + IMG + text(11, 2), [1] + text(5, 3))
    targets = torch.full_like(tokens, IGNORE)
    for row, (begin, end) in enumerate(((8, 11), (9, 15), (2, 5))):
        targets[row, begin:end] = tokens[row, begin + 1 : end + 1]
    return pictures(2), tokens, targets


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


class LowRank(torch.nn.Module):
    """A fork's module: an nn.Linear that stays as it is, and beside it two thin matrices that train where it would."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.base.frozen = True
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.down = torch.nn.Linear(base.in_features, rank, **like)
        self.up = torch.nn.Linear(rank, base.out_features, **like)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def swap(model, names=SWAPPED):
    """A fork's modules in the place of some nn.Linears."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, LowRank(getattr(owner, leaf), rank=2))
    return model


def swapping(build):
    """support.start.build of a fork that swaps modules before anything is cast, wrapped or sharded."""

    def built(s, say=True):
        model, origins = build(s, say)
        return swap(model), origins

    return built


def settle(folder, name="said.txt"):
    """A process of its own begins: in this folder, where a file keeps what it says."""
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # takes longer than the run


def child(folder, argv, env, slow, swapped):
    """train.main in a process of its own."""
    os.environ.update(env)
    settle(folder, f"said{env.get('RANK', '')}.txt")
    import train

    update = train.update

    def slowed(*args):
        update(*args)
        time.sleep(slow)

    if swapped:
        train.start.build = swapping(train.start.build)
    if slow:
        train.update = slowed
    support.ranks.PATIENCE = 1  # the ranks of a test stand side by side
    code = train.main([str(a) for a in argv])
    sys.stdout.flush()
    os._exit(code)


def command(folder, words):
    settle(folder)
    sys.argv = words
    runpy.run_module(words[0].removesuffix(".py"), run_name="__main__")


def typed(folder, line):
    """A command such as `python train.py --stage 1`, typed there: (exit code, what it said)."""
    (folder / "said.txt").unlink(missing_ok=True)
    words = shlex.split(line.replace("python -m", "python"))[1:]
    process = context().Process(target=command, args=(folder, words))
    process.start()
    return finish([process])[0], said(folder)


def context():
    """Processes are forked from a server that imports all once."""
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp"])
    return context


def start(folder, *argv, world=1, slow=0.0, differ=None, places=None, swapped=False):
    """-> processes that run train.py, `world` of them as ranks of one run; differ: {rank: flags of its own};
    places: {rank: a current folder of its own}."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        env = {}
        if world > 1:
            env = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        where = (places or {}).get(rank, folder)
        flags = (*argv, *(differ or {}).get(rank, ()))
        how = (where, flags, env, slow, swapped)
        processes.append(context().Process(target=child, args=how))
        processes[-1].start()
    return processes


def finish(processes, seconds=300):
    """Their exit codes; None for one that has not ended, which is killed."""
    for p in processes:
        p.join(seconds)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    return codes


def said(folder):
    return "".join(p.read_text() for p in sorted(Path(folder).glob("said*.txt")))


def losses(out):
    return {r["step"]: r["loss"] for r in support.log.records(out) if "loss" in r}
