"""The loop. It does not know tasks, engines or readers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from bigtrain.data.batches import Batch
from bigtrain.parallel.contract import Engine
from bigtrain.resilience.stopping import StopRequest
from bigtrain.training.run import StageRun


def train(
    run: StageRun,
    engine: Engine,
    batches: Callable[[int], Batch],
    held_out: Callable[[], Iterable[Batch]],
    save: Callable[[], Path],
    request: StopRequest,
) -> bool:
    """Train from step `run.done` to the stage's end, on all ranks together; False if asked to stop before it."""
    if run.evaluates and run.done == 0:
        run.evaluated(engine.evaluate(held_out()))
    while run.done < run.steps:
        outcome = engine.step(batches(run.done), lr=run.learning_rate, stop=request.asked)
        due = run.completed(outcome)
        if due.evaluate:
            run.evaluated(engine.evaluate(held_out()))
        if due.save:
            run.saved(save())
        if due.stop:
            return False
    return True
