"""Shared by all tests: no GPU is assumed, the Triton kernel runs in its interpreter, and nothing reaches a network."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must stand before the first import of triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(min(2, os.cpu_count() or 1))
