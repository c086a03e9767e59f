"""The processes of one run."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = 5  # seconds that the ranks have to sign in after one of them has gone


def setup_ranks(device=None, timeout=600):
    """(rank, world, device): joins the process group that torchrun describes, or stands alone."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=timeout)
    )
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device(device)


def silent_ranks():
    """Which ranks have gone: those that do not sign in at the store where all of them met. Where no torchrun keeps it,
    rank 0 does, so that its own silence is the store's."""
    rank, world, silent = torch.distributed.get_rank(), torch.distributed.get_world_size(), [0]

    def look():
        with suppress(RuntimeError):
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"here/{rank}", "")
            time.sleep(PATIENCE)
            silent[:] = [r for r in range(world) if not store.check([f"here/{r}"])]

    thread = threading.Thread(
        target=look, daemon=True
    )  # a store that was stopped would never answer
    thread.start()
    thread.join(2 * PATIENCE)
    return silent


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device
    host: object  # a process group of the hosts, for small numbers that no device should wait for

    def agree(self, *numbers):
        """Sums over the ranks of whole numbers that the hosts know."""
        if self.world == 1:
            return list(numbers)
        t = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(t, group=self.host)
        return t.tolist()
