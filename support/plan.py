"""What a run will take: parameters, memory, arithmetic."""

import torch

import model as models

PARTS = ("vit", "adapter", "llm")

GIB = 2**30

PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}  # dense bf16 FLOP/s by the data sheets, for MFU


def sizes(model):
    """{part: (parameters that train, parameters that do not)}"""
    sums = {part: [0, 0] for part in PARTS}
    for name, p in model.named_parameters():
        sums[models.part_of(name)][not p.requires_grad] += p.numel()
    return sums


def kept(c, s):
    """Bytes that the layers keep for the backward pass. In a layer without recomputation, per token:

        LLM   attention's norm: its input; q, k, v, the attention's output; the MLP's norm: its input; gate, silu, up
              where Q and V train, or all: the first norm's output; where all train: the second's, silu(gate) * up
        ViT   (if it trains) two norms' inputs and outputs, q, k, v, the attention's output; the MLP's before and after
    A matrix keeps its input only if it trains, so frozen layers keep less, and a frozen ViT keeps nothing.
    A branch's layers keep what layers keep where all train; those that they follow, what frozen ones do.
    """
    D, Dv, b, tune = c.llm.width, c.vit.width, number_bytes(s), tuned(s)
    tokens, patches = s["rows"] * (c.visual_tokens + s["text"]), s["rows"] * (1 + c.vit.side**2)
    kv = D // c.llm.heads * c.llm.kv_heads

    def layer(tune):  # bytes per token
        attention = 3 * D + 2 * kv + D * (tune in ("qv", "full"))
        return b * (attention + D + 3 * c.llm.mlp + (D + c.llm.mlp) * (tune == "full"))

    base, inner = layer(tune), c.llm.branches[s["branch"]] if tune == "inner" else []
    added = layer("full") if inner else 0
    block = b * patches * (8 * Dv + 2 * c.vit.mlp) if s["stage"] == 2 and not inner else 0
    if not s["recompute"]:
        return tokens * (c.llm.layers * base + len(inner) * added) + c.vit.layers * block
    inputs = (c.llm.layers + len(inner)) * b * tokens * D + (
        c.vit.layers * b * patches * Dv if block else 0
    )
    return inputs + max(
        tokens * max(base, added), block
    )  # and the one layer that is computed again


def tuning(s):
    return s["stage"], tuned(s), s["branch"] if tuned(s) == "inner" else None


def tuned(s):
    return s.get("tune") or models.TUNE[s["stage"]]


def number_bytes(s):
    return {"bf16": 2, "fp64": 8}.get(s["dtype"], 4)


def memory(model, s, world=1, sharded=False):
    """Bytes on one GPU at the worst moment of a step, by what they are for: arithmetic, not measurement."""
    c, b = model.config, number_bytes(s)
    master, split = max(b, 4), world if sharded else 1
    trained, frozen = (sum(n) for n in zip(*sizes(model).values()))
    D, Dv, V = c.llm.width, c.vit.width, c.llm.vocab
    tokens, patches = s["rows"] * (c.visual_tokens + s["text"]), s["rows"] * (1 + c.vit.side**2)
    work = (
        3 * b * max(c.llm.mlp * tokens, c.vit.mlp * patches)
    )  # gradients on their way through one layer
    adapter = (
        s["rows"] * c.visual_tokens * (8 * Dv + 3 * D * b) + 4 * D * b * tokens
    )  # its own, and the splice
    own = (
        V * D * 3 * master if tuned(s) in ("full", "inner") else 0
    )  # the head trains, and the embedding
    head = V * D * b + own + 12 * 2**23 + 4 * s["rows"] * s["answer"] * D * b
    copies = (
        b * trained if b < master and not s["recompute"] else 0
    )  # masters in bf16, kept for the backward pass
    groups = [sum(p.numel() for p in layer.parameters()) for layer in models.every_layer(model)]
    rest = trained + frozen - sum(groups)
    return {
        "weights": (b * frozen + master * trained) // split,
        "gradients": master * trained // split,
        "optimizer": 2 * master * trained // split,
        "activations": kept(c, s) + work + adapter + head + copies,
        "gathered": b * (3 * max(groups) + rest)
        if sharded
        else 0,  # a layer, the next, its gradients; the rest
        "CUDA": GIB if s["dtype"] == "bf16" else 0,
    }  # context and libraries, about


def arithmetic(c, s, batch):
    """FLOPs that a micro-batch needs: its forward pass and the gradients of this run."""
    B, T = batch.tokens.shape
    cost = models.flops(c, max(0, T - c.visual_tokens), batch.supervised / B, *tuning(s))
    return len(batch.images) * (cost["vit"] + cost["adapter"]) + B * (cost["llm"] + cost["head"])


def peak_flops(device):
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK.items() if key in name), None)


def short(n):
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M" if n >= 1e5 else str(n)


def gib(n):
    return f"{n / GIB:.1f}" if n >= GIB / 10 else f"{n / GIB:.3f}"


def total_memory(device):
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def counted(counts):
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def describe(model, s, world, names, sharded, room=None):
    """What will train, from where, in which precision, and the memory that takes: the table that a run opens with."""
    c, compute = model.config, s["dtype"]
    print(
        f"\nstage {s['stage']} of {s['preset']}: {c.visual_tokens} visual tokens an image of {c.vit.image_size} px "
        f"({c.adapter}); batch {s['batch']} = {world} ranks x {s['accum']} micro-batches x {s['rows']} rows; "
        f"{s['steps']} steps"
    )
    if c.llm.branches:
        print(
            "".join(
                f"branch {name}: layers of its own after {', '.join(map(str, inner))} of the LLM's {c.llm.layers}"
                for name, inner in c.llm.branches.items()
            )
        )
    print(f"{'part':<9}{'trained':>10}{'frozen':>10}  {'dtype':<19}{'lr':>8}  from")
    for part, (trained, frozen) in sizes(model).items():
        master = "fp32" if compute == "bf16" else compute
        dtype = ", ".join(
            [f"{master} master"] * bool(trained) + [f"{compute} frozen"] * bool(frozen)
        )
        lr = f"{s['lr'][part]:.0e}" if trained else "-"
        print(
            f"{part:<9}{short(trained):>10}{short(frozen):>10}  {dtype:<19}{lr:>8}  {names[part]}"
        )
    parts = memory(model, s, world, sharded)
    total = sum(parts.values())
    print(
        f"memory of a rank, GiB, calculated and not measured: {gib(total)} = "
        + " + ".join(f"{name} {gib(n)}" for name, n in parts.items() if n)
    )
    if room and total > room:
        print(
            f"  more than the {gib(room)} GiB that are there: "
            + "--recompute, " * (not s["recompute"])
            + "--shard or more --accum make it less"
        )
