"""Degrees of parallelism: how the ranks of a world divide the work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ParallelDims:
    """A world of replicate x shard x tensor ranks, the last one counted fastest, and this rank's place in it.

    replicate: copies of the model. shard: ranks that divide the parameters of a copy, each with rows of its own.
    tensor: ranks that divide each layer's work on the same rows.
    """

    rank: int
    replicate: int
    shard: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, layout: str, rank: int, world_size: int, replicate: int = 1) -> ParallelDims:
        """Those of a value of `parallel.engine`; replicate: copies of a sharded model (fsdp only)."""
        copies = world_size if layout == "ddp" else replicate
        return cls(rank, copies, world_size // copies)

    @property
    def world_size(self) -> int:
        return math.prod((self.replicate, self.shard, self.tensor))

    @property
    def data_rank(self) -> int:
        """Which share of a global batch this rank has."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is divided."""
        return self.replicate * self.shard

    @property
    def copy(self) -> int:
        """Which copy of the model this rank has a part of."""
        return self.data_rank // self.shard

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks as a mesh (replicate, shard), over which FSDP2 lays a model; collective."""
        from torch.distributed.device_mesh import init_device_mesh

        assert self.tensor == 1, "no engine divides layers"
        return init_device_mesh(device_type, (self.replicate, self.shard), mesh_dim_names=("replicate", "shard"))
