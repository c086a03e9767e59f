"""Shared by all tests: no GPU is assumed, the Triton kernel runs in its interpreter, and nothing reaches a network."""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must stand before the first import of triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
torch.set_num_threads(1)  # two threads would wait for one another wherever other programs run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The indexes of data files that a test finds are those that it has made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """What passes here passes on every machine: on a GPU run the pooling kernel's own tests and no others."""
    if request.module.__name__ != "test_pool_triton":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small world to train in, and `start`, a random model (tiny.world); no test writes into it."""
    import tiny

    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    """In `world`, as a user would be; -> a folder for what the test writes."""
    import train

    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "plot", lambda folder: None)  # matplotlib takes longer than a run
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder for sample.py: `ck`, a checkpoint, and pictures, one wide, one tall, one small, one broken; read only."""
    import tiny

    return tiny.talk(tmp_path_factory.mktemp("sample"))
