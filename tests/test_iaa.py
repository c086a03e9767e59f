"""Inner adaptors: a branch is a deeper LLaMA put together from the base's layers and its own; the base stays itself."""

import copy
import hashlib
import json
import shutil

import oracle
import pytest
import tiny
import torch
from PIL import Image
from test_model import IMG, batch, pictures, rows, text
from test_model import tiny as small
from test_plan import saved_numbers, settings
from test_weights import (
    CLIP_L_336,
    LLAMA2_7B,
    dropped,
    hf_config,
    places,
    shapes_of,
    theirs_of,
    used,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import sample
import support.files
import support.plan
import support.start
import tools.backbones
import train
import weights
import weights.checkpoint
import weights.files
import weights.iaa
import weights.llama
import weights.rename
from iaa import grow
from model import (
    IGNORE,
    Config,
    InfMLLM,
    KVCache,
    LlamaConfig,
    ViTConfig,
    count,
    init,
)
from sample import generate_ids
from support.errors import BadInput
from support.plan import flops
from text.tokenizer import Tokenizer

FAST = [
    "--workers",
    "0",
    "--batch",
    "8",
    "--log-every",
    "1",
    "--eval-rows",
    "12",
    "--score-rows",
    "0",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grown(inner=(0, 1), seed=0, **changed):
    """A base of two layers and its branch mm, all of whose weights have moved away from the base's."""
    m, rng = grow(small(seed, **changed), "mm", inner), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in m.branch.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    return m


def deeper(m):
    """The same function as one plain model: the layers in the order in which the branch runs them."""
    c, branch = m.config.llm, m.branch
    llm = LlamaConfig(c.vocab, c.width, len(m.llm.layers), c.heads, c.kv_heads, c.mlp)
    plain = InfMLLM(Config(m.config.vit, llm, grid=m.config.grid))
    plain.vit, plain.adapter, plain.llm.layers = m.vit, branch.adapter, m.llm.layers
    plain.llm.embed, plain.llm.norm, plain.llm.lm_head = branch.embed, branch.norm, branch.lm_head
    return copy.deepcopy(plain)


# ---- what a branch computes ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("inner", [[0, 2], [3], [0, 1, 2, 3]])
def test_a_branch_equals_a_composition_of_transformers_own_decoder_layers(inner):
    theirs = TheirConfig(
        **oracle.LLAMA | dict(num_hidden_layers=4 + len(inner), num_key_value_heads=2)
    )
    theirs._attn_implementation = "sdpa"
    base, own = (
        oracle.randomise(LlamaForCausalLM(theirs), 0),
        oracle.randomise(LlamaForCausalLM(theirs), 1),
    )
    turn = LlamaRotaryEmbedding(theirs)
    names = {
        v.replace("layers.{}.", ""): k.replace("model.layers.{}.", "")
        for k, v in weights.llama.LLAMA.items()
        if v and "{}" in v
    }
    config = Config(ViTConfig(32, 8, 24, 1, 3, 40), LlamaConfig(96, 48, 4, 6, 2, 80), grid=2)
    ours = grow(InfMLLM(config), "mm", inner)

    def take(ours, theirs):
        for name, p in ours.named_parameters():
            p.copy_(theirs.get_parameter(names[name]))

    branch, llm = ours.branch, ours.llm
    for layer, theirs in zip(ours.base.llm.layers, base.model.layers):
        take(layer, theirs)
    for layer, theirs in zip(branch.layers, own.model.layers):
        take(layer, theirs)
    (
        branch.embed.weight.copy_(own.model.embed_tokens.weight),
        branch.norm.weight.copy_(own.model.norm.weight),
    )
    branch.lm_head.weight.copy_(own.lm_head.weight)

    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    place = torch.arange(40)[None]
    x, mask = (
        own.model.embed_tokens(tokens),
        torch.ones(40, 40, dtype=torch.bool).tril()[None, None],
    )
    turn, follows = turn(x, place), iter(own.model.layers)
    for i in range(4):
        for layer in [base.model.layers[i]] + ([next(follows)] if i in inner else []):
            assert isinstance(layer, LlamaDecoderLayer)
            x = layer(x, attention_mask=mask, position_ids=place, position_embeddings=turn)
    want = own.lm_head(own.model.norm(x))
    got = llm.head(llm(tokens))
    assert want.std() > 0.3 and (got - want).abs().max() <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("inner", [[0, 1], [1]])
def test_a_new_branch_computes_the_bases_function_to_the_bit(inner):
    m, tokens = small(), rows([1] + IMG + text(6), [1] + IMG + text(9, 2))
    want, alone = m(pictures(2), tokens), m.llm(rows(text(9)))
    branched = grow(m, "mm", inner)
    assert len(branched.llm.layers) == 2 + len(inner)
    assert torch.equal(branched(pictures(2), tokens), want)
    moved = grown(inner)
    assert not torch.equal(moved(pictures(2), tokens), want)
    for model in (branched, moved):
        assert torch.equal(model.text_model.llm(rows(text(9))), alone)


@pytest.mark.parametrize("inner", [[0, 1], [0], [1]])
def test_a_branch_is_the_deeper_model_in_loss_gradients_recomputation_and_flops(inner):
    m = grown(inner).freeze(3, "inner")
    plain = deeper(m).freeze(3)
    images, tokens, targets = batch()
    losses = [x(images, tokens, targets) for x in (m, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    own, theirs = m.branch, plain.llm
    places = [n for n, layer in enumerate(m.llm.layers) if layer in list(own.layers)]
    pairs = [
        (own.embed, theirs.embed),
        (own.norm, theirs.norm),
        (own.lm_head, theirs.lm_head),
        (own.adapter, plain.adapter),
        *zip(own.layers, [theirs.layers[n] for n in places]),
    ]
    for ours, others in pairs:
        for p, q in zip(ours.parameters(), others.parameters()):
            assert torch.equal(p.grad, q.grad)
    trained = set(own.parameters())
    assert all((p.grad is not None) == (p in trained) for p in m.parameters())
    grads = [p.grad for p in own.parameters()]
    m.zero_grad()
    m.llm.recompute = True
    m(images, tokens, targets).backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, own.parameters()))

    tokens, m.llm.recompute = rows([1] + IMG + text(10)), False
    targets = torch.full_like(tokens, IGNORE)
    targets[0, 8:14] = 7
    for stage, tune in ((1, "inner"), (2, "inner"), (1, "full"), (3, "qv"), (3, "none")):
        model = m if tune == "inner" else m.base
        model.freeze(stage, tune)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(pictures(1), tokens, targets).backward()
        layers = len(model.llm.layers)
        ours = sum(flops(m.config, 11, 6, stage, tune, layers - 2).values())
        ours += 3 * layers * 2 * 15 * 15 * 32 + 2 * 6 * 32 * 50  # as in test_model
        assert counter.get_total_flops() == ours, (stage, tune)


@torch.no_grad()
def test_cache_and_padding_are_those_of_the_deeper_model():
    m = grown([1])
    llm, plain, lists = m.llm, deeper(m).llm, [text(5), text(12, 2), text(9, 3)]
    tokens, pad = rows(*lists, left=True), torch.tensor([7, 0, 3])
    want = plain(tokens, *sample.around_padding(pad[:, None], 0, 12))
    cache, got = KVCache(12), []
    for a, b in ((0, 9), (9, 10), (10, 12)):
        got.append(llm(tokens[:, a:b], *sample.around_padding(pad[:, None], a, b - a), cache))
    got = torch.cat(got, dim=1)
    assert len(cache.layers) == 3
    for i, n in enumerate(pad):
        assert (got[i, n:] - want[i, n:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "mode", [{}, {"beams": 4, "length_penalty": 0.0}, {"temperature": 0.9, "seed": 3}]
)
def test_generation_in_a_branch_is_the_deeper_models_and_text_alone_is_the_bases(mode):
    m = grown()
    asked, images = (
        [[1] + IMG + text(4), [1, 5] + IMG + text(9, 2), [1] + IMG + text(2, 3)],
        pictures(3),
    )
    assert generate_ids(m, images, asked, max_new_tokens=9, **mode) == generate_ids(
        deeper(m), images, asked, max_new_tokens=9, **mode
    )
    alone = [[1] + text(4), [1] + text(11, 2)]
    said = generate_ids(m, pictures(0), alone, max_new_tokens=9, **mode)
    assert said == generate_ids(small(), pictures(0), alone, max_new_tokens=9, **mode)
    with pytest.raises(AssertionError, match="two calls"):
        generate_ids(m, images[:1], asked[:1] + alone, **mode)


@torch.no_grad()
def test_what_the_shipped_llm_reads_is_measured_and_a_branch_leaves_it_and_tuning_does_not():
    assets = tiny.ROOT / "assets/toy"
    m, tokenizer = weights.checkpoint.load(assets), Tokenizer(assets)

    def read():
        return tools.backbones.reading(m.llm, tokenizer, assets / "slots.safetensors", scenes=12)

    loss, right = read()
    assert loss < 0.4 and right > 0.9
    for p in grow(m, "mm", [0, 3]).branch.parameters():
        p.mul_(1.5)
    assert read() == (loss, right)
    for p in m.freeze(2).llm.parameters():
        if p.requires_grad:
            p.mul_(1.5)
    assert read()[0] > loss + 0.1


# ---- what is saved and loaded ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and two branches of it that were trained: mm on captions and questions, chat on layer 1 and talk."""
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "plot", lambda folder: None)
        for argv in ("--stage 2 --out mm", "--stage 3 --branch chat --inner-layers 1 --out chat"):
            assert (
                train.main(
                    [
                        *argv.split(),
                        "--tune",
                        "inner",
                        "--init",
                        "start",
                        "--steps",
                        "6",
                        "--lr",
                        "1e-2",
                        "--eval-every",
                        "0",
                        *FAST,
                    ]
                )
                == 0
            )
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "plot", lambda folder: None)
    return tmp_path


def run(*argv):
    return train.main([str(a) for a in (*argv, *FAST)])


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def shown(m, tokenizer, image=None):
    """Logits of a text, and greedy answers to it and to three questions without and, with an image, one about it."""
    tokens = torch.tensor([[1] + tokenizer.encode("what colour is a circle?")])
    with torch.no_grad():
        llm = m.text_model.llm
        logits = llm.head(llm(tokens))
    return logits, sample.generate(
        m, tokenizer, [None] * 4, [f"say {n}" for n in "abcd"], max_new_tokens=12
    )


def test_text_alone_is_the_base_to_the_bit_whatever_branches_were_trained_and_loaded(here, world):
    tokenizer, base = Tokenizer(tiny.TOKENIZER), weights.checkpoint.load("start")
    logits, said = shown(base, tokenizer)
    mm = weights.checkpoint.load("mm")
    chat = weights.checkpoint.add_branch(mm, "chat")
    again = weights.checkpoint.add_branch(base, "mm")
    assert [m.branch.name for m in (mm, chat, again)] == ["mm", "chat", "mm"]
    assert chat.base is mm.base and again.base is base
    image = Image.new("RGB", (16, 16), (222, 40, 44))
    ids, seen = torch.tensor([[1, *[-1] * 4, 5, 6]]), []
    for m in (mm, chat, again):
        assert torch.equal(shown(m, tokenizer)[0], logits) and shown(m, tokenizer)[1] == said
        seen.append(m(torch.zeros(1, 3, 16, 16), ids))
        mixed = sample.generate(
            m,
            tokenizer,
            [None, image, None],
            ["say a", "<ImageHere> say a", "say b"],
            max_new_tokens=12,
        )
        assert mixed[::2] == said[:2]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], base(torch.zeros(1, 3, 16, 16), ids))


def test_a_branch_trains_alone_and_its_checkpoint_holds_it_alone(here, world):
    for folder, branch, inner in (("mm", "mm", [0, 1]), ("chat", "chat", [1])):
        saved = weights.files.load_tensors(
            weights.checkpoint.find(world / folder) / "model.safetensors"
        )
        fresh = grow(weights.checkpoint.load("start"), branch, inner).branch
        assert saved.keys() == {f"llm.branches.{branch}.{n}" for n, _ in fresh.named_parameters()}
        for name, p in fresh.named_parameters():
            assert not torch.equal(saved[f"llm.branches.{branch}.{name}"], p), (
                f"{name} has not moved"
            )
        for end in ("o", "down"):
            assert (saved[f"llm.branches.{branch}.layers.0.{end}.weight"] != 0).any()
        assert weights.describe(folder)[1] == {"name": branch, "after": inner}
    described = support.files.read_json(weights.checkpoint.find("mm") / "config.json")
    assert described["base"] == {
        "path": "../../start",
        "weights": weights.checkpoint.fingerprint("start"),
    }


def test_a_branch_without_its_base_or_with_another_is_refused_in_a_sentence(here, world, capsys):
    for name in ("start", "mm"):
        shutil.copytree(world / name, here / name)
    shutil.move(here / "start", here / "moved")
    with pytest.raises(
        BadInput, match="is a branch of ../../start, seen from there.*--ckpt BASE --branch BRANCH"
    ):
        weights.checkpoint.load(here / "mm")
    model, _ = support.start.load_model(here / "moved", branch=str(here / "mm"))
    assert model.branch.name == "mm"
    assert not hasattr(support.start.load_model(here / "moved", branch="none")[0], "branch")
    weights.checkpoint.save(here / "start", tiny.model(1), Tokenizer(tiny.TOKENIZER))
    with pytest.raises(BadInput, match="this model has other weights; take the base"):
        weights.checkpoint.load(here / "mm")
    with pytest.raises(BadInput, match="is a whole model and no branch"):
        weights.checkpoint.add_branch(model, "start")
    with pytest.raises(
        BadInput, match="--branch ground: is neither a folder nor a branch .* has mm"
    ):
        support.start.with_branch(model, "ground")
    other = grow(weights.checkpoint.load(here / "moved", image_size=8), "other", [0])
    weights.checkpoint.save(here / "other", other, base=here / "moved")
    with pytest.raises(BadInput, match="are .8, 2., those of the branch mm are .16, 2."):
        weights.checkpoint.add_branch(model, here / "other")
    assert weights.checkpoint.load(here / "other").config.vit.image_size == 8


def test_evaluation_asks_the_branch_about_pictures_and_the_base_about_the_rest(here, capsys):
    import evaluate

    common = [
        "--data",
        "out/toy/heldout.toml",
        "--beams",
        "1",
        "--max-new-tokens",
        "8",
        "--limit",
        "12",
        "--json",
    ]
    said = {}
    for name, argv in (
        ("base", ["start"]),
        ("branch", ["mm"]),
        ("added", ["start", "--branch", "mm"]),
    ):
        evaluate.main(["--ckpt", *argv, *common, "--out", str(here / name)])
        lines = [json.loads(line) for line in open(here / name / "predictions.jsonl")]
        said[name] = {(r["source"], r["number"], r["turn"]): r["said"] for r in lines}
    text = [k for k in said["base"] if k[0] == "chat" and k[1] % 3]
    assert said["branch"] == said["added"] != said["base"] and len(text) > 4
    assert all(said["branch"][k] == said["base"][k] for k in text)
    with pytest.raises(BadInput, match="another weights"):
        evaluate.main(["--ckpt", "chat", *common, "--out", str(here / "branch")])


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_branch_goes_on_exactly_after_a_stop_and_into_the_next_stage(here, world, capsys):
    common = [
        "--stage",
        2,
        "--tune",
        "inner",
        "--init",
        "start",
        "--steps",
        6,
        "--eval-every",
        0,
        "--save-every",
        2,
        "--keep",
        9,
    ]
    before = digest(world / "start")
    for name in ("whole", "cut"):
        assert run(*common, "--out", here / name) == 0
    for step in (4, 6):
        shutil.rmtree(here / f"cut/step-{step:08d}")
    assert (
        run(
            "--stage",
            2,
            "--resume",
            "--save-every",
            2,
            "--keep",
            9,
            "--eval-every",
            0,
            "--out",
            here / "cut",
        )
        == 0
    )
    ends = [digest(here / name / "step-00000006") for name in ("cut", "whole")]
    for file in ("model.safetensors", "optimizer.safetensors", "config.json"):
        assert ends[0][file] == ends[1][file]
    assert tiny.losses(here / "cut") == tiny.losses(here / "whole")
    assert digest(world / "start") == before
    assert (
        "next: python train.py --stage 3 --tune inner --branch mm --init" in capsys.readouterr().out
    )
    assert (
        run(
            "--stage",
            3,
            "--tune",
            "inner",
            "--init",
            here / "whole",
            "--out",
            here / "next",
            "--steps",
            1,
            "--eval-every",
            0,
        )
        == 0
    )
    described = support.files.read_json(weights.checkpoint.find(here / "next") / "config.json")
    assert described["base"]["weights"] == weights.checkpoint.fingerprint("start")
    assert described["branch"] == {"name": "mm", "after": [0, 1]}
    for argv, sentence in (
        (["--init", "mm"], "is a branch, mm; --tune inner trains it on"),
        (
            ["--init", "mm", "--tune", "inner", "--inner-layers", "0"],
            "has the branch mm after [0, 1]; leave",
        ),
        (
            ["--init", "start", "--tune", "inner", "--inner-layers", "0,7"],
            "the LLM has layers 0 to 1, not [0, 7]",
        ),
        (["--init", "start", "--branch", "x"], "describe what --tune inner trains; add it"),
        (
            ["--init", "start", "--tune", "inner", "--lr", "vit=1"],
            "keeps the vit frozen; leave it out",
        ),
        (["--out", here / "whole", "--resume", "--tune", "qv"], "--tune: the run in"),
    ):
        assert (
            run("--stage", 2, "--out", here / "refused", *argv) == 2
            and sentence in capsys.readouterr().err
        )


def test_a_base_that_is_pieced_together_is_written_beside_its_branch(here, world, capsys):
    weights.llama.export_llama(weights.checkpoint.load("mm").base.llm, here / "llm")
    assert (
        run(
            "--stage",
            1,
            "--init",
            "start",
            "--llm",
            here / "llm",
            "--tokenizer",
            tiny.TOKENIZER,
            "--tune",
            "inner",
            "--out",
            here / "o",
            "--steps",
            1,
            "--eval-every",
            0,
        )
        == 0
    )
    assert f"is written to {here}/o/base" in capsys.readouterr().out
    m, base = weights.checkpoint.load(here / "o"), weights.checkpoint.load("start")
    assert all(
        torch.equal(p, q)
        for p, q in zip(m.base.llm.layers.parameters(), base.llm.layers.parameters())
    )
    assert weights.checkpoint.load(here / "o/base").config == base.config


def test_many_processes_train_a_branch_as_one_does(here, world):
    """Two ranks by DDP and sharded, with recomputation, against one: rows without an image among them."""
    trained = {}
    for ranks, extra in ((1, ()), (2, ()), (2, ("--shard", "--recompute"))):
        out = here / f"{ranks}{len(extra)}"
        argv = [
            "--stage",
            3,
            "--tune",
            "inner",
            "--init",
            world / "start",
            "--data",
            world / "out/toy/stage3.toml",
            "--out",
            out,
            "--steps",
            4,
            *FAST,
            "--eval-every",
            4,
            "--save-every",
            0,
            "--dtype",
            "fp64",
            *extra,
        ]
        if ranks == 1:
            assert train.main([str(a) for a in argv]) == 0
        else:
            assert tiny.finish(tiny.start(here, *argv, world=ranks)) == [0] * ranks, tiny.said(
                here
            )[-3000:]
        saved = weights.files.load_tensors(weights.checkpoint.find(out) / "model.safetensors")
        if trained:
            assert saved.keys() == trained.keys()
        trained = trained or saved
        assert max((saved[n] - trained[n]).abs().max() for n in trained) < 1e-9
        assert next(iter(saved.values())).dtype == torch.float64


def test_a_plan_counts_a_branch_and_its_kept_bytes_are_autograds(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train.main("--stage 2 --preset infmllm-7b --tune inner --plan --gpus 1x139".split()) == 0
    said = capsys.readouterr().out
    assert (
        "layers of its own after 0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31 of the LLM's 32"
        in said
    )
    assert "vit               0   986.98M" in said and "llm           3.10B     6.74B" in said
    s = settings(stage=3, tune="inner")

    def make(inner):
        base = init(
            InfMLLM(
                Config(ViTConfig(32, 4, 32, 1, 4, 96), LlamaConfig(128, 64, 6, 4, 2, 160), grid=4)
            )
        )
        return grow(base, "mm", inner).freeze(3)

    for few, many in (([0], [0, 1, 2, 3]), ([5], [0, 1, 4, 5])):
        calculated = support.plan.activations(make(many), s) - support.plan.activations(
            make(few), s
        )
        measured = saved_numbers(make(many), s) - saved_numbers(make(few), s)
        assert calculated == pytest.approx(measured, rel=0.03), (few, many)


# ---- the released model ----------------------------------------------------------------------------------------------

LLAMA3_8B = LLAMA2_7B | dict(
    model_type="IAA",
    intermediate_size=14336,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)


def iaa_published(head="condtion"):
    """Names and shapes by the layout in FACTS.md: LLaMA-3-8B, LLaVA's tower, and two branches of 14 layers each."""
    V, D, base = (
        128256,
        4096,
        shapes_of(lambda: LlamaForCausalLM(hf_config(TheirConfig, LLAMA3_8B))),
    )
    layer = {
        k.removeprefix("model.layers.0."): s
        for k, s in base.items()
        if k.startswith("model.layers.0.")
    }
    tower = shapes_of(lambda: CLIPVisionModel(hf_config(oracle.CLIPVisionConfig, CLIP_L_336)))
    shapes = base | {
        f"model.vision_tower.vision_tower.vision_model.{k}": s for k, s in tower.items()
    }
    for end, projector in (("", "mm_projector"), ("_grounding", "mm_projector_G")):
        shapes |= {
            f"model.condition_layers{end}.{n}.{k}": s for n in range(14) for k, s in layer.items()
        }
        shapes |= {
            f"model.embed_tokens_condition{end}.weight": (V, D),
            f"model.norm_condition{end}.weight": (D,),
            f"lm_head_{head}{end}.weight": (V, D),
            f"model.{projector}.0.weight": (D, 1024),
            f"model.{projector}.0.bias": (D,),
            f"model.{projector}.2.weight": (D, D),
            f"model.{projector}.2.bias": (D,),
        }
    return shapes


@pytest.mark.parametrize("head", ["condtion", "condition"])
def test_every_tensor_of_the_released_iaa_finds_its_place(head):
    shapes = iaa_published(head)
    config = weights.iaa.iaa_config(LLAMA3_8B, "config.json")
    ours = weights.rename.on_meta(weights.iaa.iaa_modules, config)
    for name in ("mm", "grounding"):
        assert ours[name].after == [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]
    plan = places(shapes, weights.iaa.iaa_table(config), ours)
    assert all(
        "encoder.layers.23." in k or "post_layernorm" in k or k.endswith("k_proj.bias")
        for k in dropped(plan)
    )
    assert used(plan, shapes) == count(ours)
    (place,) = plan["model.condition_layers_grounding.13.mlp.up_proj.weight"]
    assert place == "grounding.layers.13.up.weight"
    assert plan["model.mm_projector_G.2.weight"] == ["grounding.adapter.fc2.weight"]


def test_loading_the_released_iaa_says_what_prompting_it_needs_and_sample_refuses_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(weights.iaa, "IAA_INNER", [0, 2])
    tower = dict(image_size=28, width=16, heads=2, mlp=24, layers=1)
    monkeypatch.setattr(weights.iaa, "CLIP_L", weights.iaa.CLIP_L | tower)
    d = dict(
        model_type="IAA",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
    )
    (tmp_path / "config.json").write_text(json.dumps(d))
    config, rng = weights.iaa.iaa_config(d, "x"), torch.Generator().manual_seed(0)
    modules = weights.iaa.iaa_modules(config)
    ours, state = dict(modules.named_parameters()), {}
    for key, (name,) in theirs_of(weights.iaa.iaa_table(config), modules).items():
        if not key.startswith("lm_head_condition"):
            state[key] = torch.randn(ours[name].shape, generator=rng)
    torch.save(state, tmp_path / "pytorch_model.bin")
    m = weights.iaa.load_iaa(tmp_path)
    assert "LLaMA-3's tokenizer, which this program does not read" in capsys.readouterr().err
    assert torch.equal(
        m["grounding"].branch.layers[1].up.weight,
        state["model.condition_layers_grounding.1.mlp.up_proj.weight"],
    )
    assert torch.equal(m["mm"].adapter.fc2.bias, state["model.mm_projector.2.bias"])
    assert m["mm"].base is m["grounding"].base
    weights.save(tmp_path / "ours/base", m["mm"].base)
    for name, model in m.items():
        weights.save(tmp_path / "ours" / name, model, base=tmp_path / "ours/base")
        again = weights.load(tmp_path / "ours" / name)
        assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())
    with torch.no_grad():
        said = [
            model(torch.zeros(1, 3, 28, 28), torch.tensor([[1] + [-1] * 4 + [5]]))
            for model in m.values()
        ]
    assert not torch.equal(*said)
    with pytest.raises(BadInput, match="LLaMA-3's tokenizer"):
        support.start.load_model(tmp_path)
