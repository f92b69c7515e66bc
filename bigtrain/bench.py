"""`bigtrain bench`: how fast the steps of a stage are on this machine, and where their time goes.

The steps are real ones: the stage's data, its engine and the training loop, on random weights with a learning rate of
0. Nothing is kept but the token stores. First undisturbed steps are timed; then a few more are looked at with torch's
profiler, for the shares of their parts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.optim.optimizer import register_optimizer_step_post_hook

from bigtrain.checkpoint import NoSaver
from bigtrain.config import RunConfig, shareable
from bigtrain.config.schema import StageConfig
from bigtrain.data.batches import Batch, Prefetched
from bigtrain.data.prepare import prepare_stage
from bigtrain.distributed.consistency import in_common
from bigtrain.distributed.world import joined
from bigtrain.models.architecture import model_config
from bigtrain.models.flops import Arithmetic, arithmetic, peak_flops
from bigtrain.models.weights import RandomWeights
from bigtrain.observability.console import console
from bigtrain.observability.events import Event, Step
from bigtrain.observability.profiler import quiet_profile
from bigtrain.observability.progress import plural
from bigtrain.observability.stream import Stream
from bigtrain.parallel.engine import Engine
from bigtrain.parallel.task_module import TaskModule
from bigtrain.pipeline.build import StageBuilder, compiling, open_tokenizer, training_batches
from bigtrain.pipeline.preflight import check_execution
from bigtrain.pretrained import quiet
from bigtrain.resilience.requests import Requests
from bigtrain.training.loop import train
from bigtrain.training.reports import Reports
from bigtrain.training.run import StageRun

WARMUP = 3  # steps that are not counted
PROFILED = 3  # steps under the profiler
PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
MARK = "bigtrain: "  # begins the names of our own ranges in a profile

Interval = tuple[str, float, float]  # kind, begin, end


class Measured(NamedTuple):
    """Seconds of each undisturbed step; seconds of each of PARTS in a profiled step; peak memory in bytes of rank 0."""

    seconds: list[float]
    parts: dict[str, float]
    memory: int


def bench_here(config: RunConfig, stage: StageConfig, steps: int) -> None:
    """Measure `steps` steps of a stage with this process as one rank; rank 0 prints what was found."""
    quiet()
    with joined(config.parallel.device, config.precision, in_common(shareable(config)), config.deterministic) as world:
        check_execution(config, world)
        tokenizer = open_tokenizer(config)
        data = prepare_stage(stage, stage.task, tokenizer, stores=config.stores, seed=config.seed)
        model = model_config(config.model, tokenizer, config.adds_tokens, stage.task.model_kind)
        builder = StageBuilder.of(config, stage, model, world)
        empty = builder.empty_model(meta=True)
        engine = builder.engine()
        engine.load(RandomWeights(empty, config.seed), {"updates": 0})
        sequences = (WARMUP + steps + PROFILED) * stage.global_batch_size
        batches = training_batches(stage, data, config.seed, builder.dims, sequences)
        with Prefetched(batches, pin=world.device.type == "cuda") as prefetched:
            rows = _timed(stage, engine, prefetched, WARMUP + steps)
            parts = _profiled(engine, prefetched, range(WARMUP + steps, batches.steps), world.device)
        engine.close()
    if world.rank == 0:
        seconds = [row.step_seconds for row in rows[WARMUP:]]
        measured = Measured(seconds, parts, rows[-1].memory_bytes)
        _show(builder, empty.config.model_type, arithmetic(empty, stage.sequence_length), measured)


def _timed(stage: StageConfig, engine: Engine, batches: Callable[[int], Batch], steps: int) -> list[Step]:
    """Train as a run does, without evaluating or saving; the rows that it reports of its steps."""
    events: list[Event] = []
    run = StageRun(
        sequences=steps * stage.global_batch_size,
        global_batch_size=stage.global_batch_size,
        sequence_length=stage.sequence_length,
        learning_rate=lambda *_: 0.0,
        reports=Reports(stage.name, Stream([events.append]), skips_overflows=True),  # of random weights in fp16
    )
    with compiling(stage.name):
        train(run, engine, batches, evaluate=dict, saver=NoSaver(), requests=Requests())
    return [event for event in events if isinstance(event, Step)]


def _profiled(engine: Engine, batches: Callable[[int], Batch], steps: range, device: torch.device) -> dict[str, float]:
    """Seconds of each of PARTS in a step, its share of the profiled steps."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    waits = register_optimizer_step_post_hook(lambda *_: wait())
    with (
        _marked(TaskModule, "forward", "forward", wait),
        _marked(torch.Tensor, "backward", "backward", wait),
        quiet_profile() as profile,
    ):
        for step in steps:
            with record_function(f"{MARK}step"):
                with record_function(f"{MARK}data"):
                    batch = batches(step)
                engine.step(batch, lr=0.0).loss.item()
    waits.remove()
    events = profile.events()
    main = next(event.thread for event in events if event.name == f"{MARK}step")
    intervals = [(_kind(event, main, device), event.time_range.start, event.time_range.end) for event in events]
    return {part: microseconds / 1e6 / len(steps) for part, microseconds in split(intervals).items()}


@contextmanager
def _marked(owner: type, method: str, mark: str, wait: Callable[[], None]) -> Iterator[None]:
    """Show the calls of a method as ranges of the profile. On a GPU the host waits for the device at both ends, so
    that the range is also the device's."""
    plain = getattr(owner, method)

    @wraps(plain)
    def marked(*args: Any, **kwargs: Any) -> Any:
        wait()
        with record_function(f"{MARK}{mark}"):
            result = plain(*args, **kwargs)
            wait()
        return result

    setattr(owner, method, marked)
    try:
        yield
    finally:
        setattr(owner, method, plain)


def _kind(event: FunctionEvent, main: int, device: torch.device) -> str:
    """What an event of the profile is to `split`; empty for nothing. On the CPU collectives run in threads of their
    own while the `main` thread computes; on a GPU both are kernels."""
    name = event.name
    if event.device_type != DeviceType.CPU:
        kernel = "communication" if "nccl" in name.lower() else "computation"
        return "" if event.is_user_annotation else kernel
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    if name.startswith("Optimizer.step#"):
        return "optimizer"
    if device.type == "cpu" and name.startswith(("gloo:", "c10d::")):
        return "communication"
    computes = device.type == "cpu" and event.thread == main and name.startswith(("aten::", "## Call CompiledFxGraph"))
    return "computation" if computes else ""


def split(intervals: Iterable[Interval]) -> dict[str, float]:
    """The time within `step` intervals, divided among PARTS so that they add up to it.

    A moment belongs to communication if a collective is under way and nothing is computed; else to the interval of
    data, forward, backward or optimizer that it lies in; else to other. What is computed while a collective runs
    belongs to the computation: that communication is hidden.
    """
    ends = sorted((time, change, kind) for kind, begin, end in intervals for time, change in ((begin, 1), (end, -1)))
    running: Counter[str] = Counter()
    found = dict.fromkeys(PARTS, 0.0)
    before = 0.0
    for time, change, kind in ends:
        if running["step"]:
            found[_part(running)] += time - before
        running[kind] += change
        before = time
    return found


def _part(running: Counter[str]) -> str:
    if running["communication"] and not running["computation"]:
        return "communication"
    return next((part for part in ("data", "optimizer", "forward", "backward") if running[part]), "other")


def _show(builder: StageBuilder, model: str, needed: Arithmetic | None, measured: Measured) -> None:
    out = console()
    stage, parallel, world = builder.stage, builder.parallel, builder.world
    tokens, seconds = stage.global_batch_size * stage.sequence_length, statistics.median(measured.seconds)
    compiled = " · compiled" if parallel.compile else ""
    lines = [
        f"{stage.name}: {model} · {plural(world.size, 'process', 'processes')} · {parallel.engine}{compiled} · "
        f"{builder.precision} · {world.device.type} · "
        f"{stage.global_batch_size} x {stage.sequence_length} tokens a step",
        f"  step        {seconds * 1e3:.1f} ms, median of {len(measured.seconds)} "
        f"({min(measured.seconds) * 1e3:.1f} to {max(measured.seconds) * 1e3:.1f}), after {WARMUP} to warm up",
        f"  speed       {tokens / seconds:,.0f} tokens per second, {tokens / seconds / world.size:,.0f} per process",
        f"  memory      {measured.memory / 2**30:.2f} GiB at most, of rank 0",
        *_arithmetic_lines(needed, tokens / seconds / world.size, world.device, builder.precision),
    ]
    for line in lines:
        out.print(line)
    out.print(_parts_table(measured.parts, seconds))
    slower = sum(measured.parts.values()) / seconds
    out.print(
        f"  Shares of {PROFILED} more steps on rank 0 under the profiler, where a step took {slower:.2f} x as long.\n"
        "  communication: a collective was under way, and nothing was computed that would hide it.\n"
        "  other: the gradient's norm and clipping, counting targets, the engine's own copies.",
    )


def _arithmetic_lines(needed: Arithmetic | None, speed: float, device: torch.device, precision: str) -> Iterator[str]:
    """speed: tokens per second of one process."""
    if needed is None:
        yield "  arithmetic  not counted: in a mixture of experts a token does not meet all parameters"
        return
    achieved = speed * needed.flops_per_token
    yield f"  arithmetic  {needed}"
    yield f"  achieved    {achieved / 1e12:.4g} TFLOP/s per process: tokens per second x FLOP per token"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_flops(gpu) if gpu and precision != "fp32" else None
    if peak is None:
        yield f"  MFU         not known: no peak is known of {gpu or 'this CPU'} in {precision}"
    else:
        yield f"  MFU         {achieved / peak:.1%}: achieved / {peak / 1e12:.0f} TFLOP/s ({gpu}, dense bf16 and fp16)"


def _parts_table(parts: dict[str, float], seconds: float) -> Table:
    """parts: seconds of a profiled step; shown as shares of a step of `seconds`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("  part", "ms", "share"):
        table.add_column(heading, justify="left" if heading == "  part" else "right")
    whole = sum(parts.values())
    for name, part in {**parts, "step": whole}.items():
        table.add_row(f"  {name}", f"{part / whole * seconds * 1e3:.1f}", f"{part / whole:.1%}")
    return table
