"""Files of tensors: what is refused, and in how much memory the others are read."""

import os
import subprocess
import sys
import time
import zipfile

import oracle
import pytest
import tiny
import torch
from safetensors.torch import save_file

from model import InfMLLM
from support.errors import BadInput
from weights import rename
from weights.files import load_tensors
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


def load(state, path):
    """A file of torch's with our small network's tensors, as somebody may hand it on."""
    torch.save(state, path)
    model = rename.on_meta(InfMLLM, tiny.network().config)
    return rename.fill(model, path, {}, None)


def test_a_state_dict_of_parameters_loads(tmp_path):
    ours = tiny.network()
    assert tiny.same(load(dict(ours.named_parameters()), tmp_path / "x.bin"), ours)
    assert not load_tensors(tmp_path / "x.bin")["llm.embed.weight"].requires_grad


STRANGE = {
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without numbers": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_plain_array_of_floats_is_refused(kind, tmp_path):
    state = tiny.network().state_dict()
    key = "llm.embed.weight"
    state[key] = STRANGE[kind](state[key])
    with pytest.raises(BadInput, match=kind) as e:
        load(state, tmp_path / "x.bin")
    assert "x.bin" in str(e.value) and len(str(e.value)) < 500


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    torch.save(tiny.network().state_dict(), tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as whole:
        with zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as squeezed:
            for name in whole.namelist():
                squeezed.writestr(name, whole.read(name))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(BadInput, match="y.bin: is compressed"):
        load_tensors(tmp_path / "y.bin")


def test_a_header_is_read_once_for_all_tensors(tmp_path):
    ours = tiny.network()
    notes = {str(n): "" for n in range(200_000)}
    save_file(dict(ours.named_parameters()), tmp_path / "model.safetensors", notes)
    model = rename.on_meta(InfMLLM, ours.config)
    began = time.process_time()
    assert tiny.same(rename.fill(model, tmp_path, {}, None), ours)
    assert time.process_time() - began < 3


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
