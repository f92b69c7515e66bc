"""The pieces of a step that all engines share."""

import torch

from bigtrain.data.batches import Batch
from bigtrain.data.types import IGNORE
from bigtrain.parallel.engine import seed_dropout
from bigtrain.parallel.micro_batches import micro_batches


def test_every_rank_runs_the_same_shapes():
    for rows in range(1, 12):
        for world in (1, 2, 3, 4):
            for size in (1, 2, 8):
                shapes = set()
                supervised = 0
                for rank in range(world):
                    mine = (rank + 1) * rows // world - rank * rows // world
                    tensors = {key: torch.ones(mine, 5, dtype=torch.long) for key in ("input_ids", "targets")}
                    tensors["position_ids"] = torch.arange(5).expand(mine, 5)
                    micros = micro_batches(Batch(tensors, rows, step=0), size, world)
                    shapes.add(tuple(micro["input_ids"].shape for micro in micros))
                    supervised += sum((micro["targets"] != IGNORE).sum().item() for micro in micros)
                    assert all(
                        micro["position_ids"].equal(tensors["position_ids"][:1].expand_as(micro["position_ids"]))
                        for micro in micros
                        if mine
                    )
                assert len(shapes) == 1
                assert supervised == rows * 5


def test_dropout_differs_by_step_and_rank_and_takes_any_seed():
    drawn = set()
    for seed, step, rank in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**31 - 1, 10**7, 4095)):
        seed_dropout(seed, step, rank)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 5
    seed_dropout(0, 1, 0)
    assert torch.rand(()).item() in drawn
