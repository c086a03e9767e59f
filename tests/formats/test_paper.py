"""The readers of the paper's sets: gqa, textvqa, textcaps, ocrvqa, aokvqa, refer and visual_genome in formats/."""

import pickle
import tracemalloc

import published
import pytest
from small import SEEN, TOKENIZER, check, data_of, pieces, refusal, source, write

BOX = "▁ <box>( 0.12 , 0.34 ),( 0.56 , 0.78 )</box>"


def table(format, annotations, images, **more):
    return source(format, annotations=annotations, images=images, **more)


GQA = table("gqa", "gqa/train_balanced_questions.json", "gqa/images")
TEXTVQA = table("textvqa", "textvqa/TextVQA_0.5.1_train.json", "textvqa/train_images")
TEXTCAPS = table("textcaps", "textcaps/TextCaps_0.1_train.json", "textvqa/train_images")
OCRVQA = table("ocrvqa", "ocr_vqa/dataset.json", "ocr_vqa/images", split="train")
AOKVQA = table("aokvqa", "aokvqa/aokvqa_v1p0_train.json", "coco/train2017")
REFER = table(
    "refer",
    "refcoco/refs(unc).p",
    "coco/train2014",
    instances="refcoco/instances.json",
    split="train",
)
REGIONS = table("visual-genome", "vg/region_descriptions.json", "vg")


@pytest.fixture
def sets(tmp_path):
    published.write_sets(tmp_path)
    return tmp_path


def asked(question):
    """A question's tokens, as InfMLLM asks it."""
    return f"{SEEN} {pieces(TOKENIZER.encode(f'Question:{question} Short answer:'))}"


def said(answer):
    return f"{pieces(TOKENIZER.encode(answer))} </s>"


def test_gqa(sets):
    data = data_of(sets, GQA)
    check(data, 0, asked("is the sky dark?"), said("yes"))
    check(data, 1, asked("what is on the wall?"), said("a sign"))
    item = list(data.samples())[1]
    assert item.fields["question_id"] == "07333408" and item.fields["type"] == "query"


@pytest.mark.parametrize("kind", [TEXTVQA, AOKVQA], ids=["textvqa", "aokvqa"])
def test_questions_with_the_answers_of_ten(sets, kind):
    data = data_of(sets, kind)
    question = "what does it say?" if kind is TEXTVQA else "what colour is it?"
    check(data, 0, asked(question), said("red"))
    assert list(data.samples())[0].answers == published.TEN
    trained = data_of(sets, kind, train=True)
    drawn = {TOKENIZER.decode(trained.sample(trained.sources[0], 0, step)[1]) for step in range(30)}
    assert drawn == {"red", "dark red"}


def test_ocrvqa_has_a_sample_per_question_of_the_split(sets):
    data = data_of(sets, OCRVQA)
    assert data.counts == {"ocrvqa": 2}
    check(data, 0, asked("who wrote this book?"), said("Ray Bradbury"))
    check(data, 1, asked("what is the title of this book?"), said("Dandelion Wine"))
    test = list(data_of(sets, {**OCRVQA, "split": "test"}).samples())
    assert [item.answers for item in test] == [[""], ["Maps"]]
    assert test[1].fields["question_id"] == "1401604307-1"
    assert test[1].refs[0][0].endswith("1401604307.png")


def test_textcaps_trains_on_captions_and_is_asked_by_picture(sets):
    trained = data_of(sets, TEXTCAPS, train=True)
    assert trained.counts == {"textcaps": 2}
    _, targets, _ = trained.sample(trained.sources[0], 0, 0)
    assert TOKENIZER.decode(targets) == "a sign says stop"
    [item] = data_of(sets, TEXTCAPS).samples()
    assert item.answers == ["A sign says Stop!", "A red sign."]
    assert item.fields["image_id"] == "0054c91397f2fe05"


def test_refer_has_a_sample_per_sentence(sets):
    data = data_of(sets, REFER)
    assert data.counts == {"refer": 2}
    check(data, 0, f"{SEEN} {pieces(TOKENIZER.encode('<ref>the red one</ref>'))}", f"{BOX} </s>")
    item = list(data.samples())[1]
    assert item.text == "left" and item.box == (24, 34, 112, 78)
    assert item.fields["sent_id"] == 12
    assert item.fields["img_name"] == "COCO_train2014_000000000009.jpg"
    data = data_of(sets, {**REFER, "task": "region"})
    check(data, 1, f"{SEEN} {BOX} ▁Short ▁phrase :", said("left"))


@pytest.mark.parametrize(
    "split, ids",
    [
        ("testA", [1, 3]),
        ("testB", [2, 3]),
        ("val", [4]),
        ("test", [1, 2, 3, 5]),
        ("all", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_splits_are_chosen_as_the_sets_own_loader_does(sets, split, ids):
    items = list(data_of(sets, {**REFER, "split": split}).samples())
    assert [item.fields["ref_id"] for item in items] == [n for n in ids for _ in range(2)]
    if 5 in ids:
        assert items[-1].box == (100.5, 50, 200, 100)


class Runs:
    def __reduce__(self):
        return print, ("this has run",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_with_a_global_is_refused_by_its_name_and_nothing_runs(sets, protocol, capsys):
    refs = [*published.refs(), Runs()]
    write(sets / "refcoco/refs(unc).p", pickle.dumps(refs, protocol))
    words = refusal(sets, REFER)
    assert "refs(unc).p" in words and "print" in words and "plain values" in words
    assert "this has run" not in capsys.readouterr().out


def test_a_pickle_that_says_one_long_sentence_very_often_is_refused(sets):
    ref = published.refs()[0]
    long = {"sent_id": 1, "sent": "x" * 1000}
    ref["sentences"] = [long] * 1000
    write(sets / "refcoco/refs(unc).p", pickle.dumps([ref] * 1000))
    assert "more text than the file" in refusal(sets, REFER)


def test_a_pickle_cannot_ask_for_memory(sets):
    far = (2**24).to_bytes(4, "little")  # a place in the unpickler's notes: 256 MB in the one of C
    write(sets / "refcoco/refs(unc).p", b"\x80\x02]r" + far + b".")
    tracemalloc.start()
    assert "has no records" in refusal(sets, REFER)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**25


def test_visual_genome_has_a_sample_per_region(sets):
    data = data_of(sets, REGIONS)
    assert data.counts == {"visual-genome": 3}
    phrase = pieces(TOKENIZER.encode("<ref>the clock is green</ref>"))
    check(data, 0, f"{SEEN} {phrase}", f"{BOX} </s>")
    items = list(data.samples())
    assert items[1].box == (0, 50, 200, 100)  # as much of it as the picture shows
    assert items[2].refs[0][0].endswith("VG_100K_2/2.jpg")
    assert [item.fields["sent_id"] for item in items] == [1382, 1383, 1389]


@pytest.mark.parametrize(
    "kind, change, says",
    [
        (GQA, ('"2405722"', '"7"'), "record 0 (question_id 02930152): image"),
        (GQA, ('{"02930152": {', "[{"), "is not the JSON"),
        (GQA, ('"answer": "yes"', '"fullAnswer": "yes"'), "question_id 02930152): has no answers"),
        (TEXTVQA, ('"data"', '"date"'), "with a list 'data'"),
        (AOKVQA, ('"image_id": 9', '"image_id": "x"'), "does not take its image_id"),
        (OCRVQA, ('["Ray Bradbury", ', "["), "(image_id 0002005395): 2 questions and 1 answers"),
        (OCRVQA, ('"split": 1', '"split": 2'), "has no records"),
        (TEXTCAPS, ('"caption_str"', '"caption"'), "(caption_id 0): 'caption_str' is missing"),
        (
            REGIONS,
            ('"x": 24', '"x": null'),
            "(id 1) (region_id 1382): [None, 34, 88, 44] is no box",
        ),
    ],
)
def test_a_bad_record_is_named_by_its_id(sets, kind, change, says):
    path = sets / kind["annotations"]
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    assert says in refusal(sets, kind)


def test_what_a_ref_needs_is_named_where_it_is_missing(sets):
    path = sets / "refcoco/instances.json"
    path.write_text(path.read_text().replace("1719310", "7"))
    assert "(ref_id 0) (sent_id 11), its instance: " in refusal(sets, REFER)
    table = {**REFER, "split": "dev"}
    assert "`split` is 'dev'; name one of train, val" in refusal(sets, table)
    del table["instances"]
    assert "needs `instances`" in refusal(sets, {**table, "split": "train"})
