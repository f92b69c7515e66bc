"""Prepare the data of a run without training: by this process, by several, or as one rank of a launcher."""

from __future__ import annotations

import os

from bigtrain.config import RunConfig
from bigtrain.launching.launchers import adopt
from bigtrain.launching.spawn import spawn_command

CORES_PER_PROCESS = 8  # that a tokenizer's threads keep busy


def prepare(config: RunConfig, processes: int | None, verify: bool) -> int:
    """Make the tokenizer and the token stores of all stages; returns the exit code.

    processes: that share the work on this machine, None for one per CORES_PER_PROCESS. verify: compare all checksums
    as well. Raises DataError for sources that cannot be read, a disk without room, and a changed byte.
    """
    cores = os.cpu_count() or 1
    processes = processes or max(1, cores // CORES_PER_PROCESS)
    if adopt() is not None or processes == 1:
        return _here(config, verify)
    return spawn_command(config, "prepare", ["--verify"] if verify else [], processes, "as --processes says")


def _here(config: RunConfig, verify: bool) -> int:
    from bigtrain.data.store import verify_store
    from bigtrain.observability.events import Preparing, Verified
    from bigtrain.observability.progress import Progress
    from bigtrain.observability.stream import Stream
    from bigtrain.pipeline.build import open_tokenizer, prepare_stages
    from bigtrain.pretrained import quiet

    quiet()
    first = int(os.environ.get("RANK", 0)) == 0
    stream = Stream([Progress()] if first else [])
    stream.emit(Preparing(what="tokenizer"))
    tokenizer = open_tokenizer(config)
    data = prepare_stages(config.stages, tokenizer, stores=config.stores, seed=config.seed, stream=stream)
    if verify and first:
        stream.emit(Preparing(what="checksums"))
        stores = [store.folder for stage in data.values() for store in (*stage.train, *stage.held_out)]
        for folder in dict.fromkeys(stores):
            stream.emit(Verified(folder=str(folder), bytes=verify_store(folder)))
    return 0
