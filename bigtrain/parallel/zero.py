"""The DeepSpeed engine: ZeRO stages 1, 2 and 3, data parallel over all ranks.

DeepSpeed keeps what a rank updates in flat fp32 tensors: in stages 1 and 2 its part of a parameter group, cut
anywhere; in stage 3 its part of each parameter, padded. A `_Shard` says which run of which parameter lies
where in which flat tensor; giving and taking the state needs no more.

DeepSpeed 0.19.8's private names are used in the functions at the end only.
"""

from __future__ import annotations

import gc
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from bigtrain.data.batches import Batch
from bigtrain.distributed.collectives import read_together, sum_over_ranks
from bigtrain.models.architecture import persistent_buffers
from bigtrain.parallel.dims import ParallelDims
from bigtrain.parallel.engine import (
    NO_FLAGS,
    PRECISIONS,
    Flags,
    Outcome,
    evaluate,
    moments_of,
    not_finite,
    reduce_before_step,
    seed_dropout,
)
from bigtrain.parallel.loss_scale import LossScale
from bigtrain.parallel.memory import fill, trim_memory
from bigtrain.parallel.micro_batches import micro_batch_shape, micro_batches
from bigtrain.parallel.task_module import TaskModule
from bigtrain.state import BUFFER, WEIGHT, Box, Shape, StateReader, flat_range_boxes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bigtrain.optim import Optimizer
    from bigtrain.tasks import Task

REDUCE_BUCKET = 50_000_000  # most elements in DeepSpeed's gradient buffer, which it allocates whole
KEPT_WHOLE = 100_000  # stage 3 never partitions parameters with fewer elements, or it would wait for each norm


class ZeroEngine:
    """ZeRO stage 1, 2 or 3; implements `Engine`.

    Master weights, moments, gradient accumulation and reduction are fp32 in every stage and precision.
    A step whose gradient is not finite changes nothing and is not counted in `updates`.
    """

    def __init__(
        self,
        build_model: Callable[[], PreTrainedModel],
        task: Task,
        *,
        stage: int,
        dims: ParallelDims,
        precision: str,
        compile: bool,
        micro_batch_size: int,
        optimizer: Optimizer,
        seed: int,
        device: torch.device,
    ):
        """Needs the default process group and the launcher's LOCAL_RANK; collective.

        Raises ValueError when DeepSpeed would run on another kind of device.
        """
        deepspeed = _import_deepspeed(device)
        self._stage = stage
        self._dims = dims
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._task = task
        self._device = device
        self._updates = 0
        self._linear = functional.linear
        self._dtype = PRECISIONS[precision]
        self._model = _build_partitioned(deepspeed, build_model, self._dtype) if stage == 3 else build_model()
        self._shape = micro_batch_shape(self._model, compile)
        config = _config(stage, precision, optimizer.max_grad_norm)
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in self._model.parameters())
        config["zero_optimization"] |= {
            "reduce_bucket_size": min(elements, REDUCE_BUCKET),
            "stage3_param_persistence_threshold": min(elements // 100, KEPT_WHOLE),
        }
        self._optimizer = optimizer.build(self._model)
        module = TaskModule(self._model, task, device, compile)
        _accept(type(self._optimizer))
        with redirect_stdout(io.StringIO()):  # drops its bare prints about memory; its log has its own stream
            self._engine, self._zero, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        self._loss_scale = LossScale() if precision == "fp16" else None
        if self._loss_scale is not None:
            self._zero.loss_scaler = _Scaler(self._loss_scale)  # its own has counters of its own
        self._engine.train()
        trim_memory()
        parameters = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self._frozen = [(name, p) for name, p in self._model.named_parameters() if not p.requires_grad]
        self._shards = list(
            _split_parameter_shards(parameters, self._zero)
            if stage == 3
            else _split_group_shards(parameters, self._optimizer)
        )

    def step(self, batch: Batch, lr: float, flags: Flags = NO_FLAGS) -> Outcome:
        """One update with learning rate `lr`; `grad_norm` is inf when the gradient was not finite."""
        total, flagged = reduce_before_step(self._task.weight(batch.tensors), flags, self._device)
        seed_dropout(self._seed, batch.step, self._dims.data_rank)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed sums gradients over the ranks in stages 1 and 2, and takes their mean in stage 3.
        weight = (self._dims.data_size if self._stage == 3 else 1) / total.clamp(min=1).float()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for micro in micro_batches(batch, self._micro_batch_size, self._dims.data_size, **self._shape):
            there = {key: value.to(self._device, non_blocking=True) for key, value in micro.items()}
            sums = self._engine(there)
            self._engine.backward(sums["loss"] * weight, scale_wrt_gas=False)
            loss += sums["loss"].detach()
        self._engine.step()
        self._updates += self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm()
        grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self._device)
        loss = sum_over_ranks({"loss": loss})["loss"] / total.clamp(min=1)
        return Outcome(loss, total, grad_norm, flagged)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """The task's sums over all rows of all batches and all ranks, without dropout."""
        return evaluate(
            self._engine, batches, self._micro_batch_size, self._dims.data_size, self._device, **self._shape
        )

    def boxes(self) -> Iterator[Box]:
        """This rank's share, as views: weights and moments in fp32, and on rank 0 the persistent buffers.

        Moments are there once the optimizer has made them.
        """
        yield from self._trained_boxes()
        if self._dims.rank == 0:
            yield from self._buffer_boxes()

    def not_finite(self) -> list[str]:
        return not_finite((*self._trained_boxes(), *self._frozen_boxes()), self._dtype)

    @torch.no_grad()
    def load(self, reader: StateReader, progress: dict[str, float]) -> None:
        """Fill the state from `reader`; collective.

        Without moments in `reader` the optimizer starts anew: moments of zero and no updates done.
        """
        self._updates = int(progress["updates"])
        self._prepare_optimizer_state(reader)
        read_together(partial(self._read, reader))
        trim_memory()
        _copy_masters_to_model(self._zero, self._stage)
        if self._loss_scale is not None:
            self._loss_scale.load(progress)

    def _read(self, reader: StateReader) -> None:
        """This rank's share."""
        for box in (*self._trained_boxes(), *self._frozen_boxes(), *self._buffer_boxes()):
            if box.slot in reader.slots_of(box.name):
                fill(box.tensor, reader, box.name, box.slot, box.offsets)

    def progress(self) -> dict[str, float]:
        scale = {} if self._loss_scale is None else self._loss_scale.progress()
        return {"updates": self._updates, **scale}

    def close(self) -> None:
        """Let go of the model and of what DeepSpeed patched; the engine is of no use afterwards."""
        self._engine.destroy()
        functional.linear = self._linear  # zero.Init replaces it for the whole process
        del self._engine, self._zero, self._model, self._optimizer, self._shards, self._frozen
        gc.collect()

    def _trained_boxes(self) -> Iterator[Box]:
        for shard in self._shards:
            state = self._optimizer.state.get(shard.flat, {})
            moments = {
                slot: value
                for slot, value in state.items()
                if torch.is_tensor(value) and value.shape == shard.flat.shape
            }
            for slot, flat in {WEIGHT: shard.flat.detach(), **moments}.items():
                for part in flat_range_boxes(shard.shape, shard.start, shard.start + shard.length):
                    tensor = flat.narrow(0, shard.at + part.start, math.prod(part.lengths)).view(part.lengths)
                    yield Box(shard.name, slot, shard.shape, part.offsets, tensor)

    def _frozen_boxes(self) -> Iterator[Box]:
        """What this rank has of the weights that do not train: all of them, or in stage 3 its parts."""
        parameter: Any
        for name, parameter in self._frozen:
            if self._stage < 3:
                yield Box(name, WEIGHT, tuple(parameter.shape), (0,) * parameter.dim(), parameter.detach())
                continue
            shape, flat = tuple(parameter.ds_shape), parameter.ds_tensor.detach()  # private: this rank's part, padded
            start = min(dist.get_rank() * flat.numel(), parameter.ds_numel)
            for part in flat_range_boxes(shape, start, min(start + flat.numel(), parameter.ds_numel)):
                tensor = flat.narrow(0, part.start, math.prod(part.lengths)).view(part.lengths)
                yield Box(name, WEIGHT, shape, part.offsets, tensor)

    def _buffer_boxes(self) -> Iterator[Box]:
        for name, buffer in persistent_buffers(self._model):
            yield Box(name, BUFFER, tuple(buffer.shape), (0,) * buffer.dim(), buffer)

    def _prepare_optimizer_state(self, reader: StateReader) -> None:
        """Make each slot that `reader` has where it is missing, zero all there are, and set the step count."""
        for shard in self._shards:
            state = self._optimizer.state[shard.flat]
            for slot in moments_of(reader, shard.name):
                if slot not in state:
                    state[slot] = torch.empty_like(shard.flat)
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()
            if state:
                state["step"] = torch.tensor(float(self._updates), device=self._device)


class _Scaler:
    """What DeepSpeed asks its loss scaler, answered by ours. It adapts the scale before it divides the gradients by it:
    `cur_scale` stays what they were multiplied by."""

    def __init__(self, scale: LossScale):
        self._scale = scale
        self.cur_scale = scale.value

    def scale_loss(self, loss: Tensor) -> Tensor:
        self.cur_scale = self._scale.value
        return loss * self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        self._scale.accepts(not overflow)


class _Shard(NamedTuple):
    """One run of a parameter's elements that this rank updates."""

    name: str
    shape: Shape  # of the whole parameter
    start: int  # of the run, in the flattened parameter
    length: int
    flat: Tensor  # fp32, one dimension: master weights; the optimizer's state is found under it
    at: int  # of the run, in `flat`


def _split_group_shards(parameters: Iterable[tuple[str, Any]], optimizer: torch.optim.Optimizer) -> Iterator[_Shard]:
    """Stages 1 and 2: a parameter group is one flat tensor, cut evenly over the ranks."""
    for name, parameter in parameters:
        mapping = parameter._hp_mapping  # private: the only record of where a parameter lies
        if mapping is not None:  # some of it lies on this rank
            (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Shard(name, tuple(parameter.shape), here.start, here.numel, flat, there.start)


def _split_parameter_shards(parameters: Iterable[tuple[str, Any]], zero: Any) -> Iterator[_Shard]:
    """Stage 3: each parameter is cut evenly over the ranks; the last parts are padded, or padding only."""
    for name, parameter in parameters:
        group, at, padded = zero.grad_position[parameter.ds_id]  # private: where safe_get_local_* look
        start = dist.get_rank() * padded
        length = min(padded, parameter.ds_numel - start)
        if length > 0:
            flat = zero.fp32_partitioned_groups_flat[group]  # private: the key of the optimizer's state
            yield _Shard(name, tuple(parameter.ds_shape), start, length, flat, at)


def _build_partitioned(
    deepspeed: ModuleType, build_model: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> PreTrainedModel:
    """Stage 3: a model of which each rank holds a part, parameters in `dtype`, buffers as they were built."""
    # zero.Init in fp32, as it rounds every tensor made within it: rotary frequencies too.
    with deepspeed.zero.Init(config_dict_or_path=_config(3, "fp32", None)):
        model = build_model()
    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = [parameter.ds_tensor for parameter in parameters]  # private: what this rank has of each
    at = 0
    together = torch.empty(sum(part.numel() for part in parts), dtype=dtype, device=parts[0].device)
    for parameter, part in zip(parameters, parts, strict=True):
        there = together[at : at + part.numel()]  # one tensor, which goes back to the system whole when DeepSpeed
        part.data = there.copy_(part.data)  # makes its own of it
        parameter.data = parameter.data.to(dtype)
        at += part.numel()
    frozen: Any
    for frozen in (parameter for parameter in model.parameters() if not parameter.requires_grad):
        part = frozen.ds_tensor
        part.data, frozen.data = part.data.to(dtype), frozen.data.to(dtype)
    trim_memory()
    return model


def _copy_masters_to_model(zero: Any, stage: int) -> None:
    """Refresh the parameters that forward uses from the fp32 master weights; collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # private: forgets the small parameters that stay gathered between steps
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)  # private: what its own step ends with


def _import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed on `device`'s kind of device, which it chooses once and for all when it is imported.

    Raises ValueError when it has chosen another.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # a world of one has no launcher that sets it
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise ValueError(
            f"DeepSpeed runs on {get_accelerator().device_name()}, not on {device.type}: "
            f"start with the environment variable DS_ACCELERATOR={device.type}"
        )
    # Private: on a CPU this op is compiled at start, for 5 to 40 s, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Names that DeepSpeed calls and torch 2.13 renames; nothing that a user can act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def _accept(optimizer: type[torch.optim.Optimizer]) -> None:
    """Spare users DeepSpeed's refusal of optimizers that it has not tried: ours update each element by itself."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def _config(stage: int, precision: str, max_grad_norm: float | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of no effect: DeepSpeed sees neither batches nor accumulation
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # a sum is refused in stage 3
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in each step
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config
