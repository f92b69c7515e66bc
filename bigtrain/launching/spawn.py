"""Start the ranks of a run on this machine, wait for them, and say what went wrong when one fails."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bigtrain.config import RunConfig, to_yaml
from bigtrain.config.environment import FAILURE_FILE, PROCESSES_WHY
from bigtrain.disk import scratch
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.resilience.requests import SIGNALS
from bigtrain.terminal import say

GRACE_SECONDS = 5.0  # between asking the other ranks to stop and killing them


def spawn(
    command: list[str], processes: int, why: str, failed: Callable[[int, str], None] = lambda _code, _reason: None
) -> int:
    """Run `command` as `processes` ranks; returns the exit code of the one that failed first; 0, or 75 (preempted).

    `why` says in words why there are as many; rank 0 shows it. `failed` is called with exit code and reason of the
    first failure, once these are printed.
    """
    with scratch() as folder:
        failures = [folder / f"rank-{rank}.json" for rank in range(processes)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        environment = {
            **inherited,  # of a torchrun around this process nothing: it does not serve these ranks' store
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            PROCESSES_WHY: why,
        }
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        environment.setdefault("OMP_NUM_THREADS", threads)
        environment.setdefault("RAYON_NUM_THREADS", threads)  # the tokenizer's: more of them wait for each other
        ranks = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(r), "LOCAL_RANK": str(r), FAILURE_FILE: str(failures[r])},
                preexec_fn=_die_with_parent(os.getpid()),
            )
            for r in range(processes)
        ]
        try:
            with _passing_on(ranks):
                code, reason = _wait(ranks, failures)
        finally:
            _stop(ranks)
    if reason is not None:
        say(reason, error=True)
        failed(code, reason)
    return code


def spawn_command(
    config: RunConfig,
    command: str,
    options: list[str],
    processes: int,
    why: str,
    failed: Callable[[int, str], None] = lambda _code, _reason: None,
) -> int:
    """`spawn` for `bigtrain COMMAND CONFIG OPTIONS`: every rank gets the file as it is resolved here."""
    with scratch() as temporary:
        resolved = temporary / "config.yaml"
        resolved.write_text(to_yaml(config), encoding="utf-8")
        return spawn([sys.executable, "-P", "-m", "bigtrain", command, str(resolved), *options], processes, why, failed)


@contextmanager
def _passing_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ranks that are asked to stop save first: what this process is asked, they are asked."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in the main thread only
        return

    def pass_on(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]], failures: list[Path]) -> tuple[int, str | None]:
    """Wait until all ranks are done or one has failed; the others have nothing to wait for then. (exit code, why one
    has failed.)"""
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(code not in (None, 0, os.EX_TEMPFAIL) for code in codes):
            _stop(ranks)
            return _explain([rank.returncode for rank in ranks], codes, failures)
        if None not in codes:
            return max(code or 0 for code in codes), None
        time.sleep(0.05)


def _explain(final: list[int], codes: list[int | None], failures: list[Path]) -> tuple[int, str]:
    """(exit code, reason) of the earliest failure."""
    told = [json.loads(file.read_text()) for file in failures if file.exists()]
    silent = [rank for rank, file in enumerate(failures) if not file.exists()]
    killed = [(rank, -(codes[rank] or 0)) for rank in silent if (codes[rank] or 0) < 0]
    if killed:  # it could tell nothing, and the others only tell of its loss
        rank, number = killed[0]
        why = "; the machine was probably out of memory" if number == signal.SIGKILL else ""
        return 1, f"rank {rank} was killed by signal {number} ({signal.Signals(number).name}){why}."
    if told:
        first = min(told, key=lambda failure: failure["time"])
        return first["code"], first["text"]
    rank = next(rank for rank, code in enumerate(codes) if code)
    code = final[rank] if final[rank] == ConfigError.exit_code else BigtrainError.exit_code
    return code, f"rank {rank} ended with exit code {final[rank]} and told nothing but what stands above."


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _die_with_parent(parent: int) -> Callable[[], None]:
    """No rank outlives a launcher that was killed (Linux; prctl(2), PR_SET_PDEATHSIG)."""

    def preexec() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return preexec


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_here(asked: int | str, device: str) -> tuple[int, str]:
    """`parallel.processes` as a number, and why it is that: `auto` is one per GPU, else 2."""
    if isinstance(asked, int):
        return asked, "as parallel.processes says"
    if device != "cpu" and any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/dxg", "/dev/kfd")):
        import torch  # only where there may be a GPU: it takes seconds

        if gpus := torch.cuda.device_count():
            return gpus, "one per GPU, as parallel.processes is auto"
    return 2, "as parallel.processes is auto and no GPU is used"
