"""What sample.py and evaluate.py open: the newest of out/, LLaVA's folder, the released file."""

import json
import os
import shutil
from types import SimpleNamespace

import bpe
import layouts
import oracle
import pytest
import tiny
import torch

import sample
import support.start
import train
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


def test_a_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    first, second = (tmp_path / f"step-0000000{n}" for n in (1, 2))
    weights.save(first, tiny.model(1), Tokenizer(tiny.TOKENIZER))
    load = weights.load

    def load_while_it_trains(folder, dtype):
        if folder == first:
            weights.save(second, tiny.model(2), Tokenizer(tiny.TOKENIZER))
            shutil.rmtree(first)
        return load(folder, dtype=dtype)

    monkeypatch.setattr(weights, "load", load_while_it_trains)
    model, _ = support.start.load_model(tmp_path, device="cpu")
    assert tiny.same(model, tiny.model(2))


def test_a_checkpoint_of_a_time_with_fewer_fields_is_its_preset_still():
    toy = tiny.ROOT / "assets/toy"
    assert "head_dim" not in (toy / "config.json").read_text()
    support.start.same_architecture(SimpleNamespace(preset="toy", vit=None, llm=None), toy)
    with pytest.raises(BadInput, match="is not nano .vit patch 8 and not 16"):
        support.start.same_architecture(SimpleNamespace(preset="nano", vit=None, llm=None), toy)


def test_llavas_folder_is_asked_as_it_was_trained_and_brings_or_is_given_a_tokenizer(
    made, tmp_path, capsys
):
    folder = oracle.folder(oracle.llava(vocab_size=700), tmp_path / "llava")
    with pytest.raises(
        BadInput, match=r"no tokenizer.model and no tokenizer.json \(but config.json, .*--tokenizer"
    ):
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


def test_a_tokenizer_of_another_model_is_noted_and_one_with_other_ends_refused(tmp_path, capsys):
    few, many = (oracle.folder(oracle.llava(vocab_size=n), tmp_path / str(n)) for n in (700, 9000))
    size = Tokenizer(tiny.TOKENIZER).size
    support.start.load_model(many, tiny.TOKENIZER, device="cpu")
    assert f"has {size} pieces and the LLM 9000 embeddings" in capsys.readouterr().err
    config = json.loads((few / "config.json").read_text())

    def say(key, ids):
        text = config["text_config"] | {key: ids}
        (few / "config.json").write_text(json.dumps(config | {"text_config": text}))

    say("eos_token_id", [2, 7])  # one of several
    support.start.load_model(few, tiny.TOKENIZER, device="cpu")
    for key, ids in (("bos_token_id", 7), ("eos_token_id", [7, 8])):
        say(key, ids)
        with pytest.raises(BadInput, match=f"its {key} is . and that of .* is .?7"):
            support.start.load_model(few, tiny.TOKENIZER, device="cpu")


def test_a_tokenizer_without_bos_fits_a_padded_embedding_and_is_kept_by_the_run(here, capsys):
    """As Qwen's folder is: config.json names a BOS that nobody puts, and there are more rows than words."""
    folder = oracle.folder(oracle.llama(vocab_size=905, max_position_embeddings=256), here / "llm")
    config = json.loads((folder / "config.json").read_text())
    ends = {"bos_token_id": 900, "eos_token_id": 902}
    (folder / "config.json").write_text(json.dumps(config | ends))
    bpe.folder(folder, expression="qwen", nfc=True, eos="<|im_end|>")
    flags = "--stage 3 --init start --workers 0 --batch 8 --eval-every 0 --save-every 1 --lr 1e-3"
    argv = f"{flags} --out {here}/out --steps 1".split()
    assert train.main([*argv, "--llm", str(folder), "--template", "qwen2"]) == 0
    said, err = capsys.readouterr()
    assert "turns: qwen2;" in said and "note:" not in err
    assert train.main([*argv, "--resume", "--steps", "2"]) == 0
    assert "turns: qwen2;" in capsys.readouterr().out
    assert train.main([*argv, "--resume", "--steps", "3", "--template", "chatml"]) == 2
    assert "--template: the run in" in capsys.readouterr().err
    model, tokenizer = support.start.load_model(here / "out", device="cpu")
    assert model.config.template == tokenizer.template == "qwen2"
    assert tokenizer.path.endswith("step-00000002/tokenizer.json") and tokenizer.stops == (902,)
    argv = f"{flags} --init {here}/out --out {here}/next --steps 1".split()
    assert train.main(argv) == 0  # from a checkpoint: its turns
    assert "turns: qwen2;" in capsys.readouterr().out
    assert train.main([*argv, "--out", f"{here}/new", "--llm", str(folder)]) == 0
    assert "turns: chatml;" in capsys.readouterr().out  # from a folder: what its tokens tell
    sample.main(f"--ckpt {here}/out --device cpu --prompt what? --max-new-tokens 3".split())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    with pytest.raises(BadInput, match="its eos_token_id is 902 and that of .* is 7"):
        support.start.open_tokenizer(tokenizer.path, model.config.llm, folder)


def test_the_released_file_is_opened_with_the_tokenizer_beside_it(tmp_path, monkeypatch):
    ours = tiny.model()
    monkeypatch.setitem(support.start.models.PRESETS, "infmllm-7b", lambda: ours.config)
    torch.save(layouts.released(ours), tmp_path / "InfMLLM.bin")
    (tmp_path / "tokenizer.model").write_bytes(tiny.TOKENIZER.read_bytes())
    model, _ = support.start.load_model(tmp_path / "InfMLLM.bin", device="cpu")
    assert tiny.same(model, ours)
