# ruff: noqa: F401
"""Files on disk -> records: any sample of any format by its number, nothing held in memory.

    sources = load_mixture("recipes/stage2.toml")     # opened: JSON and tars are indexed once
    record = sources[0].read(123)                     # see Record; its images are named, not decoded

A mixture is a TOML file of [[source]] tables (see Source); every file is read where it lies, nothing is converted.
To add a format, write its reader in a module of its own and name it in FORMATS (mixture.py). A reader has
`lengths` (the bytes of each sample's text), `images` (how many each has) and `read(number)`, which returns a Record.
"""

from formats.mixture import FORMATS, Source, load_mixture
from formats.records import Record
