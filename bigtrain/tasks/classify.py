"""Classification of texts: one label for each row, an encoder or a causal model with a new head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.data.files import Row, Unusable
from bigtrain.data.types import IGNORE, Answer, Document, Layout
from bigtrain.errors import DataError, nearest


class Classify:
    """Rows with `text` (and `text_pair`) and a `label`, which is one of `labels`; the loss is cross-entropy over rows.

    labels: the names of the classes, as the data has them, in the order of the model's outputs.
    """

    model_kind = "sequence_classification"
    sums_over: Literal["tokens", "rows"] = "rows"
    layout = "rows"
    encoding = "classify-1"
    columns = (("text", "text_pair", "label"), ("text", "label"))
    store_columns: Mapping[str, str] = MappingProxyType({"targets": "int64"})

    def __init__(self, labels: list[str]):
        self.labels = labels
        self._ids = {label: number for number, label in enumerate(labels)}

    @property
    def model_values(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self._ids),
            "problem_type": "single_label_classification",
        }

    def encode(self, rows: list[Row], tokenizer: Any, layout: Layout) -> list[Answer]:
        """A document for each row, with the special tokens that the tokenizer puts around a text or a pair; longer ones
        lose their end, and the tokens before it stay. Unusable for a row whose label is none of `labels`."""
        longest = layout.sequence_length
        pairs = [row.get("text_pair") for row in rows]
        ids = [tokenizer(row["text"], pair, verbose=False)["input_ids"] for row, pair in zip(rows, pairs, strict=True)]
        answers: list[Answer] = []
        for row, pair, whole in zip(rows, pairs, ids, strict=True):
            if (target := self._ids.get(row["label"])) is None:
                wrong = f"{row['where']}: the label is `{row['label']}`; {nearest(row['label'], self.labels)}"
                answers.append(Unusable("with a label that is none of `labels`", wrong))
                continue
            kept = whole
            if longest is not None and len(whole) > longest:
                kept = tokenizer(row["text"], pair, truncation=True, max_length=longest)["input_ids"]
            answers.append([Document(kept, None, {"targets": target}, len(whole) - len(kept))])
        return answers

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """The number of rows with a label."""
        return (batch["targets"] != IGNORE).sum()

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each row (nats, fp32)."""
        return F.cross_entropy(logits.float(), batch["targets"], ignore_index=IGNORE, reduction="none")

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """Cross-entropy summed over the rows (nats, fp32); outside training also `confusion`, (labels, labels): how
        many rows of each label (first index) were taken for each (second index)."""
        logits, targets = logits.float(), batch["targets"]
        sums = {"loss": F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")}
        if not training:
            size = len(self.labels)
            which = torch.where(targets == IGNORE, size * size, targets * size + logits.argmax(-1))
            sums["confusion"] = torch.bincount(which, minlength=size * size + 1)[:-1].view(size, size)
        return sums

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """loss: nats per row. accuracy: part of the rows that are right. macro_f1: the mean over the labels of
        2 TP / (2 TP + FP + FN), 0 for a label that neither stands in the data nor was predicted, as scikit-learn's
        `f1_score(average="macro", zero_division=0)` over all labels. targets: number of rows."""
        confusion = sums["confusion"]
        rows, right = confusion.sum().item(), confusion.diagonal()
        both = confusion.sum(0) + confusion.sum(1)  # 2 TP + FP + FN
        f1 = torch.where(both > 0, 2 * right / both.clamp(min=1), 0.0)
        return {
            "loss": sums["loss"].item() / rows if rows else math.nan,
            "accuracy": right.sum().item() / rows if rows else math.nan,
            "macro_f1": f1.mean().item(),
            "targets": int(rows),
        }


def check_labels(labels: list[str]) -> None:
    """Raises DataError unless there are two or more different ones."""
    if len(set(labels)) < max(2, len(labels)):
        raise DataError("labels: give two or more names, each once.")
