"""Configs out of a config.json that anybody may have written."""

from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path

from model import Config, LlamaConfig, frequencies
from support.errors import BadInput
from support.files import read_json
from text.templates import HERE, TEMPLATES

LIMITS = {
    "layers": 1000,
    "vocab": 2**24,
    "prefix": 1,
}  # of a config; its other whole numbers end at a million


def read_config(path, make):
    """The Config that make(d, path) finds in the config.json of a folder."""
    d = read_json(Path(path) / "config.json")
    with understood(path):
        return checked(make(d, path))


@contextmanager
def understood(path):
    """One sentence for whatever goes wrong with the values of a config.json."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:  # whatever a reader stumbles over in a stranger's values
        raise BadInput(
            f"{path}: its config.json describes no model known here "
            f"({type(e).__name__}: {str(e)[:100]}); take another"
        ) from None


def checked(config):
    """Fields of their types, and so large at most that building on the meta device stays cheap."""
    for field in fields(config):
        value = getattr(config, field.name)
        wrong = f"{field.name} is {str(value)[:50]}"
        if is_dataclass(value):
            checked(value)
        elif field.type is int:
            least = 0 if field.name == "prefix" else 1
            assert type(value) is int and least <= value <= LIMITS.get(field.name, 2**20), wrong
        elif field.type is float:
            assert type(value) in (int, float) and 0 < value < 1e12, wrong
        elif field.type is list:  # of the three colours
            assert type(value) is list and [0 < v < 1 for v in value] == [True] * 3, wrong
        else:
            assert isinstance(value, field.type), wrong
    if isinstance(config, Config):
        assert HERE in config.image_mark, f"image_mark is {config.image_mark[:50]!r}"
        assert config.template in TEMPLATES, f"template is {config.template[:50]!r}"
    if isinstance(config, LlamaConfig):
        assert config.head_dim % 2 == 0, "half a pair to rotate"
        assert frequencies(config, "cpu").isfinite().all(), f"rope {str(config.rope)[:80]}"
    return config


def renamed(d, names):
    """{our name: value} of what a config.json says; names: theirs -> ours."""
    return {ours: d[theirs] for theirs, ours in names.items() if d.get(theirs) is not None}


def insist(d, expected, path, family):
    """Refuse what a config.json asks for and is built here otherwise."""
    others = [
        f"{key}={d[key]!r:.60}" for key, only in expected.items() if d.get(key) not in (None, only)
    ]
    if others:
        raise BadInput(f"{path}: {', '.join(others)} is not {family} as built here; take another")
