"""A stage while it is trained: how far it is, what is due after a step, what is reported of it."""

from __future__ import annotations

import math
import resource
import time
from typing import Any, NamedTuple

import torch

from bigtrain.checkpoint import Saved
from bigtrain.config.schema import StageConfig
from bigtrain.errors import NotFiniteError, shorten
from bigtrain.observability.profiler import Profiler
from bigtrain.observability.stream import Stream
from bigtrain.parallel.engine import Outcome


class Due(NamedTuple):
    """What is to be done after a step; the same answer on every rank."""

    evaluate: bool
    save: bool
    stop: bool
    publish: bool  # a checkpoint that was begun, if there is one: every rank has written its share


class StageRun:
    """`done` counts the finished steps of `steps`; everything else follows from it."""

    def __init__(
        self,
        stage: StageConfig,
        sequences: int,
        done: int,
        stream: Stream,
        *,
        skips_overflows: bool = False,
        profiler: Profiler | None = None,
    ):
        """skips_overflows: the engine leaves out steps whose gradient is not finite, as loss scaling wants (fp16)."""
        self.steps = -(-sequences // stage.global_batch_size)
        self.done = done
        self.evaluates = stage.evaluate is not None
        self._stage = stage
        self._sequences = sequences
        self._stream = stream
        self._skips_overflows = skips_overflows
        self._profiler = profiler
        self._stops = self._saves = self._idle = False  # what all ranks have heard last
        self._pending: tuple[dict[str, Any], _HostCopy] | None = None
        self._profile()
        self._since = math.nan  # until the clock is started

    def start_clock(self) -> None:
        """Start the clock of what comes next: a step or an evaluation."""
        self._since = time.perf_counter()

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        return self._stage.schedule.rate(self.done, self.steps, self._stage.optimizer.lr)

    def completed(self, outcome: Outcome) -> Due:
        """Count a step. On a GPU its numbers are reported after the next one, so that the host never waits for it."""
        self._report()
        sequences = min(self._stage.global_batch_size, self._sequences - self.done * self._stage.global_batch_size)
        row: dict[str, Any] = {"lr": self.learning_rate, "tokens": sequences * self._stage.sequence_length}
        self.done += 1
        row |= {"stage": self._stage.name, "step": self.done, "steps": self.steps}
        values = _HostCopy(outcome)
        self._pending = (row, values)
        if values.here:
            self._report()
        last = self.done == self.steps
        evaluate, checkpoint = self._stage.evaluate, self._stage.checkpoint
        due = Due(
            evaluate=evaluate is not None and (last or _every(self.done, evaluate.every)),
            save=last or self._stops or self._saves or _every(self.done, checkpoint.every),
            stop=self._stops and not last,
            publish=self._idle,
        )
        if due.evaluate or due.save:
            self._report()
        if due.save:
            self._saves = self._idle = False  # until the ranks are heard again
        self._profile()
        return due

    def _profile(self) -> None:
        if self._profiler is None:
            return
        try:
            trace = self._profiler.between_steps(self.done, self.steps)
        except Exception as error:  # noqa: BLE001 - it only reports, and has libraries of its own
            self._profiler = None
            self._stream.lost("the profiler", error)
            return
        if trace is not None:
            self._stream.emit("profiled", stage=self._stage.name, step=self.done, file=str(trace))

    def _report(self) -> None:
        if self._pending is None:
            return
        row, values = self._pending
        self._pending = None
        loss, weight, grad_norm, *flags = values.read()
        stop, save, busy = flags
        self._stops, self._saves, self._idle = stop > 0, save > 0, busy == 0
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._check_finite(row["step"], loss, grad_norm)
        self._stream.emit(
            "step",
            **row,
            loss=loss,
            grad_norm=grad_norm,
            targets=int(weight),
            step_seconds=seconds,
            tokens_per_second=row["tokens"] / seconds,
            memory_bytes=_memory_bytes(),
        )

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self._skips_overflows):
            return
        raise NotFiniteError(
            f"stage {self._stage.name}, step {step}: the loss is {loss} and the gradient norm {grad_norm} "
            f"(its samples: `bigtrain preview CONFIG --stage {self._stage.name} --step {step - 1}`)."
        )

    def check_state(self, not_finite: list[str]) -> None:
        """Raises NotFiniteError if there is anything in `not_finite`, the names of what is not."""
        if not_finite:
            raise NotFiniteError(
                f"stage {self._stage.name}: after step {self.done} there are numbers that are not finite in "
                f"{shorten(not_finite)}."
            )

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Report the task's metrics over all held-out samples. Raises NotFiniteError."""
        if not math.isfinite(metrics["loss"]):
            loss = metrics["loss"]
            raise NotFiniteError(f"stage {self._stage.name}: the held-out loss after step {self.done} is {loss}.")
        self._stream.emit(
            "evaluation",
            stage=self._stage.name,
            step=self.done,
            **metrics,
            seconds=time.perf_counter() - self._since,
        )
        self.start_clock()  # it is no part of the next step's time

    def stalled(self, seconds: float) -> None:
        """Leave a save out of the time of the next step."""
        self._since += seconds

    def saved(self, saved: Saved) -> None:
        """Report a checkpoint that is complete."""
        self._stream.emit(
            "checkpoint_saved",
            stage=self._stage.name,
            step=saved.step,
            folder=str(saved.folder),
            stalled_seconds=saved.stalled,
            seconds=saved.seconds,
        )


class _HostCopy:
    """An outcome on its way to the host: on a GPU the copy runs behind the next step."""

    def __init__(self, outcome: Outcome):
        values = torch.cat([value.detach().double().flatten() for value in outcome])
        self.here = not values.is_cuda
        if values.is_cuda:
            self._values = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = values

    def read(self) -> list[float]:
        if not self.here:
            self._copied.synchronize()
        return self._values.tolist()


def _every(done: int, period: int | None) -> bool:
    return period is not None and done % period == 0


def _memory_bytes() -> int:
    """Peak memory: of the GPU's allocator, or resident in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
