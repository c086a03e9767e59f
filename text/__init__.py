# ruff: noqa: F401
"""Text <-> ids: tokenizer, templates, boxes."""

from text.tokenizer import Tokenizer, encode_prompt, encode_turns, truncate
