"""What a run will take: parameters, memory, arithmetic. `s` is a train.Settings."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

import model as models
from adapter import ADAPTERS
from formats.pictures import peek
from lora import LowRank
from model import PARTS
from support.errors import BadInput

GIB = 2**30
BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
PEAK = {  # dense bf16 FLOP/s by the data sheets, for MFU
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


def sizes(model):
    """{part: [parameters that train, parameters that do not]}"""
    sums = {part: [0, 0] for part in PARTS}
    for name, p in model.named_parameters():
        sums[models.part_of(name)][0 if p.requires_grad else 1] += p.numel()
    return sums


def trains(module):
    return any(p.requires_grad for p in module.parameters())


def places(c, s):
    """How many tokens and patches a micro-batch has."""
    return s.rows * (c.visual_tokens + s.text), s.rows * (c.vit.prefix + c.vit.side**2)


def activations(model, s):
    """Numbers that blocks and layers keep for the backward pass; with --recompute their inputs alone.

    In a layer of the LLM, per token: the inputs of both norms, q, k, v, the output of attention, gate,
    silu(gate), up, and the inputs of q's and k's norms where it has them. A matrix keeps its own input only where it trains. A frozen ViT keeps nothing; one
    that trains: inputs and outputs of both norms, q, k, v, the output of attention, both sides of GELU.
    """
    c = model.config
    tokens, patches = places(c, s)
    D = c.llm.width
    q_width, kv_width = c.llm.heads * c.llm.head_dim, c.llm.kv_heads * c.llm.head_dim
    kept, inputs = [], 0
    for layer in models.every_layer(model):
        if isinstance(layer, models.LlamaLayer):
            numbers = 2 * D + 2 * q_width + 2 * kv_width + 3 * c.llm.mlp
            if c.llm.qk_norm:
                numbers += q_width + kv_width
            if trains(layer.q) or trains(layer.k) or trains(layer.v):
                numbers += D
            if trains(layer.gate) or trains(layer.up):
                numbers += D
            if trains(layer.down):
                numbers += c.llm.mlp
            for m in layer.modules():
                if isinstance(m, LowRank):
                    numbers += m.down.out_features
            kept.append(tokens * numbers)
            inputs += tokens * D
        elif trains(layer.fc1):
            kept.append(patches * (8 * c.vit.width + 2 * c.vit.mlp))
            inputs += patches * c.vit.width
    return inputs + max(kept) if s.recompute else sum(kept)


def memory(model, s, world=1):
    """Bytes on one GPU at the worst moment of a step, by what they are for: arithmetic, not measurement."""
    c, b = model.config, BYTES[s.dtype]
    master = max(b, 4)
    trained, frozen = (sum(numbers) for numbers in zip(*sizes(model).values()))
    split = world if s.shard else 1
    tokens, patches = places(c, s)
    adapter = s.rows * c.visual_tokens * (2 * c.vit.width + 3 * c.llm.width)
    layer_gradients = 3 * max(c.llm.mlp * tokens, c.vit.mlp * patches)
    chunk = 3 * 4 * models.LOGITS  # logits, their softmax and gradient, in fp32
    work = b * layer_gradients + chunk
    if b < master and not s.recompute:
        work += b * trained  # the masters' copies in bf16, kept for the backward pass
    if s.shard:
        layers = [models.count(layer) for layer in models.every_layer(model)]
        ends = trained + frozen - sum(layers)
        work += b * (3 * max(layers) + ends)  # gathered: a layer, the next, its gradients; the ends
    return {
        "weights": (b * frozen + master * trained) // split,
        "gradients": master * trained // split,
        "optimizer": 2 * master * trained // split,
        "activations": b * (activations(model, s) + adapter + 4 * c.llm.width * tokens),
        "work": work,
        "CUDA": GIB if s.dtype == "bf16" else 0,  # context and libraries, about
    }


@cache
def adapter_flops(make, inputs, side, gradients, to_patches):
    """FLOPs of an adapter, make(*inputs), for one image of side x side patches; with gradients: those of its
    weights and, where asked, of the patches. Torch counts them on the meta device. What an adapter does once a
    batch, as a resampler with its queries, counts for every image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        # in fp64 the pool is no kernel: one needs a device to run on
        patches = torch.empty(1, side**2, inputs[0], dtype=torch.float64, requires_grad=to_patches)
        y = make(*inputs).double()(patches)
        _, width, grid, _ = inputs
        if y.shape != (1, grid**2, width):
            raise BadInput(
                f"--adapter {make.__name__}: makes {tuple(y.shape[1:])} of an image; for --grid {grid} and "
                f"this LLM it has to be ({grid**2}, {width})"
            )
        if gradients:
            y.sum().backward()
    return counter.get_total_flops()


def flops(c: models.Config, text, supervised, stage=None, tune=None, inner=0, rank=0, on=()):
    """FLOPs of one image-text pair by part: the forward pass; with a stage also its gradients.

    A multiply-add is two. Causal attention is counted at the half that it needs. Gradients: as much as
    the forward pass for what flows through (dX), as much again for weights that train (dW).
    Recomputation is not counted. tune "inner": `inner` layers are added to the LLM; they and its ends train.
    tune "lora": matrices of this rank train beside those named `on` of every layer.
    """
    v, l = c.vit, c.llm
    layers = l.layers + inner
    patches, T = v.prefix + v.side**2, c.visual_tokens + text
    patch_embed = 2 * v.side**2 * 3 * v.patch**2 * v.width
    vit_matrices = 2 * patches * (4 * v.width**2 + 2 * v.width * v.mlp)
    vit = patch_embed + v.layers * (vit_matrices + 4 * patches**2 * v.width)
    adapter = (ADAPTERS[c.adapter], (v.width, l.width, c.grid, c.ln_vision), v.side)
    q_width, kv_width = l.heads * l.head_dim, l.kv_heads * l.head_dim
    qv = 2 * T * l.width * (q_width + kv_width)
    layer = 2 * T * l.width * (2 * q_width + 2 * kv_width + 3 * l.mlp)
    ends = {name: l.width + l.mlp for name in ("gate", "up", "down")}  # of a matrix: both its sides
    ends |= dict.fromkeys("qo", l.width + q_width) | dict.fromkeys("kv", l.width + kv_width)
    low = 2 * T * rank * sum(ends[name] for name in on)
    attention = 2 * T * T * q_width
    head = 2 * supervised * l.width * l.vocab
    parts = {
        "vit": vit,
        "adapter": adapter_flops(*adapter, False, False),
        "llm": layers * (layer + low + attention),
        "head": head,
    }
    if stage is None:
        return parts
    tune = tune or models.TUNE[stage]
    vit_trains = stage == 2 and tune not in ("inner", "lora")
    if vit_trains:
        parts["vit"] += 2 * vit - patch_embed  # pixels need no gradient
    parts["adapter"] = adapter_flops(*adapter, True, vit_trains)
    trained = {"none": 0, "qv": l.layers * qv, "full": l.layers * layer, "inner": inner * layer}
    trained["lora"] = layers * low
    parts["llm"] += layers * (layer + low + 2 * attention) + trained[tune]
    parts["head"] += head * (2 if tune in ("full", "inner") else 1)
    return parts


def arithmetic(c, s, batch=None):
    """FLOPs of a micro-batch, its gradients included; of one assumed row where no batch is given."""
    images, rows, text, supervised = 1, 1, s.text, s.answer
    if batch is not None:
        rows, T = batch.tokens.shape
        images = len(batch.images)
        text = max(0, T - c.visual_tokens)
        supervised = batch.supervised / rows
    added = (len(s.inner_layers or []), s.rank or 0, s.lora_on or ())
    cost = flops(c, text, supervised, s.stage, s.tune, *added)
    return images * (cost["vit"] + cost["adapter"]) + rows * (cost["llm"] + cost["head"])


def peak_flops(device):
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK.items() if key in name), None)


def gpu_memory(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return None


def short(n):
    if n >= 1e9:
        return f"{n / 1e9:.2f}B"
    return f"{n / 1e6:.2f}M" if n >= 1e5 else str(n)


def gib(n):
    return f"{n / GIB:.1f}" if n >= GIB / 10 else f"{n / GIB:.3f}"


def counted(counts):
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def describe(model, s, world, origins, room=None):
    """The table that a run opens with: what trains, from where, in which precision, in how much memory."""
    c = model.config
    print(
        f"\nstage {s.stage} of {s.preset}: {c.visual_tokens} visual tokens an image of "
        f"{c.vit.image_size} px ({c.adapter}); batch {s.batch} = {world} ranks x {s.accum} micro-batches "
        f"x {s.rows} rows; {s.steps} steps"
    )
    if s.inner_layers:
        after = ", ".join(map(str, s.inner_layers))
        print(f"branch {s.branch}: layers of its own after {after} of the LLM's {c.llm.layers}")
    if s.rank:
        print(f"{model.branch} of every layer of the LLM")
    print(f"{'part':<9}{'trained':>10}{'frozen':>10}  {'dtype':<19}{'lr':>8}  from")
    for part, (trained, frozen) in sizes(model).items():
        dtypes = []
        if trained:
            dtypes.append("fp32 master" if s.dtype == "bf16" else f"{s.dtype} master")
        if frozen:
            dtypes.append(f"{s.dtype} frozen")
        lr = f"{s.lr[part]:.0e}" if trained else "-"
        print(
            f"{part:<9}{short(trained):>10}{short(frozen):>10}  {', '.join(dtypes):<19}{lr:>8}  "
            f"{origins[part]}"
        )
    parts = memory(model, s, world)
    total = sum(parts.values())
    summands = " + ".join(f"{name} {gib(n)}" for name, n in parts.items() if n)
    print(f"memory of a rank, GiB, calculated and not measured: {gib(total)} = {summands}")
    if room and total > room:
        first = "" if s.recompute else "--recompute, "
        print(
            f"  more than the {gib(room)} GiB that are there: {first}--shard or more --accum make it less"
        )


def show_stages(tables):
    """The stages of every preset, {preset: {stage: row}}, for people."""
    print(
        f"{'preset':<13}stage{'steps':>7}{'batch':>7}{'pixels':>8}{'tokens':>8}  peak learning rates"
    )
    for preset, table in tables.items():
        for stage, row in table.items():
            config = models.PRESETS[preset]()
            pixels = row.image_size or config.vit.image_size
            lr = ", ".join(f"{part} {rate:.0e}" for part, rate in row.lr.items())
            print(
                f"{preset:<13}{stage:>5}{row.steps:>7}{row.batch:>7}{pixels:>8}"
                f"{config.visual_tokens:>8}  {lr}"
            )


def glance(source, numbers):
    """Some records of a source are read, so that a wrong folder is found before a machine is rented."""
    problems = []
    for n in numbers:
        try:
            record = source.read(n)
            for ref in record.refs:
                peek(ref, record.where)
        except BadInput as e:
            problems.append(e)
    if problems:
        print(
            f"  {source.name}: {len(problems)} of {len(numbers)} cannot be read, as {problems[0]}"
        )
