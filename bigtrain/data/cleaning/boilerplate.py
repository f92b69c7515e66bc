"""Lines that many documents of a source share: headers, footers, navigation, licences."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bigtrain.config.clean import Boilerplate
from bigtrain.data.cleaning.ngrams import hash_text
from bigtrain.data.cleaning.texts import lines_of, words

SAMPLED = 2000  # documents of a stage that are looked at, drawn evenly; at least LEAST of each source
LEAST = 200
ENDS = 10_000  # characters of a sampled document that are looked at, from its beginning and from its end
FEW = 3  # documents: lines that no more than these share are never boilerplate


@dataclass(frozen=True)
class SharedLines:
    """hashes: of the lines. named: (line, how many of the sampled documents have it), the most frequent first.
    sampled: documents looked at."""

    hashes: frozenset[int]
    named: list[tuple[str, int]]
    sampled: int


NOTHING_SHARED = SharedLines(frozenset(), [], 0)


def draw(texts: Iterable[str], sources: int) -> list[str]:
    """Some of the texts of one of so many sources, each as likely as any other, and the same ones each time (Vitter
    1985, "Random Sampling with a Reservoir", algorithm R); of long ones the beginning and the end."""
    size, rng = max(LEAST, SAMPLED // sources), random.Random(0)  # noqa: S311 - no secret depends on it
    drawn: list[str] = []
    for number, text in enumerate(texts):
        place = number if number < size else rng.randrange(number + 1)
        if place < size:
            drawn[place : place + 1] = [text if len(text) <= 2 * ENDS else f"{text[:ENDS]}\n{text[-ENDS:]}"]
    return drawn


def shared_lines(texts: list[str], settings: Boilerplate) -> SharedLines:
    """The lines of at least `words` words that stand in more than the part `documents` of the texts."""
    counts: Counter[int] = Counter()
    first: dict[int, str] = {}
    for text in texts:
        lines = {hash_text(line): line for line in lines_of(text) if line}
        counts.update(lines.keys())
        first = lines | first
    limit = max(FEW, settings.documents * len(texts))
    often = [(number, n) for number, n in counts.most_common() if n > limit]
    shared = [(number, n) for number, n in often if len(words(first[number])) >= settings.words]
    named = [(first[number], n) for number, n in shared]
    return SharedLines(frozenset(number for number, _ in shared), named, len(texts))
