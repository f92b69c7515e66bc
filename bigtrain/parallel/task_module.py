"""Model and task as one module: batch in, sums out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.models.architecture import compile_layers
from bigtrain.models.families import plain_head
from bigtrain.models.head import GradientSum, use_in_chunks
from bigtrain.models.linear import SLOW_DTYPES, linear, make_fast
from bigtrain.parallel.micro_batches import CU_SEQLENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bigtrain.tasks import Task

LOGITS_AT_ONCE = 2**26  # elements of logits that exist at once: 256 MiB in fp32


class TaskModule(nn.Module):
    """Model and task as one module, so that an engine owns forward and backward: batch in, sums out.

    Where task and architecture allow it (`sums_over`, `plain_head`), logits are made for as many tokens at a time as
    LOGITS_AT_ONCE says, thrown away, and made again in the backward pass. The number of such chunks follows from shapes
    alone, so it is the same on all ranks. The gradient of the head's parameters is summed over them in fp32, which
    takes one buffer of their size. With `compile`, layers and loss are compiled. `device`: where it will compute.
    """

    def __init__(self, model: PreTrainedModel, task: Task, device: torch.device, compile: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        self._token_sums = _token_sums
        if device.type == "cpu" and SLOW_DTYPES:
            make_fast(model)
        head = self._plain_head = plain_head(model) if task.sums_over == "tokens" else None
        if head is not None:
            use_in_chunks(head)
        if compile:
            compile_layers(model)
            self._token_sums = torch.compile(_token_sums, fullgraph=True, dynamic=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.task.inputs(batch)
        if CU_SEQLENS in batch:
            inputs |= _one_row(batch)
            batch = {key: tensor for key, tensor in batch.items() if key != CU_SEQLENS}
        head = self._plain_head
        if head is None:
            return self.task.sums(self.model(**inputs).logits, batch, training=self.training)
        hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)
        chunks = hidden.chunk(-(-hidden.shape[0] * self.model.config.vocab_size // LOGITS_AT_ONCE))
        if len(chunks) == 1:
            return self._token_sums(head, self.task, hidden, batch, self.training)
        pieces = {key: tensor.flatten().chunk(len(chunks)) for key, tensor in batch.items()}
        sums_of = self._sums_of_chunks(head, len(chunks))
        totals: dict[str, Tensor] = {}
        for i, tokens in enumerate(chunks):
            piece = {key: tensors[i] for key, tensors in pieces.items()}
            sums = checkpoint(sums_of, tokens, piece, use_reentrant=False, preserve_rng_state=False)
            totals = {key: totals[key] + value for key, value in sums.items()} if totals else sums
        return totals

    def _sums_of_chunks(self, head: nn.Module, chunks: int) -> Callable[..., dict[str, Tensor]]:
        """The function of (hidden, batch) that gives the sums of each of `chunks` chunks."""
        parameters = list(head.parameters())
        if parameters[0].dtype == torch.float32:
            return lambda hidden, batch: self._token_sums(head, self.task, hidden, batch, self.training)
        gradients = [GradientSum(chunks) for _ in parameters]

        def sums(hidden: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            def then(hidden: Tensor, *parameters: Tensor) -> dict[str, Tensor]:
                shared = [gradient.of(p) for gradient, p in zip(gradients, parameters, strict=True)]
                return self._token_sums(None, self.task, hidden, batch, self.training, shared)

            result: dict[str, Tensor] = head(hidden, then)
            return result

        return sums


def _one_row(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments that differ when flash attention reads all rows as one, told apart by the documents' borders
    (without these transformers looks at restarting positions in batches of one row only)."""
    longest = batch["input_ids"].shape[1]
    return {
        "input_ids": batch["input_ids"].reshape(1, -1),
        "position_ids": batch["position_ids"].reshape(1, -1),
        "cu_seq_lens_q": batch[CU_SEQLENS],
        "cu_seq_lens_k": batch[CU_SEQLENS],
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _token_sums(
    head: nn.Module | None,
    task: Task,
    hidden: Tensor,
    batch: dict[str, Tensor],
    training: bool,
    parameters: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """The task's sums over some tokens, from their last hidden states, by a head or with its parameters."""
    logits = linear(hidden, *parameters) if head is None else head(hidden)
    return task.sums(logits, batch, training=training)
