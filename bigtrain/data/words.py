"""Encoding plain text word by word, and each word only once.

A byte-level BPE cuts a text into words with a regular expression, and the ids of a word depend on the word alone. In
the `tokenizers` library the cutting takes most of the time. Here `regex` cuts, and the library is asked what a new word
becomes: the same ids, in half the time of its batch call on two cores (benchmarks/data.py). It is done where both are
known to cut alike: for PATTERNS, and texts of nothing but PLAIN characters. All others are left to the library.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import regex

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # that of ByteLevel itself
_LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = frozenset({GPT2, _LATER % "{1,3}", _LATER % ""})  # of GPT-2, Llama 3, Qwen 2 and 3
# ASCII, Latin-1, dashes, quotation marks, bullets and ellipses: NFC leaves them as they are, and their classes are as
# old as Unicode. Not the separators 1C to 1F, which are blanks to some.
PLAIN = regex.compile(r"[\x00-\x1b\x20-\x7f\xa0-\xff\u2010-\u2027]*")
REMEMBERED = 500_000  # words, at most
LONGEST = 50  # characters of a word that is remembered


class Words:
    """What a tokenizer has made of the words that it has met."""

    def __init__(self, pattern: str, added: Sequence[str]):
        """added: tokens that are not special, which the library finds in a text before it cuts it."""
        self._cut = regex.compile(pattern).findall
        self._added = regex.compile("|".join(map(regex.escape, added))) if added else None
        self._known: dict[str, tuple[int, ...]] = {}

    @staticmethod
    def of(backend: Tokenizer) -> Words | None:
        """None for a tokenizer that is not known to work so."""
        content = json.loads(backend.to_str())
        pattern = _pattern(content["pre_tokenizer"])
        normalizer, model = content["normalizer"], content["model"]
        if pattern not in PATTERNS or model["type"] != "BPE" or model.get("dropout"):
            return None
        if normalizer is not None and normalizer["type"] != "NFC":
            return None
        return Words(pattern, [token["content"] for token in content["added_tokens"] if not token["special"]])

    def encode(self, backend: Tokenizer, text: str) -> list[int] | None:
        """The ids of a text, no special token added; None for one that is left to the library."""
        if PLAIN.fullmatch(text) is None or (self._added is not None and self._added.search(text)):
            return None
        words = self._cut(text)
        try:
            return [*itertools.chain.from_iterable(map(self._known.__getitem__, words))]
        except KeyError:
            return self._learned(backend, words)

    def _learned(self, backend: Tokenizer, words: list[str]) -> list[int]:
        new = list(set(words) - self._known.keys())
        found = [tuple(encoding.ids) for encoding in backend.encode_batch_fast(new, add_special_tokens=False)]
        here = dict(zip(new, found, strict=True))
        ids = [*itertools.chain.from_iterable(here[word] if word in here else self._known[word] for word in words)]
        if len(self._known) + len(here) > REMEMBERED:
            self._known.clear()
        self._known.update((word, its_ids) for word, its_ids in here.items() if len(word) <= LONGEST)
        return ids


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that cuts a text into words, if it and the byte level are all there is."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if not steps:
        return None
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return GPT2 if last["use_regex"] else None
    (split,) = before
    if last["use_regex"] or split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return split["pattern"].get("Regex")
