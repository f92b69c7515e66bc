"""Classification of texts: one label for each row, an encoder or a causal model with a new head."""

from __future__ import annotations

import math
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from bigtrain.config.core import Broken, mathematics
from bigtrain.errors import nearest
from bigtrain.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.config.schema import RunConfig, StageConfig
    from bigtrain.data.files import Row
    from bigtrain.data.types import Answer, Layout


class Classify(Task):
    """Rows with `text` (and `text_pair`) and a `label`; the loss is cross-entropy over rows."""

    name: Literal["classify"] = mathematics(
        "One label for each text. Columns: `text`, `text_pair` if there is one, and `label`, a text or a number.",
        "classify",
    )
    labels: list[str] = mathematics(
        "The names of the classes, as the data has them, in the order of the model's outputs.", min_length=2
    )
    layout = "rows"
    encoding = "classify-1"
    columns = (("text", "text_pair?", "label"),)
    store_columns = MappingProxyType({"targets": "int64"})
    model_kind = "sequence_classification"
    sums_over = "rows"

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from super().check(run, stage)
        if twice := [label for i, label in enumerate(self.labels) if label in self.labels[:i]]:
            yield ("labels",), f"{twice[0]} is there twice; remove one."

    @property
    def model_values(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self._ids),
            "problem_type": "single_label_classification",
        }

    def encode(self, rows: list[Row], tokenizer: Any, layout: Layout | None = None) -> list[Answer]:
        """A document for each row, with the special tokens that the tokenizer puts around a text or a pair; longer ones
        lose their end, and the tokens before it stay. Unusable for a row whose label is none of `labels`."""
        from bigtrain.data.files import Unusable
        from bigtrain.data.types import Document

        longest = None if layout is None else layout.sequence_length
        texts = [(row["text"], row["text_pair"]) if row.get("text_pair") else row["text"] for row in rows]
        whole: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(whole) if longest is not None and len(ids) > longest]
        kept = dict(enumerate(whole))
        if long:
            cut = tokenizer([texts[i] for i in long], truncation=True, max_length=longest)["input_ids"]
            kept |= dict(zip(long, cut, strict=True))
        answers: list[Answer] = []
        for i, row in enumerate(rows):
            if (target := self._ids.get(row["label"])) is not None:
                answers.append([Document(kept[i], None, {"targets": target}, len(whole[i]) - len(kept[i]))])
                continue
            wrong = f"{row['where']}: the label is `{row['label']}`; {nearest(row['label'], self.labels)}"
            answers.append(Unusable("with a label that is none of `labels`", wrong))
        return answers

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """The number of rows with a label."""
        from bigtrain.data.types import IGNORE

        return (batch["targets"] != IGNORE).sum()

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each row (nats, fp32)."""
        import torch.nn.functional as F

        from bigtrain.data.types import IGNORE

        return F.cross_entropy(logits.float(), batch["targets"], ignore_index=IGNORE, reduction="none")

    def sums(self, logits: Tensor, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """Cross-entropy summed over the rows (nats, fp32); outside training also `confusion`, (labels, labels): how
        many rows of each label (first index) were taken for each (second index)."""
        import torch
        import torch.nn.functional as F

        from bigtrain.data.types import IGNORE

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
        import torch

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
