"""Every performance claim of this project, measured side by side in one run.

    python -m tools.bench pool         # the pooling kernel against eager, torch.compile and the copy bandwidth
    python -m tools.bench decode       # generation against transformers', toy size; decode-small: 1.1B
    python -m tools.bench step         # an update against transformers', per stage, at two shapes
    python -m tools.bench memory       # the peak of an update against transformers', each in its own process
    python -m tools.bench loop         # what the training loop costs beside its work
    python -m tools.bench tune         # inner adaptors, LoRA, Q and V, the whole LLM: what trains, memory, time
    python -m tools.bench limit --preset infmllm-7b       # MFU and memory, beside what --plan says
    python -m tools.bench profile --preset infmllm-7b --stage 2    # the kernels that take the time
    python -m tools.bench decoding --preset infmllm-7b    # share of the bandwidth
    python -m tools.bench grouped --preset small          # attention of padded rows with grouped queries
    python -m tools.bench search       # the pooling kernel with other rows, stages, warps
    python -m tools.bench sharded      # ranks against a single process
    python -m tools.bench data         # opening and reading a million records; the loader as below
    python -m tools.bench loader       # the loader against a bare Pillow loop

Each prints a table with the device it found and ends with one JSON line.
"""

import argparse
import json

import torch

from tools import bench_data, bench_decode, bench_gpu, bench_pool, bench_train
from tools.measure import device_name

BENCHES = {
    "pool": bench_pool.pool,
    "decode": bench_decode.decode,
    "decode-small": bench_decode.decode_small,
    "step": bench_train.step,
    "memory": bench_train.memory,
    "loop": bench_train.loop,
    "tune": bench_train.tune,
    "limit": bench_gpu.limit,
    "profile": bench_gpu.profile,
    "decoding": bench_gpu.decoding,
    "grouped": bench_gpu.grouped,
    "search": bench_gpu.search,
    "sharded": bench_gpu.sharded,
    "data": bench_data.data,
    "loader": bench_data.loader,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("bench", choices=BENCHES, help="which claim to measure")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--shapes", default="toy,100M", help="of step and memory: toy, 100M, 7b, or several")
    add("--repeat", type=int, default=5, help="of step: how often in turns; default 5")
    add("--preset", default="toy", help="of what a device's limits are asked for; default toy")
    add("--stage", type=int, default=0, help="of limit and profile: one alone")
    add("--compile", action="store_true", help="of limit and profile: as train.py --compile")
    add("--micro", type=int, default=4, help="of step and memory: our micro-batches; default 4")
    args = parser.parse_args()
    device = device_name(args.device)
    print(f"{args.bench} on {device}, torch {torch.__version__}")
    found = BENCHES[args.bench](args)
    print(json.dumps({"bench": args.bench, "device": device, **found}))


if __name__ == "__main__":
    main()
