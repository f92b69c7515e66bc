"""A session: the ranks have joined, rank 0 has begun an attempt at the run, and its events have a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import bigtrain
from bigtrain.config import RunConfig, shareable
from bigtrain.config.checks import unusual
from bigtrain.distributed.collectives import from_first
from bigtrain.distributed.consistency import check_same_folder, in_common
from bigtrain.distributed.world import World, joined
from bigtrain.inference.generation import left_out
from bigtrain.observability.events import NetworkMeasured, Started, Unusual
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Files, Reader, Stream
from bigtrain.observability.summary import Summary
from bigtrain.observability.trackers import Tracker
from bigtrain.pipeline.preflight import check_execution, try_inputs
from bigtrain.resilience.requests import Requests, TimeLimit
from bigtrain.run_folder import RunFolder


@dataclass(frozen=True)
class Session:
    """One rank's part in an attempt. stream: has readers on rank 0 alone. requests: what the run is asked for from
    outside; empty on the other ranks."""

    world: World
    folder: RunFolder
    stream: Stream
    requests: Requests


@contextmanager
def session(config: RunConfig, folder: RunFolder, restart: str | None) -> Iterator[Session]:
    """Join the other ranks and begin an attempt; collective. What rank 0 finds wrong is raised on every rank.

    restart: a stage to begin anew. Raises as `joined`, `try_inputs` and `RunFolder.begin` do.
    """
    begun = time.monotonic()
    common = in_common(shareable(config))
    with joined(config.parallel.device, config.precision, common, config.deterministic) as world:
        check_execution(config, world)
        requests = Requests()
        if world.rank == 0:
            seconds = config.time_limit_seconds
            limit = None if seconds is None else TimeLimit(seconds, begun)
            requests = Requests(folder.save_request, limit, folder.check_there)
        yield Session(world, folder, _begin(config, folder, world, restart, requests), requests)


def _begin(config: RunConfig, folder: RunFolder, world: World, restart: str | None, requests: Requests) -> Stream:
    """Begin an attempt, see that all ranks find it in the run's folder, and open its stream."""
    execution: dict[str, Any] = {
        "world_size": world.size,
        "engine": config.parallel.engine,
        "precision": config.precision,
        "device": str(world.device),
    }
    warnings = unusual(config)

    def begin() -> tuple[int, str]:
        warnings.extend(left_out(config.model, config.stages))
        origin = None if folder.is_kept() else try_inputs(config)
        return folder.begin(config, restart, origin, **execution), folder.newest_attempt() or ""

    number, attempt = from_first(begin)
    check_same_folder(folder, attempt)
    if world.rank != 0:
        return Stream()
    settings = config.model_dump(by_alias=True, mode="json")
    readers: list[Reader] = [
        Files(folder.path, number),
        Progress(),
        Summary(config.stages, folder),
        *(Tracker(name, config.name, settings, folder.path) for name in config.trackers),
        *requests.readers(),
    ]
    stream = Stream(readers)
    where, chosen = str(folder.path), world.chosen
    version, attention = bigtrain.__version__, config.attention
    stream.emit(Started(version=version, folder=where, attention=attention, chosen=chosen, **execution))
    if world.network is not None:
        stream.emit(NetworkMeasured(**asdict(world.network)))
    for text in warnings:
        stream.emit(Unusual(text=text))
    return stream
