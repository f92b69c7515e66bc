"""Run functions on N gloo ranks: real processes and a real process group, kept between calls.

Starting ranks is what costs, so a `Ranks` pool carries many cases; `multiprocessing.set_forkserver_preload` may name
what they import:

    with Ranks(2) as ranks:
        results = ranks(function, argument, keyword=...)   # one result per rank, in order

`function` must be importable (a module's own function) and is called on every rank.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from bigtrain.launching.spawn import free_port


class RankFailed(AssertionError):
    """A rank raised or died; the message is its traceback."""


class Ranks:
    """A pool of `size` processes, each a rank of one gloo process group with one thread."""

    def __init__(self, size: int, timeout: float = 300.0, method: Literal["forkserver", "spawn"] = "forkserver"):
        """timeout: of a call, in seconds. method: of multiprocessing; what spawn starts reads the environment anew."""
        self.size = size
        self._method = method
        self.timeout = timeout
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> Ranks:
        context: Any = multiprocessing.get_context(self._method)
        port = free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, port), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()  # every answer is there, and taking a group down in order takes seconds
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function` on every rank. Raises RankFailed with the first failing rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            ready: list[Any] = wait([p for i, p in enumerate(self._pipes) if i not in results], self.timeout)
            if not ready:
                self._kill()
                raise RankFailed(f"ranks {sorted(set(range(self.size)) - set(results))} gave no answer")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    failed, value = pipe.recv()
                except EOFError:
                    failed, value = True, f"died with exit code {self._processes[rank].exitcode}"
                if failed:
                    self._kill()  # the others may wait for this one for ever
                    raise RankFailed(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return  # whoever has started it is gone
        try:
            pipe.send((False, function(*args, **kwargs)))
        except BaseException:  # noqa: BLE001 - handed to the caller, who raises it
            pipe.send((True, traceback.format_exc()))
