"""What is reported of a stage while it is trained: its steps, evaluations and checkpoints."""

from __future__ import annotations

import math
import resource
import time
from typing import NamedTuple

import torch

from bigtrain.checkpoint import Saved
from bigtrain.errors import NotFiniteError
from bigtrain.observability.events import CheckpointSaved, Evaluation, Step
from bigtrain.observability.stream import Stream
from bigtrain.parallel.engine import Outcome


class Heard(NamedTuple):
    """What the ranks have told each other in the newest step that was read. stop, save: any rank was asked to. idle: no
    rank is still writing a checkpoint."""

    stop: bool = False
    save: bool = False
    idle: bool = False


class Reports:
    """Tells the stream. On a GPU the numbers of a step are read after the next one, so that the host never waits."""

    def __init__(self, stage: str, stream: Stream, skips_overflows: bool = False):
        """skips_overflows: the engine leaves out steps whose gradient is not finite, as loss scaling wants (fp16)."""
        self.stage = stage
        self.heard = Heard()
        self._stream = stream
        self._skips_overflows = skips_overflows
        self._pending: _Pending | None = None
        self._since = math.nan  # until the clock is started

    def start_clock(self) -> None:
        """Start the clock of what comes next: a step or an evaluation."""
        self._since = time.perf_counter()

    def stepped(self, step: int, steps: int, lr: float, tokens: int, outcome: Outcome) -> None:
        """Report the step before, and this one (counted from 1) if its numbers are on the host."""
        self.flush()
        values = _HostCopy(outcome)
        self._pending = _Pending(step, steps, lr, tokens, values)
        if values.here:
            self.flush()

    def flush(self) -> None:
        """Report the step that is still to be reported, if there is one. Raises NotFiniteError."""
        if self._pending is None:
            return
        step, steps, lr, tokens, values = self._pending
        self._pending = None
        loss, weight, grad_norm, *flags = values.read()
        stop, save, busy = flags
        self.heard = Heard(stop > 0, save > 0, busy == 0)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._check_finite(step, loss, grad_norm)
        self._stream.emit(
            Step(
                stage=self.stage,
                step=step,
                steps=steps,
                lr=lr,
                tokens=tokens,
                loss=loss,
                grad_norm=grad_norm,
                targets=int(weight),
                step_seconds=seconds,
                tokens_per_second=tokens / seconds,
                memory_bytes=_memory_bytes(),
            )
        )

    def obeyed(self) -> None:
        """A save is due: forget what was heard until the ranks are heard again."""
        self.heard = self.heard._replace(save=False, idle=False)

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self._skips_overflows):
            return
        raise NotFiniteError(
            f"stage {self.stage}, step {step}: the loss is {loss} and the gradient norm {grad_norm} "
            f"(its samples: `bigtrain preview CONFIG --stage {self.stage} --step {step - 1}`)."
        )

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Report the task's metrics over all held-out samples. Raises NotFiniteError."""
        if not math.isfinite(loss := metrics["loss"]):
            raise NotFiniteError(f"stage {self.stage}: the held-out loss after step {step} is {loss}.")
        seconds = time.perf_counter() - self._since
        self._stream.emit(Evaluation(stage=self.stage, step=step, metrics=metrics, seconds=seconds))
        self.start_clock()  # it is no part of the next step's time

    def stalled(self, seconds: float) -> None:
        """Leave a save out of the time of the next step."""
        self._since += seconds

    def saved(self, saved: Saved) -> None:
        """Report a checkpoint that is complete."""
        self._stream.emit(
            CheckpointSaved(
                stage=self.stage,
                step=saved.step,
                folder=str(saved.folder),
                stalled_seconds=saved.stalled,
                seconds=saved.seconds,
            )
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


class _Pending(NamedTuple):
    """A step that is still to be reported."""

    step: int
    steps: int
    lr: float
    tokens: int
    values: _HostCopy


def _memory_bytes() -> int:
    """Peak memory: of the GPU's allocator, or resident in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
