"""A stage while it is trained: how far it is, and what is due after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bigtrain.config.schema import StageConfig
from bigtrain.errors import NotFiniteError, shorten
from bigtrain.parallel.engine import Outcome
from bigtrain.training.reports import Reports


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
        *,
        sequences: int,
        global_batch_size: int,
        sequence_length: int,
        learning_rate: Callable[[int, int], float],
        reports: Reports,
        done: int = 0,
        evaluates: bool = False,
        evaluate_every: int | None = None,
        save_every: int | None = None,
    ):
        """sequences: of all steps together; the last step has what remains. learning_rate: of a step (from 0) of so
        many. evaluates: before the first and after the last step, and as `evaluate_every` says."""
        self.steps = -(-sequences // global_batch_size)
        self.done = done
        self.evaluates = evaluates
        self.reports = reports
        self._sequences = sequences
        self._global_batch_size = global_batch_size
        self._sequence_length = sequence_length
        self._learning_rate = learning_rate
        self._evaluate_every = evaluate_every
        self._save_every = save_every

    @classmethod
    def of(cls, stage: StageConfig, sequences: int, done: int, reports: Reports) -> StageRun:
        """As the run's file says."""
        return cls(
            sequences=sequences,
            global_batch_size=stage.global_batch_size,
            sequence_length=stage.sequence_length,
            learning_rate=lambda step, steps: stage.schedule.rate(step, steps, stage.optimizer.lr),
            reports=reports,
            done=done,
            evaluates=stage.evaluate is not None,
            evaluate_every=stage.evaluate.every if stage.evaluate else None,
            save_every=stage.checkpoint.every,
        )

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        return self._learning_rate(self.done, self.steps)

    def completed(self, outcome: Outcome) -> Due:
        """Count a step and report it. Raises NotFiniteError as `Reports` does."""
        lr = self.learning_rate
        sequences = min(self._global_batch_size, self._sequences - self.done * self._global_batch_size)
        self.done += 1
        self.reports.stepped(self.done, self.steps, lr, sequences * self._sequence_length, outcome)
        last, heard = self.done == self.steps, self.reports.heard
        due = Due(
            evaluate=self.evaluates and (last or _every(self.done, self._evaluate_every)),
            save=last or heard.stop or heard.save or _every(self.done, self._save_every),
            stop=heard.stop and not last,
            publish=heard.idle,
        )
        if due.evaluate or due.save:
            self.reports.flush()
        if due.save:
            self.reports.obeyed()
        return due

    def check_state(self, not_finite: list[str]) -> None:
        """Raises NotFiniteError if there is anything in `not_finite`, the names of what is not."""
        if not_finite:
            raise NotFiniteError(
                f"stage {self.reports.stage}: after step {self.done} there are numbers that are not finite in "
                f"{shorten(not_finite)}."
            )


def _every(done: int, period: int | None) -> bool:
    return period is not None and done % period == 0
