"""What a batch means: how rows become samples, the model's inputs, the loss as sums, the metrics."""

from __future__ import annotations

from bigtrain.tasks.base import Task
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.tasks.sft import Sft

TASKS: dict[str, type[Task]] = {"pretrain": Pretrain, "sft": Sft}
