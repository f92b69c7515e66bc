"""The torch engine: a mesh of processes, (replicate, shard), over which FSDP2 lays the parameters.

`ddp` is the mesh (world, 1), `fsdp` the mesh (replicate, world / replicate). A world of one has nothing to shard or
reduce: its module stays as it is, and below fp32 computes with a copy of its parameters.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bigtrain.data.batches import Batch
from bigtrain.distributed.collectives import read_together, sum_over_ranks
from bigtrain.models.architecture import persistent_buffers, repeated_layers
from bigtrain.parallel.dims import ParallelDims
from bigtrain.parallel.engine import (
    NO_FLAGS,
    PRECISIONS,
    Flags,
    Outcome,
    cast_frozen,
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
from bigtrain.state import BUFFER, WEIGHT, Box, Shape, StateReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bigtrain.optim import Optimizer
    from bigtrain.tasks import Task


class MeshEngine:
    """Implements `Engine` with PyTorch alone.

    `build_model` gives the model with its parameters on the meta device; they become real where they are kept.
    `dims.shard` ranks share one copy of the parameters.
    """

    def __init__(
        self,
        build_model: Callable[[], PreTrainedModel],
        task: Task,
        *,
        dims: ParallelDims,
        precision: str,
        compile: bool,
        micro_batch_size: int,
        optimizer: Optimizer,
        seed: int,
        device: torch.device,
    ):
        self._device = device
        self._micro_batch_size = micro_batch_size
        self._max_grad_norm = optimizer.max_grad_norm
        self._seed = seed
        self._task = task
        self._dims = dims
        self._updates = 0
        self._dtype = PRECISIONS[precision]
        self._loss_scale = LossScale() if precision == "fp16" else None

        model = build_model()
        cast_frozen(model, self._dtype)
        self._shape = micro_batch_shape(model, compile)
        self._module: Any = TaskModule(model, task, device, compile)
        self._wrapped = dims.world_size > 1
        if self._wrapped:
            _lay_over_mesh(self._module, dims, self._dtype, device)
        self._module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        model.tie_weights()  # making parameters real one by one has untied them
        self._parameters = dict(model.named_parameters())
        self._trained = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._optimizer = optimizer.build(model)
        self._copies: _Copies | None = None
        if not self._wrapped and precision != "fp32":
            self._copies = _Copies(model, self._trained, self._dtype)

    def step(self, batch: Batch, lr: float, flags: Flags = NO_FLAGS) -> Outcome:
        seed_dropout(self._seed, batch.step, self._dims.data_rank)
        total, flagged = reduce_before_step(self._task.weight(batch.tensors), flags, self._device)
        weight = 1.0 / total.clamp(min=1)
        if self._loss_scale is not None:
            weight = weight * self._loss_scale.value
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        micros = micro_batches(batch, self._micro_batch_size, self._dims.data_size, **self._shape)
        for i, micro in enumerate(micros):
            if self._wrapped:
                self._module.set_requires_all_reduce(i == len(micros) - 1)
            sums = self._module({key: t.to(self._device, non_blocking=True) for key, t in micro.items()})
            (sums["loss"] * weight).backward()
            loss += sums["loss"].detach()
        grad_norm = self._update(lr)
        loss = sum_over_ranks({"loss": loss})["loss"]
        return Outcome(loss / total.clamp(min=1), total, grad_norm, flagged)

    def _update(self, lr: float) -> Tensor:
        """Clip and step; returns the norm before clipping."""
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scale = self._loss_scale.value if self._loss_scale is not None else 1.0
        norm = norm / scale
        if self._loss_scale is None or self._loss_scale.accepts(bool(norm.isfinite())):
            if self._max_grad_norm is not None:
                clip = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([_local(g) for g in gradients], clip / scale)
            elif scale != 1.0:
                torch._foreach_div_([_local(g) for g in gradients], scale)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._updates += 1
            if self._copies is not None:
                self._copies.refresh()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        return evaluate(
            self._module, batches, self._micro_batch_size, self._dims.data_size, self._device, **self._shape
        )

    def boxes(self) -> Iterator[Box]:
        for i, (name, parameter) in enumerate(self._trained.items()):
            if i % self._dims.replicate == self._dims.copy:  # each copy gives its share of the tensors
                for slot, tensor in self._slots(parameter).items():
                    offsets, shape = _place(tensor), tuple(tensor.shape)
                    local = _local(tensor)
                    if local.numel():
                        yield Box(name, slot, shape, offsets, local)
        if self._dims.rank == 0:
            for name, buffer in persistent_buffers(self._module.model):
                yield Box(name, BUFFER, tuple(buffer.shape), (0,) * buffer.dim(), buffer)

    def not_finite(self) -> list[str]:
        return not_finite(itertools.chain(self.boxes(), self._frozen_boxes()), self._dtype)

    def _frozen_boxes(self) -> Iterator[Box]:
        for name in self._parameters.keys() - self._trained.keys():
            tensor = self._parameters[name].detach()
            if _local(tensor).numel():
                yield Box(name, WEIGHT, tuple(tensor.shape), _place(tensor), _local(tensor))

    def _slots(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        state = self._optimizer.state.get(parameter, {})
        moments = {slot: t for slot, t in state.items() if slot != "step" and isinstance(t, Tensor)}
        return {WEIGHT: parameter.detach(), **moments}

    @torch.no_grad()
    def load(self, reader: StateReader, progress: dict[str, float]) -> None:
        read_together(partial(self._read, reader, progress))
        trim_memory()
        if self._copies is not None:
            self._copies.refresh()
        self._updates = int(progress.get("updates", 0))
        if self._loss_scale is not None:
            self._loss_scale.load(progress)

    def _read(self, reader: StateReader, progress: dict[str, float]) -> None:
        """This rank's share."""
        self._optimizer.state.clear()
        for name, parameter in self._trained.items():  # all before the first is read: else what that frees lies between
            if slots := moments_of(reader, name):
                state = self._optimizer.state[parameter]
                state["step"] = torch.tensor(float(progress["updates"]), device=self._device)
                state |= {slot: torch.empty_like(parameter) for slot in slots}
        for name, parameter in self._parameters.items():
            for slot, tensor in self._slots(parameter).items():
                _fill(tensor, reader, name, slot)
        for name, buffer in persistent_buffers(self._module.model):
            if BUFFER in reader.slots_of(name):
                _fill(buffer, reader, name, BUFFER)

    def progress(self) -> dict[str, float]:
        scale = {} if self._loss_scale is None else self._loss_scale.progress()
        return {"updates": self._updates, **scale}

    def close(self) -> None:
        """Without this, FSDP2's process aborts now and then when the group is torn down before the model."""
        self._optimizer.state.clear()
        del self._optimizer, self._parameters, self._trained, self._module, self._copies
        gc.collect()


class _Copies:
    """Low-precision copies of the parameters that train, with which the model computes; their gradients gather on the
    fp32 ones.

    The model's own parameters become the copies; `masters` stay what the optimizer and the state know.
    """

    def __init__(self, model: PreTrainedModel, masters: dict[str, torch.nn.Parameter], dtype: torch.dtype):
        copies = {master: torch.nn.Parameter(master.detach().to(dtype)) for master in masters.values()}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):  # a tied one has several places
                if parameter in copies:
                    setattr(module, name, copies[parameter])
        for master, copy in copies.items():
            copy.register_post_accumulate_grad_hook(partial(_hand_over, master))
        self._masters = [master.detach() for master in copies]
        self._tensors = [copy.detach() for copy in copies.values()]

    def refresh(self) -> None:
        """Take the masters' values."""
        torch._foreach_copy_(self._tensors, self._masters)


def _hand_over(master: torch.nn.Parameter, copy: torch.nn.Parameter) -> None:
    assert copy.grad is not None
    if master.grad is None:
        master.grad = copy.grad.float()
    else:
        master.grad += copy.grad
    copy.grad = None


def _lay_over_mesh(module: TaskModule, dims: ParallelDims, dtype: torch.dtype, device: torch.device) -> None:
    """Shard each transformer layer and then the rest, gradients summed (not averaged) over the mesh."""
    mesh = dims.mesh(device.type)
    cast = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model: Any = module.model
    for layer in repeated_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=dims.shard > 1)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(tensor: Tensor) -> Shape:
    """Where this rank's part of a tensor begins."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets)


def _fill(tensor: Tensor, reader: StateReader, name: str, slot: str) -> None:
    local = _local(tensor)
    if local.numel():
        fill(local, reader, name, slot, _place(tensor))
