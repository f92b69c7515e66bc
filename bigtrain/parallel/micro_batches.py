"""A rank's rows of a global batch as micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bigtrain.data.batches import Batch
from bigtrain.data.types import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DUMMY = {"targets": IGNORE, "attention_mask": 1}  # values of dummy rows; of other tensors 0
CU_SEQLENS = "cu_seqlens"  # of documents, in a micro-batch for flash attention


def micro_batches(
    batch: Batch, size: int, data_size: int, *, fixed: bool = False, cu_seqlens: bool = False
) -> list[dict[str, Tensor]]:
    """Split a rank's rows into micro-batches: as many, of the same shape, on every rank.

    With fewer rows per rank than `size`, micro-batches shrink to what the fullest rank has, unless the shape is
    `fixed`, as for a compiled module. With `cu_seqlens` micro-batches that have positions get the entry CU_SEQLENS:
    where documents begin in their rows laid end to end, and where the last one ends, int32.
    """
    fullest = -(-batch.rows // data_size)
    size = size if fixed else min(size, fullest)
    count = -(-fullest // size)
    tensors = {key: _padded(key, tensor, count * size) for key, tensor in batch.tensors.items()}
    micros = [{key: tensor[i * size : (i + 1) * size] for key, tensor in tensors.items()} for i in range(count)]
    if cu_seqlens and "position_ids" in tensors:
        for micro in micros:
            begins = (micro["position_ids"].flatten() == 0).nonzero().flatten()
            end = begins.new_tensor([micro["position_ids"].numel()])
            micro[CU_SEQLENS] = torch.cat([begins, end]).to(torch.int32)
    return micros


def micro_batch_shape(model: PreTrainedModel, compile: bool) -> dict[str, bool]:
    """What `micro_batches` has to mind for a model."""
    return {"fixed": compile, "cu_seqlens": model.config._attn_implementation == "flash_attention_2"}


def _padded(key: str, tensor: Tensor, rows: int) -> Tensor:
    """With dummy rows at the end, which have no targets."""
    missing, shape = rows - tensor.shape[0], tensor.shape[1:]
    if missing == 0:
        return tensor
    if key == "position_ids":
        dummy = torch.arange(shape[0], dtype=tensor.dtype).expand(missing, -1)
    else:
        dummy = tensor.new_full((missing, *shape), DUMMY.get(key, 0))
    return torch.cat([tensor, dummy])
