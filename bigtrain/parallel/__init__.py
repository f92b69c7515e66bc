"""The step contract and its two engines. Layouts are their presets, by the name in `parallel.engine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bigtrain.config.schema import Optimizer
    from bigtrain.parallel.contract import Engine
    from bigtrain.tasks import Task


def build_engine(
    layout: str,
    build_model: Callable[..., PreTrainedModel],
    task: Task,
    *,
    replicate: int,
    precision: str,
    compile: bool,
    micro_batch_size: int,
    optimizer: Optimizer,
    seed: int,
    device: torch.device,
) -> Engine:
    """The engine that `parallel.engine` names, over all ranks of the process group. Its weights are still to be loaded.

    `build_model(meta=...)` gives the model; `replicate` is the number of copies of a sharded model (fsdp only).
    """
    common: dict[str, Any] = {
        "precision": precision,
        "compile": compile,
        "micro_batch_size": micro_batch_size,
        "optimizer": optimizer,
        "seed": seed,
        "device": device,
    }
    if layout in ("ddp", "fsdp"):
        from bigtrain.parallel.mesh import MeshEngine

        shard = 1 if layout == "ddp" else dist.get_world_size() // replicate
        return MeshEngine(partial(build_model, meta=True), task, shard=shard, **common)

    from bigtrain.parallel.zero import ZeroEngine

    return ZeroEngine(build_model, task, stage=int(layout.removeprefix("zero")), **common)
