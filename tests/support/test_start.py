"""What sample.py and evaluate.py open: the newest of out/, LLaVA's folder, the released file."""

import os

import layouts
import oracle
import pytest
import tiny
import torch

import sample
import support.start
import weights
from support.errors import BadInput
from text import Tokenizer


def test_without_a_checkpoint_it_is_the_newest_of_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="python train.py --stage all"):
        sample.main(["--prompt", "x"])
    (tmp_path / "out/stage3").mkdir(parents=True)  # a run that has saved nothing yet
    for path, seed in (("out/stage2/step-00000002", 1), ("out/stage1/step-00000100", 2)):
        weights.save(tmp_path / path, tiny.model(seed), Tokenizer(tiny.TOKENIZER))
        os.utime(tmp_path / path / "config.json", (seed, seed))
        named, _ = support.start.load_model(path + "/model.safetensors", device="cpu")
        assert tiny.same(named, tiny.model(seed))
        newest, _ = support.start.load_model(device="cpu")
        assert tiny.same(newest, tiny.model(seed))


def test_llavas_folder_is_asked_as_it_was_trained_and_brings_or_is_given_a_tokenizer(
    made, tmp_path, capsys
):
    folder = oracle.folder(oracle.llava(vocab_size=700), tmp_path / "llava")
    with pytest.raises(BadInput, match="no tokenizer.model; name LLaMA's with --tokenizer"):
        support.start.load_model(folder, device="cpu")
    loaded = support.start.load_model(folder, tiny.TOKENIZER, device="cpu")
    picture = made / "photos/wide.png"
    asked = ["<ImageHere>Question:what? Short answer:"]
    images = [sample.open_image(picture)]
    [said] = sample.generate(*loaded, images, asked, **sample.DECODING["vqa"])
    (folder / "tokenizer.model").write_bytes(tiny.TOKENIZER.read_bytes())
    argv = f"--ckpt {folder} --image {picture} --task vqa --prompt What? --device cpu"
    sample.main(argv.split())
    assert capsys.readouterr().out == f"{said}\n"
    few = oracle.folder(oracle.llava(), tmp_path / "few")
    with pytest.raises(BadInput, match="pieces, more than the 104"):
        support.start.load_model(few, tiny.TOKENIZER, device="cpu")


def test_the_released_file_is_opened_with_the_tokenizer_beside_it(tmp_path, monkeypatch):
    ours = tiny.model()
    monkeypatch.setitem(support.start.models.PRESETS, "infmllm-7b", lambda: ours.config)
    torch.save(layouts.released(ours), tmp_path / "InfMLLM.bin")
    (tmp_path / "tokenizer.model").write_bytes(tiny.TOKENIZER.read_bytes())
    model, _ = support.start.load_model(tmp_path / "InfMLLM.bin", device="cpu")
    assert tiny.same(model, ours)
