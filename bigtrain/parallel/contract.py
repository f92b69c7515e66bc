"""The step contract: what every engine promises, and the pieces of a step that all engines share.

- Targets are counted and summed over the ranks before the first backward.
- Every rank runs the same number of micro-batches of the same shape; missing rows are dummies without targets.
- Gradients are those of (sum of the loss over the global batch) / (targets in the global batch).
- The gradient norm is the global one, before clipping.
- bf16 and fp16 cast the parameters for forward and backward; master weights, moments, gradient
  accumulation, reduction and loss are fp32. No autocast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.data.batches import IGNORE, Batch
from bigtrain.errors import CheckpointError
from bigtrain.models.causal_lm import compile_layers, plain_head
from bigtrain.models.head import GradientSum, use_in_chunks
from bigtrain.models.linear import SLOW_DTYPES, linear, make_fast
from bigtrain.state import BUFFER, WEIGHT, Box, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bigtrain.tasks import Task

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Say(NamedTuple):
    """What a rank has to say to all others in a step.

    stop, save: it was asked to stop, to save. busy: it is still writing a checkpoint.
    """

    stop: bool = False
    save: bool = False
    busy: bool = False


class Outcome(NamedTuple):
    """What a step did, the same on every rank; scalars on the engine's device, read by the host when it likes.

    loss: mean over the supervised targets of the global batch, float64.
    targets: their number, float64.
    grad_norm: 2-norm of the whole gradient before clipping, float32.
    stop, save, busy: number of ranks that said so before this step, float64.
    """

    loss: Tensor
    targets: Tensor
    grad_norm: Tensor
    stop: Tensor
    save: Tensor
    busy: Tensor


NOTHING = Say()


class Engine(Protocol):
    """Runs steps and holds this rank's share of the state. Two implementations: torch mesh and DeepSpeed."""

    def step(self, batch: Batch, lr: float, say: Say = NOTHING) -> Outcome:
        """One optimizer update with learning rate `lr`. All ranks hear what this one has to `say`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's sums over all rows of all batches and all ranks, without dropout."""
        ...

    def boxes(self) -> Iterator[Box]:
        """This rank's share: over all ranks, each element of each slot exactly once."""
        ...

    def not_finite(self) -> list[str]:
        """The weights and slots in which any rank has a number that is not finite, by name; collective."""
        ...

    def load(self, reader: Reader, progress: dict[str, float]) -> None:
        """Take weights, and optimizer slots where the reader has them, and the scalars of `progress()`."""
        ...

    def progress(self) -> dict[str, float]:
        """The scalars that stand beside the weights: `updates` done by the optimizer, `loss_scale` in fp16."""
        ...

    def close(self) -> None:
        """Let go of the model, so that the process group can be torn down."""
        ...


BORDERS = "borders"  # of documents, in a micro-batch for flash attention
LOGITS_AT_ONCE = 2**26  # elements of logits that exist at once: 256 MiB in fp32


class TaskModule(nn.Module):
    """Model and task as one module, so that an engine owns forward and backward: batch in, sums out.

    Where the architecture allows it (`plain_head`), logits are made for as many tokens at a time as LOGITS_AT_ONCE
    says, thrown away, and made again in the backward pass. The number of such chunks follows from shapes alone, so
    it is the same on all ranks. The gradient of the head's parameters is summed over them in fp32, which takes one
    buffer of their size. With `compile`, layers and loss are compiled. `device`: where it will compute.
    """

    def __init__(self, model: PreTrainedModel, task: Task, device: torch.device, compile: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        self._token_sums = _token_sums
        if device.type == "cpu" and SLOW_DTYPES:
            make_fast(model)
        head = plain_head(model)
        if head is not None:
            use_in_chunks(head)
        if compile:
            compile_layers(model)
            self._token_sums = torch.compile(_token_sums, fullgraph=True, dynamic=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.task.inputs(batch)
        if BORDERS in batch:
            inputs |= _one_row(batch)
            batch = {key: tensor for key, tensor in batch.items() if key != BORDERS}
        head = plain_head(self.model)
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
        "cu_seq_lens_q": batch[BORDERS],
        "cu_seq_lens_k": batch[BORDERS],
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


def micro_batches(
    batch: Batch, size: int, data_size: int, *, fixed: bool = False, borders: bool = False
) -> list[dict[str, Tensor]]:
    """Split a rank's rows into micro-batches: as many, of the same shape, on every rank.

    With fewer rows per rank than `size`, micro-batches shrink to what the fullest rank has, unless the shape is
    `fixed`, as for a compiled module. With `borders` each has the entry BORDERS: where documents begin in its rows
    laid end to end, and where the last one ends, int32.
    """
    fullest = -(-batch.rows // data_size)
    size = size if fixed else min(size, fullest)
    count = -(-fullest // size)
    tensors = {key: _padded(key, tensor, count * size) for key, tensor in batch.tensors.items()}
    micros = [{key: tensor[i * size : (i + 1) * size] for key, tensor in tensors.items()} for i in range(count)]
    if borders:
        for micro in micros:
            begins = (micro["position_ids"].flatten() == 0).nonzero().flatten()
            end = begins.new_tensor([micro["position_ids"].numel()])
            micro[BORDERS] = torch.cat([begins, end]).to(torch.int32)
    return micros


def micro_batch_shape(model: PreTrainedModel, compile: bool) -> dict[str, bool]:
    """What `micro_batches` has to mind for a model."""
    return {"fixed": compile, "borders": model.config._attn_implementation == "flash_attention_2"}


def _padded(key: str, tensor: Tensor, rows: int) -> Tensor:
    missing, length = rows - tensor.shape[0], tensor.shape[1]
    if missing == 0:
        return tensor
    if key == "position_ids":
        dummy = torch.arange(length, dtype=tensor.dtype).expand(missing, length)
    else:
        dummy = torch.full((missing, length), IGNORE if key == "targets" else 0, dtype=tensor.dtype)
    return torch.cat([tensor, dummy])


def agree(batch: Batch, say: Say, device: torch.device) -> tuple[Tensor, Sequence[Tensor]]:
    """(supervised targets of the global batch, ranks that said each thing of `Say`): float64 scalars on `device`, the
    same on every rank."""
    targets = (batch.tensors["targets"] != IGNORE).sum()
    counts = torch.cat([targets[None], targets.new_tensor(say)]).to(device, torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
    return counts[0], counts[1:].unbind()


def read_together(read: Callable[[], None]) -> None:
    """Let every rank read its share of a state; collective. When one of them fails, all raise: that one its own
    CheckpointError, the others one like it."""
    failed: CheckpointError | None = None
    try:
        read()
    except CheckpointError as error:
        failed = error
    if dist.get_world_size() > 1:
        reasons: list[CheckpointError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, failed)
        failed = failed or next((reason for reason in reasons if reason is not None), None)
    if failed is not None:
        raise failed


def not_finite(boxes: Iterable[Box], dtype: torch.dtype) -> list[str]:
    """The weights and slots in which any rank has a number that is not finite, by name; collective.

    dtype: in which the model computes; a weight has to be finite there too. Buffers are left out: a mask may be
    infinite.
    """
    trained = [box for box in boxes if box.slot != BUFFER]
    bad: list[str] = []
    if trained:
        extremes = torch.stack([torch.stack(box.tensor.aminmax()) for box in trained])  # (boxes, 2); nan if any is
        for box, largest in zip(trained, extremes.abs().amax(1).tolist(), strict=True):
            limit = torch.finfo(dtype if box.slot == WEIGHT else torch.float32).max
            if not largest <= limit:
                bad.append(box.name if box.slot == WEIGHT else f"{box.slot} of {box.name}")
    everyone: list[list[str]] = [bad]
    if dist.get_world_size() > 1:
        everyone = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, bad)
    return list(dict.fromkeys(itertools.chain(*everyone)))


def sum_over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same keys, each scalar summed over the ranks, in one collective."""
    keys = sorted(sums)
    together = torch.stack([sums[key] for key in keys])
    if dist.get_world_size() > 1:
        dist.all_reduce(together)
    return dict(zip(keys, together.unbind(), strict=True))


def evaluate(
    module: nn.Module,
    batches: Iterable[Batch],
    micro_batch_size: int,
    data_size: int,
    device: torch.device,
    **shape: bool,
) -> dict[str, float]:
    """`Engine.evaluate` for any module that maps a micro-batch to sums; `shape`: as `micro_batches` takes it."""
    was_training = module.training
    module.eval()
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            for micro in micro_batches(batch, micro_batch_size, data_size, **shape):
                sums = module({key: tensor.to(device, non_blocking=True) for key, tensor in micro.items()})
                for key, value in sums.items():
                    value = value.detach().to(torch.float64)
                    totals[key] = totals[key] + value if key in totals else value
    module.train(was_training)
    return {key: value.item() for key, value in sum_over_ranks(totals).items()}


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make a step's random draws a function of (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the state: those that the model's state dict has.

    Found without asking for that dict, which would make FSDP reshard on the rank that asks.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
