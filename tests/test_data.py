"""data.py: samples as a step sees them, and batches as a function of (seed, step) alone."""

import re
import traceback

import numpy as np
import pytest
import torch
from small import ASK, TOKENIZER, V, data_of, noise, picture, source, write

from data import BUCKET, ROUND, collate, some
from model import IGNORE, IMAGE
from support.errors import BadInput, sentence

BOTH = """[{
    "image": "a.png", "question": "what?", "answers": ["red"],
    "img_name": "a.png", "bbox": [2, 2, 9, 9], "sentences": [{"sent": "cross"}]
}]"""  # a record of two formats
TALK = """[{"image": "a.png", "conversations": [
    {"from": "human", "value": "say it"}, {"from": "gpt", "value": "red"},
    {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a large cross"}
]}]"""


def vqa_list(folder, count, name="vqa", lost=(), **more):
    """Questions about one picture; those in `lost` are about one that is not there."""
    (folder / "im").mkdir(exist_ok=True)
    noise((24, 24)).save(folder / "im/n.png")
    records = []
    for i in range(count):
        image = "lost.png" if i in lost else "n.png"
        question = f"q {i} " + "word " * (i % 7)
        records.append({"image": image, "question": question, "answers": ["yes", "no", "2"]})
    write(folder / f"{name}.json", records)
    return source("vqa", name=name, annotations=f"{name}.json", **more)


def chat_list(folder, lengths, images, **more):
    """A talk for each of so many words; images: how often each shows its picture."""
    write(folder / "im/p.png", picture())
    records = []
    for words, count in zip(lengths, images):
        asked = {"from": "human", "value": "<image> " * count + "say it"}
        turns = [asked, {"from": "gpt", "value": "red " * words}]
        records.append({"image": ["p.png"] * count, "conversations": turns})
    write(folder / "c.json", records)
    return source("conversations", annotations="c.json", **more)


@pytest.fixture
def mixed(tmp_path):
    return [
        chat_list(tmp_path, [20] * 300, [0, 1, 2] * 100, weight=2.0),
        vqa_list(tmp_path, 90, "v", lost=range(0, 90, 9), weight=1.0),
        vqa_list(tmp_path, 11, "w", weight=0.5),
    ]


def test_what_is_looked_at_is_a_random_sample_always_the_same_in_order_without_repeats():
    numbers = some(1903, 100)
    assert numbers == some(1903, 100) == sorted(set(numbers)) and len(numbers) == 100
    assert numbers[0] < 200 and 850 < np.mean(numbers) < 1050 and numbers[-1] > 1700
    assert some(3) == some(3, 3) == some(3, 9) == [0, 1, 2]


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_training_draws_an_answer_by_count_and_evaluation_takes_the_commonest(tmp_path):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", [{**ASK, "answers": ["no"] * 3 + ["yes"] * 7}])

    def answers(train):
        data = data_of(tmp_path, source("vqa"), train=train)
        targets = [data.sample(data.sources[0], 0, step)[1] for step in range(600)]
        return [TOKENIZER.decode(row) for row in targets]

    drawn = answers(train=True)
    assert set(drawn) == {"yes", "no"} and 0.63 < drawn.count("yes") / 600 < 0.77
    assert set(answers(train=False)) == {"yes"}


def test_training_crops_captions_and_questions_by_default_and_never_a_task_with_boxes(tmp_path):
    (tmp_path / "im").mkdir()
    noise((40, 40)).save(tmp_path / "im/a.png")
    write(tmp_path / "a.json", BOTH)
    for table, train, views in (
        (source("vqa"), True, 8),
        (source("vqa", crop=False), True, 1),
        (source("vqa"), False, 1),
        (source("refcoco"), True, 1),
    ):
        data = data_of(tmp_path, table, train=train)
        seen = {data.sample(data.sources[0], 0, step)[2][0].tobytes() for step in range(8)}
        assert len(seen) == views


def test_what_is_too_long_is_cut_before_an_image_in_training_and_refused_elsewhere(tmp_path):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", TALK)

    def sample(train, context):
        data = data_of(tmp_path, source("conversations"), train=train)
        data.context = context
        return data.sample(data.sources[0], 0, 0)

    whole, targets, _ = sample(train=False, context=256)
    image = whole.index(IMAGE)
    for context, cut in ((image + V - 1, image), (image + V, image + V)):
        tokens, shown, pictures = sample(train=True, context=context)
        assert (tokens, shown) == (whole[:cut], targets[:cut])
        assert len(pictures) == (cut > image)
    for train, context in ((False, len(whole) - 1), (True, 9)):  # of 9, none is an answer
        with pytest.raises(BadInput, match=f"record 0: .* context of {context}"):
            sample(train, context)


def test_an_unreadable_sample_is_replaced_by_the_next_number_counted_and_named(tmp_path):
    data = data_of(tmp_path, vqa_list(tmp_path, 12, lost=[3, 4]), train=True, batch=12, window=1)
    [[batch]] = data.batches(0, 1)
    asked = re.findall(r"q (\d+)", TOKENIZER.decode(batch.tokens.flatten().tolist()))
    assert sorted(map(int, asked)) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 11]
    named = re.findall(r"vqa.json: record (\d): image \S+lost.png", " ".join(batch.bad))
    assert sorted(named) == ["3", "4", "4"] and data.bad == 3
    with pytest.raises(BadInput, match="record 3"):  # evaluation replaces nothing
        list(data.samples())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_cannot_be_read_stops_a_training_with_workers_in_the_same_words(
    tmp_path, workers
):
    data = data_of(tmp_path, vqa_list(tmp_path, 1), train=True, batch=2)
    write(tmp_path / "im/n.png", b"gone")
    with pytest.raises(BadInput) as caught:
        list(data.batches(0, 1, workers=workers))
    said = sentence(caught.value)  # of a loader's message, which holds its traceback
    assert re.match(r"source 'vqa': 1 samples in a row.*n\.png: cannot be read", said)
    assert "Traceback" not in said and "\n" not in said
    # the traceback holds the loaders: left to the garbage collector, each would be waited for 10 s
    traceback.clear_frames(caught.tb)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_the_same_rows_whatever_the_world_and_accumulation(tmp_path, mixed):
    data = data_of(tmp_path, *mixed, train=True, batch=8, window=2)

    def contents(world, accum):
        rows = []
        for rank in range(world):
            for micro_batches in data.batches(3, 2, rank, world, accum):
                assert len(micro_batches) == accum
                for micro in micro_batches:
                    assert len(micro.tokens) == 8 // (world * accum)
                    rows += [row[row != TOKENIZER.pad].tolist() for row in micro.tokens]
        return sorted(rows)

    assert contents(1, 1) == contents(2, 1) == contents(1, 4) == contents(4, 2)
    with pytest.raises(BadInput, match="--batch 8 .* 4 ranks x 4"):
        next(data.batches(world=4, accum=4))


@pytest.mark.parametrize("count", [1, 3, 64, 65])
def test_an_epoch_takes_every_sample_once_and_the_next_in_another_order(tmp_path, count):
    table = vqa_list(tmp_path, count)
    orders = set()
    for seed in (0, 1):
        data = data_of(tmp_path, table, seed=seed, train=True, batch=count, window=1)
        for step in range(4):  # each is an epoch
            numbers = data.rows(step)[:, 1].tolist()
            assert sorted(numbers) == list(range(count))
            orders.add(tuple(numbers))
    assert count < 64 or len(orders) == 8


def test_the_mixture_keeps_its_shares_and_its_sources_their_epochs(tmp_path, mixed):
    data = data_of(tmp_path, *mixed, train=True, batch=32, window=48)
    rows = np.concatenate([data.rows(step) for step in range(3 * ROUND // 32)])
    shares = np.bincount(rows[:, 0]) / len(rows)
    assert np.abs(shares - np.array([2, 1, 0.5]) / 3.5).max() < 2 / ROUND
    for s, opened in enumerate(data.sources):
        seen = np.bincount(rows[rows[:, 0] == s, 1], minlength=len(opened))
        assert seen.min() > 0 and seen.max() - seen.min() <= 1
    for table in mixed:
        del table["weight"]
    shares = data_of(tmp_path, *mixed, train=True).shares / ROUND
    assert np.abs(shares - np.array([300, 90, 11]) / 401).max() < 2 / ROUND  # by size


@pytest.mark.parametrize("workers, prefetch", [(0, 2), (2, 1)])
def test_steps_skipped_workers_and_prefetch_change_nothing_down_to_the_pixels(
    tmp_path, mixed, workers, prefetch
):
    def run(start, steps, **more):
        data = data_of(tmp_path, *mixed, train=True, batch=8, window=4)
        batches = sum(data.batches(start, steps, accum=8, **more), [])
        assert data.bad == sum(len(batch.bad) for batch in batches) > 0
        return [batch.with_tensors(torch.Tensor.tolist) for batch in batches]

    ran = run(0, 13)
    state = torch.get_rng_state()
    skipped = run(5, 8, workers=workers, prefetch=prefetch)
    assert skipped == ran[5 * 8 :]
    pictures = set()
    for batch in skipped:
        assert len(batch.image_positions) == V * len(batch.images)
        pictures.add((len(batch.images), batch.image_positions.count(-1)))
    assert pictures == {(1, V), (1, 0), (2, 0)}  # a text alone has one that goes nowhere
    assert torch.equal(state, torch.get_rng_state())  # the trainer's own stream is untouched


def test_padding_wastes_at_most_five_percent_on_lengths_like_llavas(tmp_path):
    # LLaVA-665k: 15 of 16 rows have an image (256 tokens) and some 150 tokens of talk, long-tailed;
    # the rest is text alone, some 700 tokens with a tail far beyond the context
    rng = np.random.default_rng(0)
    images = np.arange(6000) % 16 > 0
    words = np.where(images, rng.lognormal(4.9, 0.7, 6000), rng.lognormal(6.6, 0.8, 6000))
    words = words.astype(int)
    table = chat_list(tmp_path, words, images.astype(int))
    data = data_of(tmp_path, table, train=True, batch=64, context=2048, visual=256)
    alone, shown = (len(data.text(data.sources[0], n, 0)[0]) - words[n] for n in (0, 1))
    lengths = (words + np.where(images, shown, alone)).clip(max=2048)  # each word is a token

    dealt = np.stack([lengths[data.rows(step)[:, 1]] for step in range(128)])
    for rows in (64, 16):  # of all ranks' micro-batches, which wait for the longest
        padded = np.ceil(dealt.reshape(-1, rows).max(1) / BUCKET) * BUCKET * rows
        assert dealt.sum() / padded.sum() >= 0.95
    [micro_batches] = data.batches(0, 1, rank=1, world=4, accum=4)
    tokens = [(batch.tokens != TOKENIZER.pad).sum(1).tolist() for batch in micro_batches]
    assert sum(tokens, []) == dealt[0, 1::4].tolist()


def test_a_batch_says_where_its_placeholders_and_targets_are():
    pictures = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    first = ([1, 3], [3, 2], [])
    second = ([1, IMAGE, IMAGE, 7, 8], [IGNORE, IGNORE, 7, 8, 2], [*pictures])
    batch = collate([first, second], pad=0, visual=1, image_size=2, bucket=4, bad=["x"])
    assert batch.tokens.tolist() == [[1, 3] + [0] * 6, second[0] + [0] * 3]
    assert batch.targets.tolist() == [[3, 2] + [IGNORE] * 6, second[1] + [IGNORE] * 3]
    assert batch.image_positions.tolist() == [9, 10]
    assert batch.target_positions.tolist() == [0, 1, 10, 11, 12, -1, -1, -1]
    assert batch.supervised == 5 and batch.bad == ["x"]
    assert torch.equal(batch.images, torch.from_numpy(pictures).permute(0, 3, 1, 2))
