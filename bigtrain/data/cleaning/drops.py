"""Why a document is dropped, and what of `clean` is to be changed for most of the dropped ones to stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bigtrain.config.schema import CleanConfig

ADVISED = 1000  # dropped documents of which all that would drop them is found out, to give advice that works
MUCH = 0.3  # a larger part of the training documents dropped is worth a warning
SWITCHES = {"exact_duplicates": "false"}  # key of `clean` -> the value that turns it off, where that is not null


@dataclass(frozen=True)
class Drop:
    """reason: in words. key: of `clean`, dotted; what it holds turns the reason on. value: what was measured; limit:
    what it is compared with, None where there is no measure. of: the document that it is like."""

    reason: str
    key: str
    value: float | None = None
    limit: float | None = None
    of: str | None = None


class Advice:
    """Collects what would drop each of the first dropped documents."""

    def __init__(self) -> None:
        self._keys: Counter[frozenset[str]] = Counter()

    @property
    def collects(self) -> bool:
        return self._keys.total() < ADVISED

    def add(self, drops: Iterable[Drop]) -> None:
        self._keys[frozenset(drop.key for drop in drops)] += 1

    def changes(self, clean: CleanConfig) -> dict[str, str]:
        """Key of `clean` -> value, for the fewest keys found with which at least half of the dropped documents stay;
        the key is empty where that leaves nothing of `clean`."""
        chosen: set[str] = set()
        while sum(n for keys, n in self._keys.items() if keys <= chosen) * 2 < self._keys.total():
            left = Counter[str]()
            for keys, number in self._keys.items():
                left.update(dict.fromkeys(keys - chosen, number))
            chosen.add(max(left, key=lambda key: (left[key], key)))
        steps = {key.partition(".")[0] for key in chosen if "." not in key}
        if all(name in steps or value in (None, False, []) for name, value in clean if name != "phone_region"):
            return {"": "null"}
        return {key: SWITCHES.get(key, "null") for key in sorted(chosen)}


def overrides(stage: str, changes: dict[str, str]) -> str:
    """As they are written on the command line."""
    return " ".join(f"stages.{stage}.clean{'.' * bool(key)}{key}={value}" for key, value in changes.items())
