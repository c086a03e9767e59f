"""Whatever is wrong with what a user brought: one sentence with file, record and remedy, never a traceback."""

import json
import os
import re
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import TOKENIZER, V, dump, mixture, png, png_bytes, tar_of

from data import Data
from support.errors import BadInput, sentence
from text.boxes import format_box, parse_box, parse_box_released
from text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def open_all(toml, **more):
    """Everything that reads: start-up, training batches, evaluation."""
    data = Data(toml, TOKENIZER, image_size=16, visual=V, context=256, batch=2, **more)
    list(data.batches(0, 2))
    return list(data.samples())


VQA = {"name": "v", "format": "vqa", "annotations": "v.json", "images": "im"}
REF = {"name": "r", "format": "refcoco", "annotations": "r.json", "images": "im"}
CHAT = {"name": "c", "format": "conversations", "annotations": "c.json", "images": "im"}
COCO = {"name": "k", "format": "coco-caption", "annotations": "k.json", "images": "im"}
TARS = {"name": "t", "format": "caption-shards", "shards": "t/*.tar"}
PAIR = {
    "name": "p",
    "format": "vqa",
    "questions": "q.json",
    "annotations": "a.json",
    "images": "im",
}
GOOD = (("a.png", png_bytes()), ("a.txt", b"a cross"))
ASK = {"image": "a.png", "question": "what?", "answers": ["red"]}
POINT = {
    "img_name": "a.png",
    "bbox": [1, 2, 9, 9],
    "sentences": [{"sent": "it", "sent_id": 1}],
    "segment_id": 1,
}
SAY = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image> hi"}, {"from": "gpt", "value": "ho"}],
}


def one(table, **change):
    """A mixture of one source whose one record is changed; None takes the key away."""

    def make(folder):
        record = {**{"v": ASK, "r": POINT, "c": SAY}[table["name"]], **change}
        dump(folder / table["annotations"], [{k: v for k, v in record.items() if v is not None}])
        return mixture(folder, table)

    return make


def picture(content):
    """The picture of a sound record holds these bytes."""

    def make(folder):
        (folder / "im" / "a.png").write_bytes(content)
        return one(VQA)(folder)

    return make


def text(table, content):
    def make(folder):
        (folder / table["annotations"]).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        return mixture(folder, table)

    return make


def tar(change=lambda raw: raw, members=GOOD):
    def make(folder):
        tar_of(folder / "t" / "0.tar", members)
        (folder / "t" / "0.tar").write_bytes(change((folder / "t" / "0.tar").read_bytes()))
        return mixture(folder, TARS)

    return make


def toml(content):
    def make(folder):
        (folder / "mix.toml").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        return folder / "mix.toml"

    return make


def pair(questions, answers, **more):
    def make(folder):
        dump(folder / "q.json", questions)
        dump(folder / "a.json", answers)
        return mixture(folder, {**PAIR, **more})

    return make


def replaced(table, with_what):
    """The picture folder's a.png becomes something else; a sound record points at it."""

    def make(folder):
        path = folder / "im" / "a.png"
        path.unlink()
        with_what(path)
        return one(table)(folder)

    return make


def bomb(width, height):
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def flip(at):
    return lambda raw: raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :]


SOUND = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "caption": "a cross"}],
}
ASKED = {"data_subtype": "x", "questions": [{"question_id": 1, "image_id": 1, "question": "what?"}]}
SAID = {"annotations": [{"question_id": 1, "answers": [{"answer": "red"}]}]}
NAMED = {"image_name": "a.png"}
NO_BOX = r"r\.json: sample 0: bbox .* is not \[x1, y1, x2, y2\] .* 20 x 20 image"

CASES = {  # name: how to make it, what its sentence must name
    "the mixture is not there": (lambda f: f / "none.toml", r"none\.toml.*No such file"),
    "the mixture is a folder": (lambda f: f, r"directory"),
    "the mixture is not TOML": (toml("[[source"), r"mix\.toml.*TOML"),
    "the mixture is not UTF-8": (toml(b"name = '\xff'"), r"mix\.toml.*TOML"),
    "the mixture is empty": (toml(""), r"mix\.toml.*\[\[source\]\]"),
    "a source is no table": (toml("source = [1, 2]"), r"mix\.toml.*\[\[source\]\]"),
    "a key is misspelt": (one({**VQA, "wieght": 1}), r"unknown key 'wieght'.*weight"),
    "a format is unknown": (one({**VQA, "format": "vqa2"}), r"'v'.*'vqa2'.*refcoco"),
    "a source has no format": (
        one({**VQA, "format": ""}),
        r"give it a `name` and a `format` of .*refcoco",
    ),
    "a weight is text": (one({**VQA, "weight": "much"}), r"`weight` is 'much'"),
    "a weight is negative": (one({**VQA, "weight": -1.0}), r"`weight` is -1"),
    "two sources have one name": (lambda f: (one(VQA)(f), mixture(f, VQA, VQA))[1], r"two sources"),
    "one source of two has a weight": (
        lambda f: (one(VQA)(f), mixture(f, VQA, {**VQA, "name": "w", "weight": 1.0}))[1],
        r"all or to none",
    ),
    "a format lacks its key": (
        one({k: v for k, v in VQA.items() if k != "images"}),
        r"'vqa' needs `images`",
    ),
    "vqa has neither file": (
        lambda f: mixture(f, {k: v for k, v in VQA.items() if k != "annotations"}),
        r"needs `annotations`",
    ),
    "boxes are to be cropped": (one({**REF, "crop": True}), r"may not be cropped"),
    "a task does not fit its format": (
        one({**VQA, "task": "ground"}),
        r"has the task 'vqa', not 'ground'",
    ),
    "the annotations are not there": (lambda f: mixture(f, VQA), r"v\.json.*No such file"),
    "the annotations are a folder": (
        lambda f: ((f / "v.json").mkdir(), mixture(f, VQA))[1],
        r"v\.json.*directory",
    ),
    "the annotations are empty": (text(VQA, ""), r"v\.json.*not the JSON"),
    "the annotations are an empty list": (text(VQA, "[]"), r"no records"),
    "the annotations are cut in half": (
        text(VQA, json.dumps([ASK] * 3)[:60]),
        r"v\.json.*not the JSON.*fetch it again",
    ),
    "the annotations are another format's": (
        text({**COCO}, json.dumps([ASK])),
        r"k\.json.*'images'",
    ),
    "the annotations are a picture": (text(VQA, png_bytes()), r"v\.json.*not the JSON"),
    "the annotations are UTF-16": (
        text(VQA, json.dumps([ASK]).encode("utf-16")),
        r"v\.json.*not the JSON in UTF-8",
    ),
    "the annotations are latin-1": (
        text(VQA, json.dumps([{**ASK, "question": "é"}], ensure_ascii=False).encode("latin-1")),
        r"record 0.*UTF-8",
    ),
    "the annotations are nested too deep": (text(VQA, "[" * 100_000), r"v\.json.*not the JSON"),
    "a number has too many digits": (
        text(VQA, '[{"question": ' + "9" * 5000 + "}]"),
        r"v\.json.*not the JSON",
    ),
    "a line of JSONL is broken": (
        text({**CHAT}, '{"id": 1, "conversations": [}\n'),
        r"c\.json: record 0.*not valid JSON",
    ),
    "the images are no folder": (
        one({**VQA, "images": "v.json"}),
        r"v\.json/a\.png: is no file; mend the record, or `images`",
    ),
    "a record is a number": (text(VQA, "[7]"), r"record 0.*int, not an object"),
    "a key is missing": (one(VQA, question=None), r"v\.json: record 0: 'question' is missing"),
    "a question is a list": (
        one(VQA, question=["what?"]),
        r"'question': is no text .*'list' object",
    ),
    "a question is empty": (one(VQA, question="  "), r"'question' is missing or empty"),
    "answers are a number": (one(VQA, answers=3), r"'answers' is int and no list"),
    "answers are numbers": (one(VQA, answers=[3]), r"record 0: is no text .*'int' object"),
    "answers are none": (one(VQA, answers=[]), r"record 0: has no answers"),
    "text holds half a character": (
        text(VQA, '[{"image": "a.png", "question": "\\ud800?", "answers": ["x"]}]'),
        r"record 0.*surrogate",
    ),
    "text holds the reserved mark": (
        one(VQA, question="see <ImageHere>"),
        r"record 0.*<ImageHere>.*remove",
    ),
    "an image is not there": (one(VQA, image="b.png"), r"record 0: image .*b\.png.*no file"),
    "an image's name holds a NUL": (one(VQA, image="a\0.png"), r"record 0: image 'a\\x00\.png'"),
    "an image's name is endless": (one(VQA, image="a" * 5000), r"record 0: image"),
    "an image leads out by dots": (one(VQA, image="../v.json"), r"'\.\./v\.json' leads out of"),
    "an image is absolute": (one(VQA, image="/etc/hostname"), r"'/etc/hostname' leads out of"),
    "an image is a link out of the folder": (
        replaced(VQA, lambda p: p.symlink_to("/etc/hostname")),
        r"leads out of.*links = true",
    ),
    "an image is a link to itself": (replaced(VQA, lambda p: p.symlink_to(p)), r"record 0: image"),
    "an image is a folder": (replaced(VQA, lambda p: p.mkdir()), r"a\.png.*no file"),
    "an image is a pipe": (replaced(VQA, lambda p: os.mkfifo(p)), r"a\.png.*no file"),
    "an image is empty": (picture(b""), r"record 0: image .*a\.png: cannot be read as an image"),
    "an image is text": (picture(b"404 not found"), r"a\.png: cannot be read as an image"),
    "an image is cut in half": (
        picture(png_bytes(size=(99, 99))[:150]),
        r"a\.png: cannot be read as an image \(.*truncated",
    ),
    "an image is a bomb": (
        picture(bomb(60_000, 60_000)),
        r"a\.png: cannot be read as an image \(.*pixels",
    ),
    "an image is just too large": (
        picture(bomb(10_000, 10_000)),
        r"a\.png: has over 89000000 pixels",
    ),
    "an image has no pixels": (picture(bomb(0, 5)), r"a\.png: cannot be read as an image"),
    "a box has three numbers": (one(REF, bbox=[1, 2, 3]), NO_BOX),
    "a box has five numbers": (one(REF, bbox=[1, 2, 3, 4, 5]), NO_BOX),
    "a box holds NaN": (one(REF, bbox=[1, 2, float("nan"), 9]), NO_BOX),
    "a box is infinite": (one(REF, bbox=[1, 2, float("inf"), 9]), NO_BOX),
    "a box holds text": (one(REF, bbox=[1, 2, "3", 9]), NO_BOX),
    "a box holds a list": (one(REF, bbox=[1, 2, [3], 9]), NO_BOX),
    "a box is degenerate": (one(REF, bbox=[5, 2, 5, 9]), NO_BOX),
    "a box is x, y, w, h": (one(REF, bbox=[10, 12, 6, 5]), NO_BOX),
    "a box lies outside its image": (one(REF, bbox=[5, 2, 50, 9]), NO_BOX),
    "a box lies on the edge of its image": (one(REF, bbox=[-1, 2, 0, 9]), NO_BOX),
    "a box is missing": (one(REF, bbox=None), r"bbox \(\) is not"),
    "sentences are empty": (one(REF, sentences=[]), r"sample 0: 'sent' is missing"),
    "a sentence is a text": (one(REF, sentences=["it"]), r"sample 0: 'sent' is missing"),
    "turns are none": (one(CHAT, conversations=[]), r"c\.json: record 0: turns must alternate"),
    "turns do not alternate": (
        one(CHAT, conversations=[SAY["conversations"][0]] * 2),
        r"record 0: turns must alternate",
    ),
    "a turn is text": (one(CHAT, conversations=["hi", "ho"]), r"record 0: 'from' is missing"),
    "an image has no mark": (
        one(CHAT, image=["a.png", "a.png"]),
        r"record 0: 1 <image> for 2 images",
    ),
    "a mark has no image": (one(CHAT, image=None), r"record 0: 1 <image> for 0 images"),
    "a chat has images but no folder": (
        one({k: v for k, v in CHAT.items() if k != "images"}),
        r"'conversations' needs `images`",
    ),
    "a caption's image is not listed": (
        lambda f: (dump(f / "k.json", {**SOUND, "images": []}), mixture(f, COCO))[1],
        r"caption 0, its image: .*k\.json has no record of its id",
    ),
    "captions have no list": (
        lambda f: (dump(f / "k.json", {"images": SOUND["images"]}), mixture(f, COCO))[1],
        r"k\.json.*'annotations'",
    ),
    "captions are an object": (
        lambda f: (dump(f / "k.json", {**SOUND, "annotations": {}}), mixture(f, COCO))[1],
        r"k\.json.*not an object with a list 'annotations'",
    ),
    "a question has no answer": (
        pair(ASKED, {"annotations": []}, **NAMED),
        r"q\.json: record 0, its answers: .*a\.json has no record of its id",
    ),
    "an image_name takes no number": (
        pair(ASKED, SAID, image_name="{:06d}{}.png"),
        r"image_name .* does not take",
    ),
    "an image_id is text": (
        pair({**ASKED, "questions": [{**ASKED["questions"][0], "image_id": "x"}]}, SAID),
        r"q\.json: record 0: image_name .* does not take its image_id",
    ),
    "questions do not say their subset": (
        pair({"questions": ASKED["questions"]}, SAID),
        r"q\.json: has no 'data_subtype'.*image_name",
    ),
    "a pattern matches no tar": (lambda f: mixture(f, TARS), r"nothing matches `shards` .*\*\.tar"),
    "shards are an empty list": (lambda f: mixture(f, {**TARS, "shards": []}), r"needs `shards`"),
    "a tar is cut in half": (
        tar(lambda raw: raw[:540]),
        r"0\.tar: is no tar, or cut, at byte 0 .*fetch it again",
    ),
    "a tar is a renamed picture": (
        tar(lambda raw: png_bytes(size=(400, 400)) * 20),
        r"0\.tar: is no tar, or cut, at byte 0",
    ),
    "a tar's header is damaged": (tar(flip(130)), r"0\.tar: is no tar, or cut, at byte 0"),
    "a tar is empty": (tar(lambda raw: b""), r"0\.tar: is cut"),
    "a tar lacks its end": (
        tar(lambda raw: raw[: raw.rindex(b"a cross") + 512]),
        r"0\.tar: is cut",
    ),
    "a tar holds nothing": (tar(lambda raw: bytes(10240)), r"no records"),
    "a tar is damaged in its middle": (
        tar(lambda raw: raw[:1024] + b"x" + raw[1025:], [("a.png", b"no"), ("a.txt", b"a cross")]),
        r"0\.tar: is no tar, or cut, at byte 1024",
    ),
    "a tar holds no pictures": (
        tar(members=[("a.txt", b"a cross")]),
        r"0\.tar: a: lacks its image or its caption",
    ),
    "a tar's picture has no caption": (
        tar(members=[("a.png", png_bytes())]),
        r"0\.tar: a: lacks its image or its caption",
    ),
    "a tar's caption is not UTF-8": (
        tar(members=[("a.png", png_bytes()), ("a.txt", b"\xff\xfe\xfd")]),
        r"0\.tar: a: 'caption': is no text in UTF-8",
    ),
    "a tar's JSON has no caption": (
        tar(members=[("a.png", png_bytes()), ("a.json", b"{}")]),
        r"0\.tar: a: 'caption' is missing",
    ),
    "a tar's caption is blank": (
        tar(members=[("a.png", png_bytes()), ("a.txt", b" ")]),
        r"0\.tar: a: 'caption' is missing or empty",
    ),
    "a tar's picture is broken": (
        tar(members=[("a.png", b"no"), ("a.txt", b"a cross")]),
        r"0\.tar: a: cannot be read as an image",
    ),
    "a tar's member lies about its size": (
        tar(lambda raw: raw[:124] + b"\x80" + b"\xff" * 11 + raw[136:]),
        r"0\.tar: is no tar, or cut, at byte 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence_with_file_record_and_remedy(tmp_path, name):
    png(tmp_path / "im" / "a.png", size=(20, 20))
    make, says = CASES[name]
    with pytest.raises(BadInput) as caught:
        open_all(make(tmp_path))
    said = str(caught.value)
    assert re.search(says, said), said
    assert "\n" not in said and "Traceback" not in said and str(tmp_path) in said
    assert len(said) < 400 + 12 * len(str(tmp_path)) + 5000 * ("endless" in name)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_cannot_be_read_stops_a_training_with_workers_in_the_same_words(
    tmp_path, workers
):
    png(tmp_path / "im" / "a.png", size=(20, 20))
    data = Data(one(VQA)(tmp_path), TOKENIZER, 16, V, 256, batch=2)
    (tmp_path / "im" / "a.png").write_bytes(b"gone")
    with pytest.raises(BadInput) as caught:
        list(data.batches(0, 1, workers=workers))
    said = sentence(caught.value)  # of a loader's message, which holds its traceback
    assert re.match(r"source 'v': 1 samples in a row.*a\.png: cannot be read", said)
    assert "Traceback" not in said and "\n" not in said


def test_evaluation_raises_what_training_replaces(tmp_path):
    png(tmp_path / "im" / "a.png", size=(20, 20))
    (tmp_path / "im" / "b.png").write_bytes(b"")
    dump(tmp_path / "v.json", [ASK, {**ASK, "image": "b.png"}])
    data = Data(mixture(tmp_path, VQA), TOKENIZER, 16, V, 256, batch=2)
    [[batch]] = data.batches(0, 1)
    assert len(batch.bad) == data.bad == 1 and "record 1" in batch.bad[0]
    with pytest.raises(BadInput, match="record 1"):
        list(data.samples())


def test_links_may_lead_out_where_the_mixture_says_so(tmp_path):
    png(tmp_path / "elsewhere.png", size=(20, 20))
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert open_all(one({**VQA, "links": True})(tmp_path))
    (tmp_path / "here").symlink_to(tmp_path / "im")  # the folder itself may always be a link
    (tmp_path / "im" / "a.png").unlink()
    png(tmp_path / "im" / "a.png", size=(20, 20))
    assert open_all(one({**VQA, "images": "here"})(tmp_path))


def test_too_many_rows_for_the_ranks_and_bad_tokenizers_are_named(tmp_path):
    png(tmp_path / "im" / "a.png", size=(20, 20))
    data = Data(one(VQA)(tmp_path), TOKENIZER, 16, V, 256, batch=6)
    with pytest.raises(BadInput, match="--batch 6 .* 4 ranks x 1"):
        next(data.batches(world=4))
    for content in (b"", b"not a model", os.urandom(300)):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(BadInput, match=r"tokenizer\.model"):
            Tokenizer(tmp_path)
    with pytest.raises(BadInput, match="No such file"):
        Tokenizer(tmp_path / "none.model")
    for box in (
        (0, 0, 0, 1),
        (0.5, 0, 0.4, 1),
        (0, 0, 1.1, 1),
        (float("nan"), 0, 1, 1),
        (-0.1, 0, 1, 1),
    ):
        with pytest.raises(BadInput, match="degenerate or outside"):
            format_box(box)


# ---- anything at all -------------------------------------------------------------------------------------------------

SOME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.png", "human", "gpt"])
)
KEYS = st.sampled_from(
    [
        "image",
        "question",
        "answers",
        "img_name",
        "bbox",
        "sentences",
        "sent",
        "conversations",
        "from",
        "value",
        "annotations",
        "images",
        "questions",
        "id",
        "image_id",
        "question_id",
        "file_name",
        "caption",
        "answer",
    ]
)
ANY = st.recursive(
    LEAF, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=5), max_leaves=12
)
TABLES = [VQA, REF, CHAT, COCO, PAIR, TARS]


def survives(folder, table, content):
    """Any outcome but a traceback."""
    (folder / "im").mkdir(exist_ok=True)
    (folder / "t").mkdir(exist_ok=True)
    for name in {table.get("annotations", "t/0.tar"), table.get("questions", "q.json")}:
        (folder / name).write_bytes(content)
    try:
        open_all(mixture(folder, table))
    except BadInput as e:
        assert "\n" not in str(e)


@SOME
@given(content=st.binary(max_size=1500), table=st.sampled_from(TABLES))
def test_random_bytes_never_give_a_traceback(tmp_path, content, table):
    survives(tmp_path, table, content)


@SOME
@given(
    content=st.lists(ANY, max_size=3) | st.dictionaries(KEYS, ANY, max_size=4),
    table=st.sampled_from(TABLES),
)
def test_random_json_never_gives_a_traceback(tmp_path, content, table):
    png(tmp_path / "im" / "a.png", size=(20, 20))
    survives(tmp_path, table, json.dumps(content).encode())


@SOME
@given(st.data())
def test_a_sound_record_with_one_thing_changed_never_gives_a_traceback(tmp_path, data):
    png(tmp_path / "im" / "a.png", size=(20, 20))
    table, record = data.draw(st.sampled_from([(VQA, ASK), (REF, POINT), (CHAT, SAY)]))
    changed = {**record, data.draw(st.sampled_from(sorted(record))): data.draw(ANY)}
    survives(tmp_path, table, json.dumps([changed]).encode())


@SOME
@given(st.data())
def test_damaged_pictures_and_tars_never_give_a_traceback(tmp_path, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    (tmp_path / "im").mkdir(exist_ok=True)
    Image.new("RGB", (20, 20), (9, 99, 200)).save(tmp_path / "im" / "a.png", kind)
    tar_of(
        tmp_path / "t" / "0.tar",
        [("a.png", (tmp_path / "im" / "a.png").read_bytes()), ("a.txt", b"a cross")],
    )
    for path, table in ((tmp_path / "im" / "a.png", VQA), (tmp_path / "t" / "0.tar", TARS)):
        raw = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=6)):
            raw[at] = data.draw(st.integers(0, 255))
        path.write_bytes(
            raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
        )
        try:
            open_all(
                (one(table) if table is VQA else lambda folder: mixture(folder, TARS))(tmp_path)
            )
        except BadInput as e:
            assert "\n" not in str(e)


@given(st.text(alphabet="<box>/(),01.9 x") | st.text())
def test_any_text_can_be_asked_for_its_box(content):
    for parse in (parse_box, parse_box_released):
        box = parse(content)
        assert box is None or len(box) == 4
