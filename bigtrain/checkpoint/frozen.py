"""The weights of a stage that do not train: written once, where each of its checkpoints finds them.

STAGE/frozen/step-00000000/    a checkpoint of these weights alone, with the numbers that the stage began with
STAGE/checkpoints/step-*/      all else; their manifests say that there are frozen weights beside them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from bigtrain.checkpoint.format import frozen_folder
from bigtrain.checkpoint.retention import Retention
from bigtrain.checkpoint.save import save
from bigtrain.distributed.collectives import read_together
from bigtrain.state import WEIGHT, Box, Shape, StateReader


def save_frozen(checkpoints: Path, shapes: Mapping[str, Shape], reader: StateReader) -> None:
    """Write the weights of these shapes as `reader` has them, to the last bit; collective.

    Raises CheckpointError as the reader does, and when they cannot be written.
    """
    boxes: list[Box] = []

    def read() -> None:
        """Whole tensors, the ranks in turn."""
        for name, shape in list(shapes.items())[dist.get_rank() :: dist.get_world_size()]:
            zeros = (0,) * len(shape)
            boxes.append(Box(name, WEIGHT, shape, zeros, reader.read(name, WEIGHT, zeros, shape).contiguous()))

    read_together(read)
    save(frozen_folder(checkpoints).parent, 0, boxes, {}, Retention(keep=1))
