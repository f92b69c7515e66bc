"""The step contract and its two engines. Layouts are their presets, by the name in `parallel.engine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bigtrain.optim import Optimizer
    from bigtrain.parallel.dims import ParallelDims
    from bigtrain.parallel.engine import Engine
    from bigtrain.tasks import Task


def build_engine(
    layout: str,
    build_model: Callable[..., PreTrainedModel],
    task: Task,
    *,
    dims: ParallelDims,
    precision: str,
    compile: bool,
    micro_batch_size: int,
    optimizer: Optimizer,
    seed: int,
    device: torch.device,
) -> Engine:
    """The engine that `parallel.engine` names, over all ranks of the process group. Its weights are still to be loaded.

    `build_model(meta=...)` gives the model; `dims` are the layout's.
    """
    common: dict[str, Any] = {
        "dims": dims,
        "precision": precision,
        "compile": compile,
        "micro_batch_size": micro_batch_size,
        "optimizer": optimizer,
        "seed": seed,
        "device": device,
    }
    if layout in ("ddp", "fsdp"):
        from bigtrain.parallel.mesh import MeshEngine

        return MeshEngine(partial(build_model, meta=True), task, **common)

    from bigtrain.parallel.zero import ZeroEngine

    return ZeroEngine(build_model, task, stage=int(layout.removeprefix("zero")), **common)
