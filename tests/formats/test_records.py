"""formats/records.py: what text of a record must be."""

import pytest

from formats.files import LONGEST
from formats.records import need
from support.errors import BadInput


@pytest.mark.parametrize(
    "text, says",
    [
        (["what?"], "is no text .*'list' object"),
        ("\ud800?", "surrogate"),
        ("see <ImageHere>", "reserved mark <ImageHere>; remove it"),
        ("x" * (LONGEST // 8 + 1), "a text of 1048577 characters; shorten it"),
        ("  ", "is missing or empty"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_record_and_key(text, says):
    with pytest.raises(BadInput, match=f"record 3: 'q'.*{says}"):
        need({"q": text}, "q", "record 3")
