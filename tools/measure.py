"""What the benchmarks share: clocks, the device's copy bandwidth, a table that is printed as it is measured."""

import math
import platform
import time
from statistics import median

import torch


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def seconds(run):
    """Wall time of one call; the device is drained before the clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_seconds(run):
    """CPU time of one call, which does not mind other processes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def update_clock(device):
    if device == "cuda" or torch.get_num_threads() > 1:
        return seconds
    return cpu_seconds


def typical(run, repeat, warmup=1):
    """Median wall time."""
    for _ in range(warmup):
        run()
    return median(seconds(run) for _ in range(repeat))


def in_turns(sides, repeat, clock=seconds):
    """{side: its least time}; the sides take turns, so that what slows one slows all."""
    took = dict.fromkeys(sides, math.inf)
    for _ in range(repeat):
        for side, run in sides.items():
            took[side] = min(took[side], clock(run))
    return took


def copy_bandwidth(device):
    """Bytes per second of a plain copy, read and written: what anything bound by memory is held against."""
    size = 1 << 30 if device == "cuda" else 1 << 27
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / typical(lambda: b.copy_(a), repeat=20, warmup=3)


class Table:
    """Prints a row as soon as it is measured, and keeps all of them for the JSON line at the end."""

    def __init__(self, *columns):
        self.columns = columns
        self.rows = []
        self.show(columns)

    def add(self, *values):
        self.rows.append(dict(zip(self.columns, values)))
        self.show(f"{v:,.4g}" if isinstance(v, float) else v for v in values)

    def show(self, cells):
        padded = [f"{str(cell):>{max(9, len(c))}}" for cell, c in zip(cells, self.columns)]
        print("  ".join(padded), flush=True)
