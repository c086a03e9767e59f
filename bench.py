"""Every performance claim of this project, measured side by side in one run.

    python bench.py pool         # the pooling kernel against eager, torch.compile and the device's copy bandwidth
    python bench.py data         # the loader against a bare Pillow loop; opening and reading a million records

Each prints a table with the device it found and ends with one JSON line.
"""
import argparse
import json
import platform
import time
from functools import partial

import torch


def device_name(device):
    if device == "cuda": return torch.cuda.get_device_name()
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def seconds(run, repeat=5, warmup=1):
    """Median wall time of one call; the device is drained before the clock is read."""
    times = []
    for i in range(warmup + repeat):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        if i >= warmup: times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


# One function a claim; BENCHES at the end of the file names them.


def naive_pool(x, weight, bias, grid, eps=1e-5, channels_first=False):
    """What one writes first: LayerNorm, drop CLS, bring each window's patches together (a copy), mean over them."""
    (N, tokens, D), P = x.shape, grid
    w = round((tokens - 1) ** 0.5) // P
    y = torch.nn.functional.layer_norm(x, (D,), weight.to(x.dtype), bias.to(x.dtype), eps)[:, 1:]
    if channels_first: return y.permute(0, 2, 1).reshape(N, D, P, w, P, w).mean((3, 5)).flatten(2).permute(0, 2, 1)
    return y.reshape(N, P, w, P, w, D).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).mean(3).flatten(1, 2)


def pool_bytes(N, s, P, D, width, backward):
    """What must move: x in, y out; with a backward also x and dy in, dx out, and mean and rstd (fp32) out and in."""
    forward = width * N * D * (s * s + P * P)
    return forward + (width * N * D * (s * s + P * P + 1 + s * s) + 16 * N * s * s if backward else 0)


def time_pool(functions, N, s, P, D, dtype, device):
    """{name: (seconds of forward, seconds of forward + backward)}, on the same numbers."""
    x = torch.randn(N, 1 + s * s, D, device=device, dtype=dtype)
    weight, bias = torch.rand(D, device=device), torch.rand(D, device=device)
    leaves, dy = [t.clone().requires_grad_() for t in (x, weight, bias)], torch.randn_like(x[:, :P * P])
    if device == "cuda":
        from triton.testing import do_bench                  # device events; the L2 cache is flushed between runs
        clock = lambda run: do_bench(run, return_mode="median") / 1e3
    else: clock = lambda run: seconds(run, repeat=15, warmup=2)

    def forward(f):
        with torch.no_grad(): return f(x, weight, bias, P, 1e-5)

    def both(f): torch.autograd.grad(f(*leaves, P, 1e-5), leaves, dy)
    return {name: [clock(partial(run, f)) for run in (forward, both)] for name, f in functions.items()}


def copy_bandwidth(device, size=1 << 30):
    a = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2 * size / seconds(lambda: b.copy_(a), repeat=20, warmup=3)


def bench_pool(args):
    """The fused LayerNorm + window mean. On a GPU the kernel, in bf16; on a CPU the reference, in fp32."""
    from adapter import pool_reference
    cuda = args.device == "cuda"
    dtype, functions = (torch.bfloat16 if cuda else torch.float32), {"eager": naive_pool}
    if cuda:
        import pool_triton
        functions |= {"compiled": torch.compile(pool_reference, dynamic=False), "ours": pool_triton.pool}
        torch._dynamo.config.recompile_limit = 256           # one graph a shape
        towers = [(16, 8, 1408), (16, 16, 1408), (32, 8, 1408), (32, 16, 1408), (32, 32, 1408),     # EVA ViT-g/14
                  (24, 8, 1024), (24, 12, 1024), (24, 24, 1024)]                                    # CLIP ViT-L/14-336
        shapes = [(2 ** n, *tower) for tower in towers for n in range(3, 11)]
    else:
        functions |= {"D first": partial(naive_pool, channels_first=True), "ours": pool_reference}
        shapes = [(64, 8, 4, 128), (64, 8, 8, 128), (8, 24, 8, 1024), (8, 24, 12, 1024), (8, 24, 24, 1024),
                  (2, 32, 16, 1408)]
    peak = copy_bandwidth(args.device, 1 << 30 if cuda else 1 << 27)
    print(f"copy of this device: {peak / 1e9:.0f} GB/s, read + write. {pool_bytes.__doc__}")
    print("    N  s  P     D  pass            GB    GB/s  % of copy  " + "".join(f"{n + ' ms':>12}" for n in functions))
    rows, judged = [], set()                                 # *: the smallest N of this pair that moves 1 GB
    for N, s, P, D in shapes:
        times = time_pool(functions, N, s, P, D, dtype, args.device)
        for i, name in enumerate(("forward", "fwd + bwd")):
            size, took = pool_bytes(N, s, P, D, dtype.itemsize, i), {f: t[i] for f, t in times.items()}
            rate, star = size / took["ours"], size >= 1e9 and (s, P, D, name) not in judged
            if star: judged.add((s, P, D, name))
            print(f"{N:5} {s:2} {P:2} {D:5}  {name:9} {size / 1e9:8.3f} {rate / 1e9:7.0f} {100 * rate / peak:8.0f}%"
                  f"{' *'[star]}  " + "".join(f"{1e3 * t:12.3f}" for t in took.values()))
            rows.append({"N": N, "s": s, "P": P, "D": D, "pass": name, "judged": star, "bytes": size,
                         "GB/s": rate / 1e9, "of_copy": rate / peak,
                         **{f"x_{f}": took[f] / took["ours"] for f in functions if f != "ours"}})
    return {"dtype": str(dtype), "copy_GB/s": peak / 1e9, "rows": rows}


BENCHES = {"pool": bench_pool}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=sorted(BENCHES), help="which claim to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    print(f"{args.bench} on {device_name(args.device)}, torch {torch.__version__}")
    print(json.dumps({"bench": args.bench, "device": device_name(args.device), **BENCHES[args.bench](args)}))


if __name__ == "__main__":
    main()
