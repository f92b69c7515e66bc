"""The loop. It does not know tasks, engines or readers by name."""

from __future__ import annotations

from collections.abc import Callable

from bigtrain.checkpoint import NoSaver, Saver
from bigtrain.data.batches import Batch
from bigtrain.errors import NotFiniteError
from bigtrain.observability.hooks import StepHooks
from bigtrain.parallel.engine import Engine, Flags
from bigtrain.resilience.requests import Requests
from bigtrain.training.run import StageRun


def train(
    run: StageRun,
    engine: Engine,
    batches: Callable[[int], Batch],
    evaluate: Callable[[], dict[str, float]],
    saver: Saver | NoSaver,
    requests: Requests,
    hooks: StepHooks | None = None,
) -> bool:
    """Train from step `run.done` to the stage's end, on all ranks together; False if asked to stop before it.

    hooks: called before the first step and after each one.

    Raises NotFiniteError for a step, an evaluation or a state that is not finite; such a state is not saved, and a save
    that was under way is complete then.
    """
    try:
        return _train(run, engine, batches, evaluate, saver, requests, hooks)
    except NotFiniteError:
        saver.finish()
        raise


def _train(
    run: StageRun,
    engine: Engine,
    batches: Callable[[int], Batch],
    evaluate: Callable[[], dict[str, float]],
    saver: Saver | NoSaver,
    requests: Requests,
    hooks: StepHooks | None,
) -> bool:
    reports = run.reports
    reports.start_clock()
    if run.evaluates and run.done == 0:
        reports.evaluated(run.done, evaluate())
    if hooks:
        hooks(run.done)
    while run.done < run.steps:
        flags = Flags(requests.stop, requests.save, saver.busy)
        due = run.completed(engine.step(batches(run.done), run.learning_rate, flags))
        if hooks:
            hooks(run.done)
        if due.publish:
            saver.publish()
        if due.evaluate:
            reports.evaluated(run.done, evaluate())
        if due.save:
            run.check_state(engine.not_finite())
            requests.saving(run.done)
            reports.stalled(saver.save(run.done, engine.boxes(), engine.progress()))
        if due.stop:
            break
    saver.finish()
    return run.done == run.steps
