"""The processes of one run, as torchrun starts them."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = 5  # seconds that the ranks have to sign in after one of them has gone


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device

    def reduce(self, tensor):
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def sum(self, *numbers):
        """Sums over the ranks of whole numbers; no device waits for them."""
        total = torch.tensor(numbers, dtype=torch.int64)
        self.reduce(total)
        return total.tolist()

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


def setup_ranks(device=None, timeout=600):
    """Join the process group that torchrun describes, or stand alone."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device(device))
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def silent_ranks():
    """Which ranks have gone: those that do not sign in at the store where all of them met.

    Where no torchrun keeps the store, rank 0 does, so that its own silence is the store's."""
    rank, world, silent = dist.get_rank(), dist.get_world_size(), [0]

    def look():
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            store.set(f"here/{rank}", "")
            time.sleep(PATIENCE)
            silent[:] = [r for r in range(world) if not store.check([f"here/{r}"])]

    thread = threading.Thread(target=look, daemon=True)  # a store that was stopped never answers
    thread.start()
    thread.join(2 * PATIENCE)
    return silent
