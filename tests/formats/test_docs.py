"""docs/DATA.md: the example of every format, just as it is printed there, is trained on."""

import re

import published
import pytest
from small import picture, tar_of, write
from tiny import ROOT

import train

PAGE = (ROOT / "docs/DATA.md").read_text()
FILES = dict(re.findall(r"`([\w.]+)`[^\n]*:\n\n```(?:json|text)\n(.*?)```", PAGE, re.DOTALL))
MIXTURES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("mixture", MIXTURES, ids=[text.split('"')[1] for text in MIXTURES])
def test_each_example_of_the_page_is_trained_on_as_it_stands_there(here, mixture):
    assert 2 * len([*FILES, *MIXTURES]) == PAGE.count("```")
    shown = picture(size=(48, 36))
    for name, content in FILES.items():
        write(here / name, content)
        for image in re.findall(r'"(\w+\.jpg)"', content):
            write(here / "images" / image, shown)
    caption = FILES["000001.txt"].encode()
    tar_of(here / "shards/0.tar", [("000001.jpg", shown), ("000001.txt", caption)])
    published.write_sets(here / "data")
    if "parquet" in mixture:
        pyarrow = pytest.importorskip("pyarrow", reason="a parquet file is to be written")
        said = [{"user": "What is this?", "assistant": "A dog."}]
        rows = {"images": [[{"bytes": shown, "path": None}]] * 8, "texts": [said] * 8}
        (here / "hub").mkdir()
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table(rows), here / "hub/0.parquet")
    write(here / "mix.toml", mixture)
    flags = f"--stage 2 --init start --data {here}/mix.toml --out {here}/out --steps 2 --batch 4"
    assert train.main([*flags.split(), "--workers", "0"]) == 0
    assert not (here / "out/unreadable.txt").exists()
