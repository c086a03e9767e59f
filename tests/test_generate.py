"""generate_ids against transformers' generate on a LLaVA with random weights, loaded from its saved folder."""

import numpy as np
import oracle
import pytest
import torch

import weights
from model import IMAGE
from sample import draw, generate_ids

CELLS, SLOT = 16, 100  # visual tokens of an image, and transformers' id for their places


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on two threads, and many times so where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model and ours, from one folder; logits spread wide, so that rounding decides nothing."""
    theirs = oracle.llava(num_key_value_heads=2)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(5)
    folder = oracle.folder(theirs, tmp_path_factory.mktemp("llava"))
    return theirs, weights.load_llava(folder)


def prompts(*shapes, seed=0):
    """(text before, images, text after) each -> rows of ids with IMAGE, and the images in their order."""
    rng = torch.Generator().manual_seed(seed)

    def text(n):
        return torch.randint(3, 100, (n,), generator=rng).tolist()

    rows = [
        text(before) + [IMAGE] * CELLS * images + text(after) for before, images, after in shapes
    ]
    return rows, torch.randn(sum(s[1] for s in shapes), 3, 56, 56, generator=rng)


UNEQUAL = prompts((3, 1, 4), (1, 0, 2), (5, 2, 1), (9, 0, 3), (2, 1, 9))
TEXT = prompts((3, 0, 4), (1, 0, 0), (5, 0, 11), (9, 0, 3), (2, 0, 9))
ALONE = prompts((3, 1, 4))


@torch.no_grad()
def expected(theirs, rows, images, eos, max_new_tokens, **settings):
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(r)) + [SLOT if i == IMAGE else i for i in r] for r in rows])
    mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows])
    settings = {name.replace("beams", "num_beams"): value for name, value in settings.items()}
    if len(images):
        settings["pixel_values"] = images
    out = theirs.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=0,
        do_sample=False,
        **settings,
    )
    rows = out[:, T:].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def common(theirs, rows, images):
    """A token that greedy decoding says in the middle of things: as an eos it ends rows at different places."""
    said = [i for row in expected(theirs, rows, images, 103, 16) for i in row[2:10]]
    return max(sorted(set(said)), key=said.count)


MODES = [
    dict(),
    dict(min_new_tokens=9),
    dict(beams=2, length_penalty=0.0),
    dict(beams=2, length_penalty=1.0),
    dict(beams=2, length_penalty=2.0),
    dict(beams=5, length_penalty=0.0),
    dict(beams=5, length_penalty=1.0),
    dict(beams=5, length_penalty=2.0),
    dict(beams=5, length_penalty=0.0, min_new_tokens=8),
    dict(beams=3, length_penalty=-1.0),
]


def name(mode):
    return "-".join(f"{k}{v}" for k, v in mode.items()) or "greedy"


@pytest.mark.parametrize("rows, images", [UNEQUAL, TEXT, ALONE], ids=["images", "text", "alone"])
@pytest.mark.parametrize("mode", MODES, ids=name)
def test_ids_are_those_of_transformers(pair, rows, images, mode):
    theirs, ours = pair
    for eos, length in ((103, 13), (common(theirs, rows, images), 13), (103, 1)):
        mode = dict(mode, min_new_tokens=min(length, mode.get("min_new_tokens", 0)))
        want = expected(theirs, rows, images, eos, length, **mode)
        assert generate_ids(ours, images, rows, max_new_tokens=length, eos=eos, **mode) == want, (
            eos,
            length,
        )
    assert len(rows) == 1 or eos == 103 or len(set(map(len, want))) > 1, (
        "no row ended before another"
    )


@pytest.mark.parametrize("mode", MODES + [dict(temperature=0.8, top_k=20, top_p=0.9)], ids=name)
def test_a_batch_gives_what_each_row_gives_alone(pair, mode):
    theirs, ours = pair
    (rows, images), at = UNEQUAL, 0
    eos = common(theirs, rows, images)
    together = generate_ids(
        ours, images, rows, max_new_tokens=12, eos=eos, seed=[7, 8, 9, 10, 11], **mode
    )
    assert together == generate_ids(ours, images, rows, max_new_tokens=12, eos=eos, seed=7, **mode)
    for i, row in enumerate(rows):
        n = row.count(IMAGE) // CELLS
        assert generate_ids(
            ours, images[at : at + n], [row], max_new_tokens=12, eos=eos, seed=7 + i, **mode
        ) == [together[i]]
        at += n


def test_prompts_on_one_picture_encode_it_once(pair, monkeypatch):
    _, ours = pair
    rows, images = prompts((3, 1, 4), (2, 1, 5), (1, 2, 1))
    images[2], images[3] = images[1], images[0]
    encoded = []
    encode = ours.encode_images
    monkeypatch.setattr(ours, "encode_images", lambda x: encoded.append(len(x)) or encode(x))
    apart = generate_ids(ours, images, rows, max_new_tokens=8)
    assert generate_ids(ours, images[:2], rows, image_index=[0, 1, 1, 0], max_new_tokens=8) == apart
    assert encoded == [4, 2]
    with pytest.raises(AssertionError, match="room for 4 images"):
        generate_ids(ours, images[:2], rows)


def test_it_stops_when_every_row_is_done_and_allocates_one_cache(pair, monkeypatch):
    theirs, ours = pair
    rows, images = [ALONE[0][0], TEXT[0][0]], ALONE[1]
    eos = 103
    first, second = generate_ids(ours, images, rows, max_new_tokens=40, eos=eos)
    eos = next(i for i in first[3:] if i in second[3:])  # what both say, sooner or later
    forward, calls, caches = ours.llm.forward, [], []
    monkeypatch.setattr(
        ours.llm,
        "forward",
        lambda x, positions, mask, cache: (
            calls.append(x.shape[1]),
            caches.append(cache),
            forward(x, positions, mask, cache),
        )[2],
    )
    said = generate_ids(ours, images, rows, max_new_tokens=40, eos=eos)
    assert 3 <= max(map(len, said)) < 39
    assert (
        calls == [max(map(len, rows))] + [1] * max(map(len, said))
        and len({id(c) for c in caches}) == 1
    )
    rows, calls[:], caches[:] = TEXT[0], [], []
    generate_ids(ours, images, rows, image_index=[], max_new_tokens=20, eos=103, beams=3)
    assert calls == [max(map(len, rows))] + [3] * 19 and len({id(c) for c in caches}) == 1
    ((keys, _), *_) = caches[0].layers.values()
    assert keys.shape[:3] == (len(rows), 2, max(map(len, rows)) + 3 * 19), (
        "a prompt is held once, for all of its beams"
    )


def test_draws_follow_softmax_after_temperature_top_k_and_top_p(pair):
    _, ours = pair
    rows, n = [TEXT[0][0]], 20_000
    with torch.no_grad():
        logits = ours.llm.head(ours.llm(torch.tensor(rows)))[0, -1] / 6  # many likely tokens
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 12, 1.0), (1.3, 0, 0.8), (1.0, 30, 0.9)):
        p = (logits.double() / temperature).softmax(-1)
        if top_k:
            p[p < p.sort().values[-top_k]] = 0
        p /= p.sum()
        order = p.argsort(descending=True)
        keep, mass = [], 0.0
        for i in order.tolist():  # the definition, a token at a time
            if mass >= top_p:
                break
            keep.append(i)
            mass += p[i].item()
        want = torch.zeros_like(p)
        want[keep] = p[keep] / mass
        drawn = []
        for at in range(0, n, 5000):
            numbers = [np.random.default_rng(at + i).random(1) for i in range(5000)]
            scaled = (logits / temperature).expand(5000, -1)
            drawn += draw(scaled, torch.tensor(np.array(numbers)), top_k, top_p).tolist()
        seen = torch.bincount(torch.tensor(drawn), minlength=len(p)).double()
        assert seen[want == 0].sum() == 0
        often = want * n >= 5
        chi = ((seen - want * n) ** 2 / (want * n))[often].sum().item()
        freedom = int(often.sum()) - 1
        assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5, (chi, freedom)


def test_one_step_of_draws_is_the_models_own_distribution(pair):
    """Through generate_ids itself: temperature and seeds reach the draw, and rows are independent."""
    _, ours = pair
    row, n = TEXT[0][0], 4000
    with torch.no_grad():
        p = (ours.llm.head(ours.llm(torch.tensor([row])))[0, -1].double() / 6).softmax(-1)
    said = generate_ids(
        ours, torch.zeros(0, 3, 56, 56), [row] * n, max_new_tokens=1, eos=103, temperature=6.0
    )
    seen = torch.bincount(torch.tensor([(r or [103])[0] for r in said]), minlength=len(p)).double()
    often = p * n >= 5
    chi, freedom = ((seen - p * n) ** 2 / (p * n))[often].sum().item(), int(often.sum()) - 1
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5, (chi, freedom)
