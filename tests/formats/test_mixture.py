"""formats/mixture.py: TOML files of sources, and where the pictures that they name may lie."""

import re

import pytest
from small import ASK, data_of, mixture, picture, refusal, refused_record, source, write

from formats.mixture import load_mixture
from support.errors import BadInput

VQA = source("vqa")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "im/a.png", picture())
    write(tmp_path / "a.json", [ASK])
    return tmp_path


def test_a_mixture_that_is_no_file_is_refused_and_not_waited_for(tmp_path, no_file):
    no_file(tmp_path / "mix.toml")
    with pytest.raises(BadInput, match="mix.toml: is no regular file"):
        load_mixture(tmp_path / "mix.toml")


def test_relative_paths_are_relative_to_the_mixture_file(folder, monkeypatch):
    mixture(folder, VQA)
    monkeypatch.chdir(folder.parent)
    [opened] = load_mixture(f"{folder.name}/mix.toml")
    assert opened.read(0).text == "what?"


@pytest.mark.parametrize(
    "content, says",
    [
        ("[[source", "is not valid TOML"),
        ("", r"must hold \[\[source\]\]"),
        ("source = [1, 2]", r"must hold \[\[source\]\]"),
        ("x = 1\n[[source]]", r"must hold \[\[source\]\]"),
    ],
)
def test_a_file_that_is_no_mixture_is_refused_by_name(tmp_path, content, says):
    path = write(tmp_path / "mix.toml", content)
    with pytest.raises(BadInput, match=f"mix.toml: {says}"):
        load_mixture(path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"wieght": 1}, "unknown key 'wieght'; it takes .*weight"),
        ({"format": "vqa2"}, "source 'vqa': format 'vqa2': .*refcoco"),
        ({"name": ""}, "give it a `name` and a `format` of .*refcoco"),
        ({"weight": "much"}, "`weight` is 'much', of the wrong type"),
        ({"weight": -1.0}, "`weight` is -1.0, not a number between"),
        ({"annotations": ""}, "needs `annotations`"),
        ({"task": "ground"}, "has the task 'vqa', not 'ground'"),
        ({"format": "refcoco", "crop": True}, "'ground' may not be cropped"),
    ],
)
def test_a_source_with_a_bad_key_is_refused_by_file_and_name(folder, change, says):
    assert re.search(f"mix.toml: .*{says}", refusal(folder, {**VQA, **change}))


def test_sources_need_names_of_their_own_and_weights_all_or_none(folder):
    assert "two sources have one name" in refusal(folder, VQA, VQA)
    assert "all or to none" in refusal(folder, VQA, {**VQA, "name": "w", "weight": 1.0})


@pytest.mark.parametrize(
    "name, says",
    [
        ("/etc/hostname", "image '/etc/hostname' leads out of"),
        ("../im2/a.png", "image '../im2/a.png' leads out of .*links = true"),
        ("a\0.png", r"image 'a\\x00.png'"),
        ("b.png", "image .*b.png: is no file"),
    ],
)
def test_a_picture_that_is_not_in_its_folder_is_refused_by_record_and_name(tmp_path, name, says):
    said = refused_record(tmp_path, VQA, ASK, {"image": name})
    assert re.search(f"a.json: record 0: {says}", said)


def test_the_folder_may_be_a_link_and_links_in_it_may_lead_out_where_the_mixture_says_so(folder):
    (folder / "here").symlink_to(folder / "im")
    table = {**VQA, "images": "here"}
    assert list(data_of(folder, table).samples())
    linked = folder / "im/a.png"
    linked.rename(folder / "elsewhere.png")
    linked.symlink_to(folder / "elsewhere.png")
    assert "leads out of" in refusal(folder, table)
    table["links"] = True
    assert list(data_of(folder, table).samples())
    write(folder / "a.json", [{**ASK, "image": "../elsewhere.png"}])  # dots still may not
    assert "leads out of" in refusal(folder, table)
