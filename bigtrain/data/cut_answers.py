"""Answers that lose their end because their conversation is longer than a sequence: too many of them end the run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from math import sqrt
from typing import TYPE_CHECKING

from bigtrain.config.schema import StageConfig
from bigtrain.data.files import Row
from bigtrain.data.shards import text_bytes
from bigtrain.data.types import Answer
from bigtrain.data.writing import count_answers
from bigtrain.errors import DataError

if TYPE_CHECKING:
    from bigtrain.tasks import LongDocuments

SAMPLE_BYTES = 32_000_000  # of a source's text that a sample is drawn from
SAMPLE_ROWS = 300
FEWEST_ROWS = 50  # that tell something
DEVIATIONS = 5  # of the sample's share, by which it may be too high

Encode = Callable[[list[Row]], list[Answer]]


def check_sample(
    rows: Iterable[Row],
    expected_bytes: int | None,
    encode: Encode,
    stage: StageConfig,
    rule: LongDocuments,
    source: str,
) -> None:
    """Raises DataError if a sample shows that too many answers are cut, even if none are in what was not looked at.

    rows: all of a source; the first SAMPLE_BYTES are read. expected_bytes: of all, if that is known.
    """
    draws, seen, whole, sample = random.Random(0), 0, True, list[Row]()  # noqa: S311
    for number, row in enumerate(rows):
        if seen > SAMPLE_BYTES:
            whole = False
            break
        seen += text_bytes(row)
        if number < SAMPLE_ROWS:
            sample.append(row)
        elif (place := draws.randrange(number + 1)) < SAMPLE_ROWS:
            sample[place] = row
    looked_at = 1.0 if whole else min(1.0, seen / expected_bytes) if expected_bytes else 0.0
    if len(sample) < FEWEST_ROWS or not looked_at:
        return
    counted = [_counts([answer], stage.sequence_length) for answer in encode(sample)]
    answers, cut = (sum(numbers) for numbers in zip(*counted, strict=True))
    if not answers:
        return
    share = cut / answers
    deviation = sqrt(sum((c - share * a) ** 2 for a, c in counted)) / answers
    if looked_at * (share - DEVIATIONS * deviation) > rule.max_cut_answers:
        what = f"about {share:.0%} of the answers (of {len(sample)} rows that were looked at)"
        raise DataError(_told(source, what, "", stage, rule))


def check_count(
    answers: int, cut: int, rows: Iterable[Row], encode: Encode, stage: StageConfig, rule: LongDocuments, source: str
) -> None:
    """Raises DataError if too many of a source's answers are cut, naming the first row that has such a one."""
    if cut <= rule.max_cut_answers * answers:
        return
    first = next(row["where"] for row in rows if _counts(encode([row]), stage.sequence_length)[1])
    raise DataError(_told(source, f"{cut} of {answers} answers", f"; the first is in {first}", stage, rule))


def _counts(found: list[Answer], length: int) -> tuple[int, int]:
    """(answers, those that are cut) of rows."""
    masks = [each.loss_mask or () for answer in found if isinstance(answer, list) for each in answer]
    return sum(map(count_answers, masks)), sum(count_answers(mask, length + 1) for mask in masks)


def _told(source: str, what: str, where: str, stage: StageConfig, rule: LongDocuments) -> str:
    here = f"stages.{stage.name}"
    ways = {"split": "`split` (several documents of each)", "drop": "`drop` (leave them out)"}
    others = " or ".join(told for way, told in ways.items() if way != rule.way)
    return (
        f"{source}: {what} lose their end, since their conversations are longer than sequence_length "
        f"({stage.sequence_length} tokens){where}. The model would not learn where they end: raise "
        f"{here}.sequence_length, set {here}.task.long_conversations to {others}, or allow more with "
        f"{here}.task.max_cut_answers ({rule.max_cut_answers})."
    )
