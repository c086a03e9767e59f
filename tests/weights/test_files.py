"""Files of tensors: what is refused, and in how much memory the others are read."""

import os
import subprocess
import sys

import oracle
import pytest
import tiny
import torch

from support.errors import BadInput
from weights.llama import load_llama


@pytest.mark.parametrize("harm", [b"", b"<html>not found</html>", "cut", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_broken_foreign_files_are_one_sentence_with_file_and_remedy(name, harm, tmp_path):
    theirs = oracle.llama()
    oracle.folder(theirs, tmp_path)
    file = tmp_path / name
    if name.endswith(".bin"):
        torch.save(theirs.state_dict(), file)
        (tmp_path / "model.safetensors").unlink()
    if harm == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif harm == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(harm)
    with pytest.raises(BadInput) as e:
        load_llama(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


PEAK = """
import os, sys
from pathlib import Path
import torch
import weights

def held():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

warm, *folders = sys.argv[1:]
for folder, dtype in zip(folders, (torch.float16, torch.bfloat16)):  # as saved, and converted
    if os.fork() == 0:  # so that none finds the memory that another has given back
        weights.load_llama(warm, torch.bfloat16)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from what is held
        before = held()
        model = weights.load_llama(folder, dtype)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print((held() - before) / size, flush=True)
        os._exit(0)
    os.wait()
"""


def test_loading_holds_at_most_a_sixth_more_than_the_weights(tmp_path):
    large = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8)
    theirs = oracle.llama(**large).half()  # 113 MB
    theirs.save_pretrained(tmp_path / "safetensors", max_shard_size="40MB")
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    warm = oracle.folder(oracle.llama(), tmp_path / "warm", published=True)
    child = [sys.executable, "-c", PEAK, warm, tmp_path / "safetensors", tmp_path / "bin"]
    said = subprocess.run(child, capture_output=True, text=True, check=True, cwd=tiny.ROOT)
    mapped, read = map(float, said.stdout.split())
    assert 0.9 < mapped <= 1.15 and 0.9 < read <= 1.15
