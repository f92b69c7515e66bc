"""Which rank has which rows, whatever else the ranks divide."""

import pytest
import torch

from bigtrain.data.batches import Batches, held_out_batches
from bigtrain.parallel.dims import ParallelDims
from tests.unit.test_batches import NAMES, stores  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("layout", "size", "replicate", "expected"),
    [
        ("ddp", 3, 1, (3, 1)),
        ("fsdp", 4, 1, (1, 4)),
        ("fsdp", 4, 2, (2, 2)),
        ("zero3", 3, 1, (1, 3)),
        ("ddp", 1, 1, (1, 1)),
    ],
)
def test_each_rank_of_a_layout_has_rows_of_its_own(layout, size, replicate, expected):
    all_dims = [ParallelDims.of(layout, rank, size, replicate) for rank in range(size)]
    assert {(dims.replicate, dims.shard) for dims in all_dims} == {expected}
    assert [dims.data_rank for dims in all_dims] == list(range(size))
    assert {dims.data_size for dims in all_dims} == {dims.world_size for dims in all_dims} == {size}
    assert [dims.copy for dims in all_dims] == [rank // expected[1] for rank in range(size)]


def test_the_ranks_that_divide_layers_have_the_same_rows(stores):  # noqa: F811
    """Four ranks as 2 x 2: two shares of each batch, each on two ranks, in training and in evaluation."""
    all_dims = [ParallelDims(rank, replicate=1, shard=2, tensor=2) for rank in range(4)]
    assert [(dims.data_rank, dims.data_size, dims.world_size) for dims in all_dims] == [
        (0, 2, 4),
        (0, 2, 4),
        (1, 2, 4),
        (1, 2, 4),
    ]
    shares = [{"data_rank": dims.data_rank, "data_size": dims.data_size} for dims in all_dims]
    training = [
        Batches(stores, None, seed=0, global_batch_size=7, total_samples=70, **share)(3).tensors for share in shares
    ]
    evaluating = [next(held_out_batches(stores, 7, None, **share)).tensors for share in shares]
    for tensors in (training, evaluating):
        for name in NAMES:
            assert torch.equal(tensors[0][name], tensors[1][name])
            assert torch.equal(tensors[2][name], tensors[3][name])
            assert len(tensors[0][name]) + len(tensors[2][name]) == 7
        assert not torch.equal(tensors[0]["input_ids"][:1], tensors[2]["input_ids"][:1])
