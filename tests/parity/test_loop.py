"""What the loop gives each step: its learning rate, through an interruption, and its draws of dropout."""

import math
import os
import signal

import pytest
import torch.distributed as dist
from pydantic import PrivateAttr
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bigtrain.checkpoint import Checkpoint, Retention, Saver, complete
from bigtrain.config.schema import StageConfig
from bigtrain.data.batches import Batch
from bigtrain.observability.events import Step
from bigtrain.observability.stream import Stream
from bigtrain.resilience.requests import Requests
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.training.loop import train
from bigtrain.training.reports import Reports
from bigtrain.training.run import StageRun
from tests.parity import cases
from tests.parity.test_steps import LAYOUTS

STEPS, PEAK, WARMUP, FLOOR = 9, 3e-3, 3, 0.25


def attempt(layout, schedule, folder, stop_at):
    """Train from the newest checkpoint of `folder` until asked to stop when step `stop_at` is reported.

    Returns (the rates that were reported, those that the optimizer had in its groups, both step by step).
    """
    stage = StageConfig(
        name="pretrain",
        task="pretrain",
        data=[{"source": "stdlib"}],
        sequence_length=cases.LENGTH,
        global_batch_size=7,
        steps=STEPS,
        optimizer={"lr": PEAK},
        schedule={"name": schedule, "warmup_steps": WARMUP} | ({} if schedule == "constant" else {"min_ratio": FLOOR}),
    )
    found = complete(folder)
    checkpoint = Checkpoint(found[-1]) if found else None
    reported, used, rates = [], [], set()

    def listen(event):
        if isinstance(event, Step):
            reported.append(event.lr)
            used.append(rates.copy())
            rates.clear()
            if event.step == stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)

    def take(optimizer, *_):
        rates.update(group["lr"] for group in optimizer.param_groups)

    hook = register_optimizer_step_pre_hook(take)
    engine = cases.make(layout, reader=checkpoint, progress=checkpoint and checkpoint.progress)
    reports = Reports(stage.name, Stream([listen]))
    run = StageRun.of(stage, STEPS * 7, checkpoint.step if checkpoint else 0, reports)
    with Requests() as requests, Saver(folder, Retention(keep=1), reports.saved, asynchronous=False) as saver:
        finished = train(run, engine, cases.share, lambda: [], saver, requests)
    hook.remove()
    engine.close()
    assert finished == (stop_at is None)
    return reported, used


def closed_form(schedule):
    """The rate of each step: linear to PEAK in step WARMUP, then PEAK * FLOOR in the last one unless it is constant."""
    rates = [PEAK * n / WARMUP for n in range(1, WARMUP + 1)]
    for n in range(1, STEPS - WARMUP + 1):
        part = n / (STEPS - WARMUP)
        fall = {"cosine": 0.5 - 0.5 * math.cos(math.pi * part), "linear": part, "constant": 0.0}[schedule]
        rates.append(PEAK - (PEAK - PEAK * FLOOR) * fall)
    return rates


@pytest.mark.parametrize(("layout", "schedule"), [("ddp", "cosine"), ("zero2", "linear"), ("zero3", "constant")])
def test_each_step_has_its_rate_through_an_interruption(pools, tmp_path, layout, schedule):
    """The rate that is reported and the one that the optimizer takes, in all of its groups."""
    first = pools(2)(attempt, layout, schedule, tmp_path, 4)
    second = pools(2)(attempt, layout, schedule, tmp_path, None)
    expected = closed_form(schedule)
    for (reported, used), (reported_then, used_then) in zip(first, second, strict=True):
        assert len(reported) == 5  # the request is heard with the step after it
        assert reported + reported_then == pytest.approx(expected, rel=1e-12)
        assert used + used_then == [{rate} for rate in reported + reported_then]


class Watched(Pretrain):
    """Remembers the loss of each micro-batch."""

    _losses: list[float] = PrivateAttr(default_factory=list)

    def sums(self, logits, batch, training):
        sums = super().sums(logits, batch, training)
        self._losses.append(sums["loss"].item())
        return sums


def draws(layout, seed, steps, checkpointing="none"):
    """(losses of the micro-batches of each of `steps`, and of an evaluation before the last one; first gradient norm)

    All rows are the same and the weights stay as they are, so that losses differ by what dropout drew.
    """
    task = Watched()
    build_model = cases.model_builder(True, checkpointing, attention_dropout=0.3)
    engine = cases.make(layout, task=task, build_model=build_model, seed=seed)
    whole = cases.global_batch(0, 1)
    mine = {key: tensor.expand(8 // dist.get_world_size(), -1) for key, tensor in whole.items()}
    losses, norms = [], []
    for i, step in enumerate(steps):
        if i == len(steps) - 1:
            engine.evaluate([Batch(mine, 8, 0)])
            losses.append(tuple(task._losses))
            task._losses.clear()
        norms.append(engine.step(Batch(mine, 8, step), lr=0.0).grad_norm.item())
        losses.append(tuple(task._losses))
        task._losses.clear()
    engine.close()
    return losses, norms[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_of_dropout_follow_from_seed_step_rank_and_micro_batch(pools, layout):
    answers = pools(2)(draws, layout, 0, [0, 1, 0])
    seen = [loss for (steps, _) in answers for losses in steps[:2] for loss in losses]
    assert len(seen) == 2 * 2 * 2  # ranks, steps, micro-batches
    assert len(set(seen)) == len(seen)
    for (first, _, evaluated, again), _ in answers:
        assert again == first  # also after an evaluation, which draws nothing:
        assert len(set(evaluated)) == 1
        assert evaluated == answers[0][0][2]
    others = pools(2)(draws, layout, 1, [0])
    assert not set(seen) & {loss for (steps, _) in others for loss in steps[-1]}
    for (steps, norm), (kept, norm_of_kept) in zip(pools(2)(draws, "ddp", 0, [0]), answers, strict=True):
        assert kept[0] == pytest.approx(steps[-1], rel=1e-6)  # any engine draws the same
        assert norm_of_kept == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_the_backward_pass_of_checkpointed_layers_draws_the_same(pools, layout):
    (_, norm), (_, again) = (pools(2)(draws, layout, 0, [0], how)[0] for how in ("none", "full"))
    assert again == pytest.approx(norm, rel=1e-6)
