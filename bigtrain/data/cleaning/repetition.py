"""Texts that repeat themselves, told by the filters of Gopher."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.clean import Repetition
from bigtrain.data.cleaning.drops import Drop
from bigtrain.data.cleaning.ngrams import hash_words, ngrams
from bigtrain.data.cleaning.texts import is_unspaced

TOP = (2, 3, 4)  # lengths in words of `top_ngrams`
DUPLICATE = (5, 6, 7, 8, 9, 10)  # and of `duplicate_ngrams`
CHARACTERS = 2  # of a word in scripts without spaces, about: in Chinese most words have two


def too_repetitive(text: str, words: list[str], limits: Repetition) -> Iterator[Drop]:
    """The filters that a text fails, each found when it is asked for.

    The filters of Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
    arXiv:2112.11446, appendix A.1.1, table A1. What has stood in the text before counts as a duplicate. An n-gram
    is repeated from its second occurrence on: a text in which nothing occurs twice passes all of them.

    Their limits are those of texts with spaces and of some length. Where most words are characters of a script without
    spaces, CHARACTERS of them count as a word. Below `min_words` the limits rise, in a straight line to 1 at no words:
    in a text of one sentence a word that occurs twice is much of it.
    """
    unspaced = 2 * sum(map(is_unspaced, words)) > len(words)
    scale = CHARACTERS if unspaced else 1
    room = max(0.0, 1 - len(words) / scale / limits.min_words)
    for reason, key, limit, value in _measured(text, words, limits, scale):
        raised = limit + (1 - limit) * room
        if value > raised:
            yield Drop(reason, f"repetition.{key}", round(value, 4), round(raised, 4))


def _measured(text: str, words: list[str], limits: Repetition, scale: int) -> Iterator[tuple[str, str, float, float]]:
    """(reason, key, limit, value) of each filter that is on."""
    for name, parts in (("lines", text.split("\n")), ("paragraphs", re.split(r"\n[^\S\n]*\n", text))):
        by_number, by_characters = _duplicates(parts)
        of_number, of_characters = f"duplicate_{name}", f"duplicate_{name[:-1]}_characters"
        if (limit := getattr(limits, of_number)) is not None:
            yield f"duplicate {name}", of_number, limit, by_number
        if (limit := getattr(limits, of_characters)) is not None:
            yield f"characters in duplicate {name}", of_characters, limit, by_characters
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    hashes = hash_words(words)
    for n, limit in zip(TOP, limits.top_ngrams or (), strict=False):
        top = _top_share(ngrams(hashes, n * scale), lengths, n * scale)
        yield f"most frequent {n}-gram", "top_ngrams", limit, top
    for n, limit in zip(DUPLICATE, limits.duplicate_ngrams or (), strict=False):
        share = _duplicate_share(ngrams(hashes, n * scale), lengths, n * scale)
        yield f"duplicate {n}-grams", "duplicate_ngrams", limit, share


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """The share of the parts that stood there before, in number and in characters; blank ones do not count."""
    parts = [part.strip() for part in parts if not part.isspace() and part]
    if not parts:
        return 0.0, 0.0
    distinct = dict.fromkeys(parts)
    return 1 - len(distinct) / len(parts), 1 - sum(map(len, distinct)) / sum(map(len, parts))


def _top_share(grams: NDArray[np.uint64], lengths: NDArray[np.int64], n: int) -> float:
    """The share of the words' characters in the most frequent n-gram; of equally frequent ones in the largest."""
    if len(grams) == 0:
        return 0.0
    _, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
    most = int(counts.max())
    if most == 1:
        return 0.0
    tied = np.flatnonzero(counts == most)
    sizes = np.convolve(lengths, np.ones(n, dtype=np.int64), "valid")
    largest = np.zeros(len(counts), dtype=np.int64)
    np.maximum.at(largest, inverse, sizes)
    return _covered(inverse == tied[largest[tied].argmax()], lengths, n)


def _duplicate_share(grams: NDArray[np.uint64], lengths: NDArray[np.int64], n: int) -> float:
    """The share of the words' characters that lie in n-grams which stood there before, each character counted once."""
    if len(grams) == 0:
        return 0.0
    _, first, inverse = np.unique(grams, return_index=True, return_inverse=True)
    return _covered(first[inverse] != np.arange(len(grams)), lengths, n)


def _covered(begins: NDArray[np.bool_], lengths: NDArray[np.int64], n: int) -> float:
    """The share of the characters that lie in one of the n-grams which begin where `begins` says."""
    steps = np.zeros(len(lengths) + 1, dtype=np.int64)
    starts = np.flatnonzero(begins)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + n, -1)
    inside = steps.cumsum()[:-1] > 0
    return float(lengths[inside].sum() / lengths.sum())
