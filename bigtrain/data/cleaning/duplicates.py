"""Documents that have been there before, and training documents that held-out ones give away."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.clean import Leakage, NearDuplicates
from bigtrain.data.cleaning.ngrams import Hashes

BATCH = 8192  # shingles whose permutations are in memory at once
# Candidates are sought below the threshold and with more regard to pairs that are missed than to others that meet in
# vain, which only cost a look at their signatures: at a threshold of 0.8, 1 % of the pairs that reach it are missed.
CANDIDATES, WEIGHTS = 0.9, (0.1, 0.9)
COMMON = 10  # runs of words that stand in more training documents than these, or in a small sample in more than a tenth
FEW = 3  # of it but at least in more than these, are common: they tell nothing of leakage
COPY = 0.8  # of all runs of two documents, each way: one is a copy of the other, whatever others share with them


class ExactIndex:
    """Texts seen so far, by a hash. Memory: about 150 bytes a text."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}

    def first(self, number: int, text: str) -> int | None:
        """The number of the first text that was the same but for runs of white space and the Unicode form (NFC)."""
        normal = " ".join(unicodedata.normalize("NFC", text).split())
        digest = hashlib.blake2b(normal.encode(errors="surrogatepass"), digest_size=16).digest()
        first = self._seen.setdefault(digest, number)
        return None if first == number else first


class NearIndex:
    """Signatures of the documents kept so far: Broder 1997, "On the resemblance and containment of documents".

    Locality-sensitive hashing finds candidates, the signatures' agreement decides: an estimate of the Jaccard
    similarity with a standard error of at most 0.5 / sqrt(permutations). Memory: 7 kB a document with 128 permutations.
    """

    def __init__(self, settings: NearDuplicates):
        from datasketch import MinHash, MinHashLSH

        count = settings.permutations
        self._threshold = settings.threshold
        self._empty = MinHash(count, seed=1, hashfunc=_itself, scheme="affine32")
        self._index = MinHashLSH(CANDIDATES * settings.threshold, count, weights=WEIGHTS)
        self._signatures: dict[int, NDArray[np.uint32]] = {}

    def nearest(self, number: int, shingles: Hashes) -> tuple[int, float] | None:
        """(number, similarity) of the most similar document kept before, where it reaches the threshold; of several
        the first. A document without one is kept."""
        signature: Any = self._empty.copy()
        for i in range(0, len(shingles), BATCH):
            signature.update_batch((shingles[i : i + BATCH] & np.uint64(0xFFFFFFFF)).tolist())
        values = signature.hashvalues
        agreements = [(-float((self._signatures[c] == values).mean()), c) for c in self._index.query(signature)]
        if agreements and -min(agreements)[0] >= self._threshold:
            consistency, nearest = min(agreements)
            return nearest, -consistency
        self._index.insert(number, signature, check_duplication=False)
        self._signatures[number] = values
        return None


class LeakageIndex:
    """The held-out documents' runs of words. Memory: 13 bytes a held-out word.

    Shared n-grams tell contamination as in Brown et al. 2020, "Language Models are Few-Shot Learners",
    arXiv:2005.14165, appendix C, which passes over n-grams of more than ten training documents too: they are common
    phrases and boilerplate. Their share in one of the two documents is its containment (Broder 1997).
    """

    def __init__(self, settings: Leakage, held_out: Iterable[Hashes], sample: Iterable[Hashes] = ()):
        """sample: of training documents, by which it is told what many of them share."""
        documents = list(held_out)
        self._overlap = settings.overlap
        self._sizes = np.array([len(shingles) for shingles in documents], dtype=np.int64)
        owners = np.repeat(np.arange(len(documents), dtype=np.int32), self._sizes)
        shingles = np.concatenate([np.empty(0, dtype=np.uint64), *documents])
        order = np.argsort(shingles, kind="stable")
        self._shingles, self._owners = shingles[order], owners[order]
        self._common = self._shared(sample)
        self._own_sizes = np.bincount(self._owners[~self._common], minlength=len(documents))
        self._counted = self._own_sizes >= settings.min_runs

    @property
    def uncounted(self) -> int:
        """Held-out documents of which too little is their own."""
        return int((~self._counted).sum())

    def _shared(self, sample: Iterable[Hashes]) -> NDArray[np.bool_]:
        """Of each run, whether more training documents than a few have it."""
        met, documents = np.zeros(len(self._shingles), dtype=np.int32), 0
        for shingles in sample:
            met[self._places(shingles)[0]] += 1
            documents += 1
        return met > min(COMMON, max(FEW, documents // COMMON))

    def _places(self, shingles: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(where in the index, which of the shingles) of all that are there."""
        begins = np.searchsorted(self._shingles, shingles, "left")
        counts = np.searchsorted(self._shingles, shingles, "right") - begins
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        return np.repeat(begins, counts) + within, np.repeat(np.arange(len(shingles)), counts)

    def leaked(self, shingles: Hashes) -> tuple[int, float] | None:
        """(number of the held-out document, overlap) for a document that shares `overlap` of its own n-grams with
        held-out documents, or has that part of the n-grams of one of them, those that many share left out; or that is
        a copy of one, all n-grams counted. None for any other."""
        places, mine = self._places(shingles)
        if len(places) == 0:
            return None
        owners, own = self._owners[places], ~self._common[places]
        met, met_own = (np.bincount(o, minlength=len(self._sizes)) for o in (owners, owners[own]))
        of_theirs = np.where(self._counted, met_own / np.maximum(self._own_sizes, 1), 0.0)
        document, overlap = int(of_theirs.argmax()), float(of_theirs.max())
        known, shared = (len(np.unique(mine[chosen])) for chosen in (own, ~own))
        of_mine = known / max(1, len(shingles) - shared)
        if of_mine > overlap:
            document, overlap = int(met_own.argmax()), of_mine
        if overlap < self._overlap:
            both = np.minimum(met / np.maximum(self._sizes, 1), met / len(shingles))
            if both.max() >= COPY:
                document, overlap = int(both.argmax()), float(both.max())
        return (document, overlap) if overlap >= self._overlap else None

    def runs_of(self, document: int) -> Hashes:
        """Those of a held-out document that count."""
        return np.unique(self._shingles[(self._owners == document) & ~self._common])


def _itself(value: int) -> int:
    return value
