"""Runs of n words as 64-bit numbers: the same on every machine, and made by arrays."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word is lost modulo 2**64


def hash_words(words: list[str]) -> Hashes:
    """One number per word."""
    return np.fromiter(map(_word, words), dtype=np.uint64, count=len(words))


def ngrams(hashes: Hashes, n: int) -> Hashes:
    """One number per run of n words, in their order: a polynomial of the words' hashes, mixed.

    Karp & Rabin 1987, "Efficient randomized pattern-matching algorithms"; the mixing is the end of MurmurHash3.
    """
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        total = total * BASE + hashes[i : i + count]
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        total = (total ^ (total >> np.uint64(33))) * np.uint64(multiplier)
    return total ^ (total >> np.uint64(33))


def shingles(words: list[str], text: str, n: int) -> Hashes:
    """The distinct runs of n words of a text (w-shinglings of Broder 1997), sorted; a shorter text is one run."""
    hashes = hash_words(words or [text.strip()])
    return np.unique(ngrams(hashes, min(n, len(hashes))))


def hash_text(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


_word = lru_cache(maxsize=1 << 18)(hash_text)
