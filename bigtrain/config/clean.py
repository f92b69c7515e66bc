"""How documents are cleaned before they are tokenized."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from bigtrain.config.core import Broken, Section, mathematics
from bigtrain.config.texts import REGION

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig, StageConfig

Share = Annotated[float, Field(ge=0, le=1)]


class Repetition(Section):
    """Limits above which a document is dropped; the defaults are Gopher's (Rae et al. 2021, table A1). In texts without
    spaces two characters count as a word."""

    duplicate_lines: Share | None = mathematics("Lines that stood there before, as a part of all; null: any.", 0.30)
    duplicate_line_characters: Share | None = mathematics("The same as a part of the characters; null: any.", 0.20)
    duplicate_paragraphs: Share | None = mathematics("Paragraphs that stood there before; null: any.", 0.30)
    duplicate_paragraph_characters: Share | None = mathematics("The same in characters; null: any.", 0.20)
    top_ngrams: list[Share] | None = mathematics(
        "Part of the characters in the most frequent run of 2, 3 and 4 words; null: any.",
        [0.20, 0.18, 0.16],
        min_length=3,
        max_length=3,
    )
    duplicate_ngrams: list[Share] | None = mathematics(
        "Part of the characters in runs of 5, 6, 7, 8, 9 and 10 words that stood there before; null: any.",
        [0.15, 0.14, 0.13, 0.12, 0.11, 0.10],
        min_length=6,
        max_length=6,
    )
    min_words: int = mathematics(
        "Words from which on a document is held to the limits; for shorter ones they rise, up to 1 for no words.",
        50,
        ge=1,
    )

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        if all(value is None for name, value in self if name != "min_words"):
            yield (), "has no limit, so it drops nothing; give one, or remove it."


class Boilerplate(Section):
    documents: float = mathematics(
        "Lines that stand in more than this part of a source's documents are cut from them.", 0.1, gt=0, le=1
    )
    words: int = mathematics(
        "Shorter lines stay, in words; a character of Chinese or Japanese is one.",
        5,
        ge=1,
    )


class NearDuplicates(Section):
    threshold: float = mathematics(
        "Estimated Jaccard similarity of the sets of runs of words from which on two documents are alike.",
        0.8,
        ge=0.1,
        le=1,
    )
    permutations: int = mathematics(
        "Numbers of a document's MinHash signature; the similarity's standard error is at most 0.5 / their root.",
        128,
        ge=16,
        le=4096,
    )
    words: int = mathematics("Words of a run; a character of Chinese or Japanese is one.", 5, ge=1)

    def check_here(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        if importlib.util.find_spec("datasketch") is None:
            yield (), "datasketch is not installed; `pip install 'bigtrain[clean]'`."


class Leakage(Section):
    words: int = mathematics("Words of the runs that training and held-out documents are compared by.", 13, ge=1)
    overlap: float = mathematics(
        "A training document is dropped if this part of its runs stands in held-out documents, or this part of the "
        "runs of one of them stands in it. Runs that many training documents share do not count.",
        0.5,
        gt=0,
        le=1,
    )
    min_runs: int = mathematics(
        "Held-out documents with fewer runs that are not shared by many do not count, but for copies of them.", 20, ge=1
    )


class CleanConfig(Section):
    repair: bool = mathematics("Undo mojibake, control characters and the like (ftfy).", False)
    normalize: Literal["NFC", "NFKC"] | None = mathematics("Unicode form of the texts; null: as they are.", None)
    redact: list[Literal["email", "phone", "card", "ip", "secret"]] = mathematics(
        "Kinds of personal data to replace by <EMAIL>, <PHONE>, <CARD>, <IP>, <SECRET> (keys and tokens).", []
    )
    phone_region: str | None = mathematics(
        "Country (ISO 3166, like US) whose phone numbers are known without a country code; null: none.",
        None,
        pattern=REGION,
    )
    boilerplate: Boilerplate | None = mathematics(
        "Cut lines that many documents of a source share: headers, footers, licences. With task pretrain. null: none.",
        None,
    )
    min_characters: int | None = mathematics("Shorter documents are dropped; null: none.", None, ge=1)
    max_characters: int | None = mathematics("Longer documents are dropped; null: none.", None, ge=1)
    repetition: Repetition | None = mathematics("Drop documents that repeat themselves; null: none.", None)
    exact_duplicates: bool = mathematics(
        "Drop documents that equal an earlier one of any source, but for white space.", False
    )
    near_duplicates: NearDuplicates | None = mathematics(
        "Drop documents that are like an earlier one of any source; null: none.", None
    )
    leakage: Leakage | None = mathematics("Drop training documents that held-out ones give away; null: none.", None)

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        if all(value in (None, False, []) for name, value in self if name != "phone_region"):
            yield (), "does nothing; turn a step on, like `exact_duplicates: true`, or remove it."
        if len(set(self.redact)) < len(self.redact):
            yield ("redact",), "names a kind twice; remove one."
        if self.phone_region is not None and "phone" not in self.redact:
            yield ("phone_region",), "is for `redact: [phone]`; add phone there, or remove it."
        least, most = self.min_characters, self.max_characters
        if least is not None and most is not None and least > most:
            yield ("min_characters",), f"{least} is more than max_characters ({most})."
        if self.boilerplate is not None and stage.task.layout != "windows":
            told = "what many conversations share is said by somebody: it is not cut from them; remove it."
            yield ("boilerplate",), told
        if self.leakage is not None and stage.evaluate is None:
            yield ("leakage",), "needs held-out documents; add `evaluate:`, or remove it."

    def check_here(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        if self.phone_region is not None:
            from phonenumbers import SUPPORTED_REGIONS

            if self.phone_region not in SUPPORTED_REGIONS:
                yield (
                    ("phone_region",),
                    f"{self.phone_region} is no country with phone numbers; write its ISO 3166 code, like US.",
                )
