"""--cache-features: the same losses, no picture opened twice, nothing stale ever used."""
import os

import pytest
import tiny
import torch

import features
import train

FAST = ["--workers", "0", "--batch", "8", "--log-every", "1", "--eval-every", "0", "--save-every", "0"]
ROUNDING = 2 ** -8                     # of bf16


@pytest.fixture(scope="module")
def world(tmp_path_factory): return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "plot", lambda folder: None)
    return tmp_path


def losses(out, *argv, stage=3, steps=8, ranks=1):
    """The losses of a run: stage 3 has 48 samples here, so eight steps of eight are more than an epoch."""
    argv = ["--stage", stage, "--init", "start", "--out", out, "--steps", steps, *FAST, *argv]
    if ranks == 1: assert train.main([str(a) for a in argv]) == 0
    else: assert tiny.finish(tiny.start(os.getcwd(), *argv, world=ranks)) == [0] * ranks
    return list(tiny.losses(out).values())


def opened(monkeypatch):
    """The pictures that are opened from now on."""
    names, peek = [], features.peek

    def noted(ref, where=""):
        names.append(os.path.basename(ref[0]))
        return peek(ref, where)
    monkeypatch.setattr(features, "peek", noted)
    return names


@pytest.mark.parametrize("stage", [1, 3])
def test_losses_are_those_of_a_run_that_looks_at_every_picture_and_a_second_run_opens_none(stage, here, monkeypatch):
    plain = losses(here / "plain", stage=stage)
    first = losses(here / "first", "--cache-features", here / "kept", stage=stage)
    assert first == pytest.approx(plain, rel=ROUNDING) and first != plain
    names = opened(monkeypatch)
    again = losses(here / "again", "--cache-features", here / "kept", stage=stage)
    assert not set(names) - {f"{n}.png" for n in range(24)} and len(names) <= 2 * 24
    looked_at = []
    monkeypatch.setattr(features, "to_square", lambda *a: looked_at.append(a) or pytest.fail("a picture is decoded"))
    third = losses(here / "third", "--cache-features", here / "kept", stage=stage)
    assert third == again == pytest.approx(first, rel=1e-5) and not looked_at


def test_ranks_and_a_resumed_run_share_what_is_kept_and_take_the_steps_of_one(here, monkeypatch):
    one = losses(here / "one", "--cache-features", here / "kept")
    assert losses(here / "two", "--cache-features", here / "other", ranks=2) == pytest.approx(one, rel=ROUNDING)
    assert sorted(p.name for p in (here / "other").iterdir()) == sorted(p.name for p in (here / "kept").iterdir())
    save = train.save
    with pytest.raises(pytest.fail.Exception), monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda run: save(run) and run.step == 3 and pytest.fail("stopped"))
        losses(here / "cut", "--cache-features", here / "new", "--save-every", 3)
    again = ["--stage", "3", "--out", here / "cut", "--resume", "--cache-features", here / "new", *FAST[:2], *FAST[4:]]
    assert train.main([str(a) for a in again]) == 0
    assert list(tiny.losses(here / "cut").values()) == pytest.approx(one, rel=1e-5)


def kept(folder, model, **changed):
    shape = model.config.visual_tokens, model.config.vit.width
    return features.Features(folder, features.fingerprint(model, "fp32"), **{"room": 40, "shape": shape} | changed)


def test_other_weights_sizes_and_arithmetic_never_meet_what_was_kept(tmp_path):
    first = tiny.model()
    names = {features.fingerprint(first, "fp32"), features.fingerprint(first, "bf16")}
    with torch.no_grad(): first.vit.blocks[1].fc2.bias[3] += 1e-6
    names.add(features.fingerprint(first, "fp32"))
    names.add(features.fingerprint(first.resize(32), "fp32"))
    first.config.grid = 1
    names.add(features.fingerprint(first, "fp32"))
    assert len(names) == 5
    with torch.no_grad(): first.adapter.fc1.weight.add_(1)               # trains, and comes after what is kept
    assert features.fingerprint(first, "fp32") in names


def test_a_changed_picture_a_damaged_entry_and_a_full_table_count_as_missing(tmp_path):
    model, picture = tiny.model(), tmp_path / "a.png"
    picture.write_bytes(b"before")
    book = kept(tmp_path / "kept", model)
    key = book.key((str(picture), 0, -1), False)
    values = torch.randn(1, *book.shape).bfloat16()
    assert book.get(key) is None
    book.put(torch.tensor([[key, 64, 48]]), values)
    found, size = kept(tmp_path / "kept", model).get(key)                # by another process, at another time
    assert torch.equal(torch.from_numpy(found.copy()).view(torch.bfloat16), values[0]) and size == (64, 48)
    assert book.key((str(picture), 0, -1), True) != key != book.key((str(picture), 512, 100), False)
    picture.write_bytes(b"after!")
    os.utime(picture, ns=(0, 0))
    assert book.get(book.key((str(picture), 0, -1), False)) is None
    with open(f"{book.path}.bin", "r+b") as f:
        f.seek(int(book.place(key)) * book.bytes + 5)
        f.write(b"\xff\x00")
    assert book.get(key) is None
    many = torch.arange(1, 60)[:, None].expand(-1, 3)
    book.put(many, torch.zeros(59, *book.shape).bfloat16())
    assert book.used == 37 and book.get(20) and book.get(50) is None     # nine tenths of forty


@pytest.mark.parametrize("argv, sentence", [
    ("--stage 2", "stage 2 trains the ViT"),
    ("--stage 3 --adapter resampler", "a resampler looks at all patches"),
    ("--stage 1 --data cropped.toml", "source 'captions' is cropped at random"),
    ("--stage 3 --data out/toy/stage3.toml --cache-features out/toy/captions.json/no", "cannot be written"),
])
def test_where_nothing_can_be_kept_it_is_said_in_one_sentence(here, capsys, argv, sentence):
    table = open("out/toy/stage1.toml").read().replace("crop = false", "crop = true").replace('"captions.json"',
                                                                                             '"out/toy/captions.json"')
    open("cropped.toml", "w").write(table.replace('"images"', '"out/toy/images"'))
    assert train.main([*"--init start --cache-features --out".split(), str(here / "x"), *FAST, *argv.split()]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and "Traceback" not in said
