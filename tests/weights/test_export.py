"""weights/export.py: what other programs make of a trained model is what we make of it."""

import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import ROOT, TOKENIZER, model

import iaa
import lora
import weights
from model import CLIP_L, IMAGE, SIGLIP_BASE, Config, InfMLLM, LlamaConfig, ViTConfig, init
from sample import generate, square, visible
from support.commands import run
from support.errors import BadInput
from text import Tokenizer, encode_prompt
from text.templates import prompt
from weights import export


def llava(tokenizer, spare=0, **changed):
    vit = ViTConfig(**CLIP_L | dict(image_size=28, width=24, layers=2, heads=3, mlp=40))
    llm = LlamaConfig(tokenizer.size + spare, 32, 2, 4, 2, 48, context=256, **changed)
    config = Config(vit, llm, adapter="mlp", ln_vision=False, image_mark="<ImageHere>")
    net = init(InfMLLM(config)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(8) if p.ndim > 1 else p.add_(0.1 * torch.randn(p.shape))
    return net


@pytest.mark.parametrize(
    "changed", [{}, {"spare": 64}, {"tied": True}, {"qkv_bias": True}], ids=str
)
def test_transformers_opens_a_llava_and_its_processor_asks_as_we_do(tmp_path, changed):
    torch.manual_seed(0)
    tokenizer = Tokenizer(TOKENIZER)
    ours = llava(tokenizer, **changed)
    export.export(ours, tokenizer, tmp_path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    image = Image.fromarray(pixels)
    question = prompt("chat", "what colour is the circle?", "<ImageHere>")
    asked = processor(
        images=image, text=question.replace("<ImageHere>", "<image>"), return_tensors="pt"
    )
    ids = encode_prompt(tokenizer, question, ours.config.visual_tokens)
    assert asked["input_ids"][0].tolist() == [tokenizer.size if i == IMAGE else i for i in ids]
    with torch.no_grad():
        want = ours(torch.tensor(pixels).permute(2, 0, 1)[None], torch.tensor([ids]))
        got = theirs(**asked).logits[:, :, : ours.config.llm.vocab]
    assert want.std() > 0.3 and (got - want).abs().max() < 2e-5
    answer = theirs.generate(**asked, max_new_tokens=12, do_sample=False)[0, len(ids) :]
    [said] = generate(ours, tokenizer, [image], [question], pad=True, max_new_tokens=12)
    assert visible(tokenizer.decode(answer.tolist())) == said
    again = weights.load_llava(tmp_path)  # and we open it too
    for name, p in ours.named_parameters():
        assert torch.equal(p, again.get_parameter(name)[: len(p)]), name


def test_a_wide_picture_is_padded_as_in_our_chats(tmp_path):

    tokenizer = Tokenizer(TOKENIZER)
    ours = llava(tokenizer)
    export.export(ours, tokenizer, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    wide = Image.new("RGB", (40, 10), (200, 30, 30))
    theirs = processor(images=wide, text="<image>", return_tensors="pt")["pixel_values"][0]
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (ours.config.vit.pixel_mean, ours.config.vit.pixel_std)
    )
    pixels = square(wide, 28, pad=True) / 255
    assert ((theirs * std + mean) - pixels).abs().max() < 0.02  # two programs' bicubic


@pytest.mark.parametrize("tower", ["eva", "clip", "siglip"])
def test_the_lines_of_the_page_say_what_we_say(tmp_path, monkeypatch, tower):
    tokenizer = Tokenizer(TOKENIZER)
    small = dict(image_size=32, patch=8, width=16, layers=2, heads=2, mlp=32)
    kinds = {"eva": {}, "clip": CLIP_L, "siglip": SIGLIP_BASE}
    llm = LlamaConfig(tokenizer.size, 32, 2, 2, 1, 48, context=256)
    ours = init(InfMLLM(Config(ViTConfig(**kinds[tower] | small), llm, grid=2))).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(8) if p.ndim > 1 else p.add_(0.1 * torch.randn(p.shape))
    export.export(ours, tokenizer, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/EXPORT.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    pixels = torch.randint(256, (1, 3, 32, 32)).byte()
    v = ours.config.vit
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (v.pixel_mean, v.pixel_std))
    before, after = [1, 5, 9], [7, 8]
    ids = before + [IMAGE] * ours.config.visual_tokens + after
    with torch.no_grad():
        want = ours(pixels, torch.tensor([ids]))
        got = names["logits"]((pixels / 255 - mean) / std, before, after)
    assert want.std() > 0.3 and (got - want).abs().max() < 2e-5


def test_low_rank_matrices_are_merged_and_a_branch_is_refused(tmp_path):
    tokenizer = Tokenizer(TOKENIZER)
    tuned = lora.grow(model(), 4, ["q", "down"])
    with torch.no_grad():
        for p in tuned.branch.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    export.export(tuned, tokenizer, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/llm").eval()
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        want = tuned.llm.head(tuned.llm(ids))
        assert (theirs(ids).logits - want).abs().max() < 2e-5 * want.abs().max().clamp(min=1)
    with pytest.raises(BadInput, match="branch of inner adaptors"):
        export.export(iaa.grow(model(), "mm", [0]), tokenizer, tmp_path / "no")


def test_what_is_no_llava_and_a_folder_in_use_are_refused(tmp_path, made, capsys):
    tokenizer = Tokenizer(TOKENIZER)
    with pytest.raises(BadInput, match="this model has pool with ln_vision behind another tower"):
        export.export_llava(model(), tmp_path, tokenizer)
    (tmp_path / "mine").write_text("")
    words = ["export", str(made / "ck"), str(tmp_path)]
    assert run(lambda: export.main(words[1:])) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
