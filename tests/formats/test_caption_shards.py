"""formats/caption_shards.py: tars of pictures and captions."""

import re
import tarfile

import pytest
from small import SEEN, check, data_of, picture, refusal, tar_of

TARS = {"name": "t", "format": "caption-shards", "shards": "t/*.tar"}


def test_a_picture_and_the_text_or_json_of_the_same_key_are_a_sample(tmp_path):
    members = [
        ("x/k1.png", picture()),
        ("x/k1.txt", b"A Red.circle!"),
        ("x/k1.json", b'{"caption": "second to a text"}'),
        ("x/k2.PNG", picture()),
        ("x/k2.json", b'{"caption": "a blue square", "id": 5}'),
    ]
    tar_of(tmp_path / "t/00.tar", members)
    members = [("k3.txt", b"a cross"), ("k3.jpg", picture()), ("k3.mask.png", b"7")]
    tar_of(tmp_path / "t/01.tar", members)
    data = data_of(tmp_path, {**TARS, "shards": ["t/00*", "t/01.tar"]})
    asked = f"{SEEN} ▁Short ▁caption :"
    check(data, 0, asked, "▁a ▁red ▁circle </s>")
    check(data, 1, asked, "▁a ▁blue ▁square </s>")
    _, second, third = data.samples()
    assert second.fields == {"key": "x/k2", "caption": "a blue square", "id": 5}
    assert third.answers == ["a cross"]


@pytest.mark.parametrize("kind", ["USTAR", "GNU", "PAX"])
def test_long_names_in_tars_of_every_kind_keep_a_picture_and_its_caption_together(tmp_path, kind):
    long = "e" * (5 if kind == "USTAR" else 95)  # USTAR has room for no more
    members = []
    for n in range(3):
        members.append((f"{'d' * 90}/{long}{n}.png", picture()))
        members.append((f"{'d' * 90}/{long}{n}.txt", b"caption %d" % n))
    members.append(("short.mask.png", b"7"))
    format = getattr(tarfile, f"{kind}_FORMAT")
    tar_of(tmp_path / "t/a.tar", members, pax={"comment": "x" * 700}, format=format)
    data = data_of(tmp_path, TARS)
    assert [item.answers for item in data.samples()] == [[f"caption {n}"] for n in range(3)]


CAPTION = ("a.txt", b"a cross")
PICTURE = ("a.png", picture())


@pytest.mark.parametrize(
    "members, says",
    [
        ([CAPTION], "a: lacks its image or its caption"),
        ([PICTURE], "a: lacks its image or its caption"),
        ([PICTURE, ("a.txt", b"\xff\xfe")], "a: 'caption': is no text in UTF-8"),
        ([PICTURE, ("a.json", b"{")], "a: is not valid JSON"),
        ([CAPTION, ("a.png", b"no")], "a: cannot be read as an image"),
    ],
)
def test_a_bad_sample_is_refused_by_its_tar_and_key(tmp_path, members, says):
    tar_of(tmp_path / "t/0.tar", members)
    assert f"0.tar: {says}" in refusal(tmp_path, TARS)


def test_a_damaged_tar_is_refused_by_name_and_place(tmp_path):
    path = tmp_path / "t/0.tar"
    tar_of(path, [("a.png", b"no picture" * 90), CAPTION])
    path.write_bytes(path.read_bytes().replace(b"a.txt", b"b.txt"))
    said = refusal(tmp_path, TARS)
    assert re.search(r"0\.tar: is no tar, or cut, at byte 1536 .*fetch it again", said)


def test_shards_that_name_no_tar_are_refused(tmp_path):
    assert "t/*.tar is not there" in refusal(tmp_path, TARS)


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    folder = tmp_path / "[1]"
    tar_of(folder / "t/a.tar", [("1.png", picture()), ("1.txt", b"red")])
    assert data_of(folder, TARS).counts == {"t": 1}
