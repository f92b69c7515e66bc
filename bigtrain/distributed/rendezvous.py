"""Rendezvous: each rank registers at rank 0's store, before there is a process group; no rank waits for ever.

A rank that is missing, or differs from the others, would hang the process group. It is reported here instead.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from bigtrain.config.environment import JOIN_SECONDS, join_seconds, tell
from bigtrain.errors import BigtrainError, ConfigError, ReportedError, shorten
from bigtrain.terminal import say

NOTICE_SECONDS = 30.0  # of waiting, until it is said for whom
LEAVE_SECONDS = 5.0  # that rank 0 keeps its store open for the others to read why all leave
INTERFACES = (
    "On hosts with several networks, MASTER_ADDR has to be an address in the one that all hosts share, and "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name its interface, like eth0, on each host."
)
_SERVED: set[int] = set()  # ports of the stores that this process serves
_RENDEZVOUS = itertools.count()  # of this process; all ranks count alike, and a launcher's store outlives a rendezvous


@dataclass(frozen=True)
class Member:
    """A rank, its host's name, metadata that must be the same on all ranks (name -> text), and what tells its
    GPU from the others of the host, if it has one."""

    rank: int
    host: str
    metadata: dict[str, str]
    gpu: str | None = None


def rendezvous(
    rank: int,
    size: int,
    metadata: dict[str, str],
    differences_among: Callable[[list[Member]], list[str]],
    gpu: str | None = None,
) -> tuple[dist.Store, int]:
    """Wait until all ranks are there and agree; returns the store that they share, and the number of their hosts.

    Collective. Raises ReportedError on all ranks when some are missing or `differences_among` (called on rank 0, with
    the members in order of rank) returns any, and BigtrainError on a rank that cannot reach rank 0.
    """
    deadline = time.monotonic() + join_seconds()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"bigtrain/{restart}/{next(_RENDEZVOUS)}", _store(rank, deadline))
    if store.add(f"claims/{rank}", 1) > 1:
        raise BigtrainError(f"rank {rank} on {platform.node()}: another process has come as rank {rank} already.")
    store.set(f"member/{rank}", json.dumps(asdict(Member(rank, platform.node(), metadata, gpu))))
    if rank == 0:
        return store, _lead(store, size, deadline, differences_among)
    try:
        store.wait(["verdict"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + NOTICE_SECONDS))
        verdict = json.loads(store.get("verdict"))
    except dist.DistError as error:
        reason = f"rank 0 at {_address()} has gone ({first_line(error)})"
        raise BigtrainError(f"rank {rank} on {platform.node()}: {reason}. Look for what it says.") from None
    if verdict["text"]:
        store.set(f"left/{rank}", "")
        raise ReportedError(verdict["text"], verdict["exit_code"])
    if size != verdict["size"]:  # a rank that rank 0 does not wait for
        raise BigtrainError(
            f"rank {rank} on {platform.node()}: WORLD_SIZE is {size} here and {verdict['size']} at rank 0; tell all "
            "hosts of the same number of processes."
        )
    return store, verdict["hosts"]


def _lead(store: dist.Store, size: int, deadline: float, differences_among: Callable[[list[Member]], list[str]]) -> int:
    """Rank 0's part: it waits for the others, judges, and tells before any rank may leave."""
    missing = _missing(store, size, deadline)
    present = [rank for rank in range(size) if rank not in missing]
    members = [Member(**json.loads(text)) for text in store.multi_get([f"member/{rank}" for rank in present])]
    hosts = len({member.host for member in members})
    if missing:
        text, exit_code = _absent(missing, size), BigtrainError.exit_code
    else:
        text, exit_code = "\n".join(differences_among(members)), ConfigError.exit_code
    if text:
        tell(text, exit_code)
    store.set("verdict", json.dumps({"text": text, "exit_code": exit_code, "hosts": hosts, "size": size}))
    if text:
        with suppress(dist.DistError):
            store.wait([f"left/{rank}" for rank in present if rank], timedelta(seconds=LEAVE_SECONDS))
        raise ReportedError(text, exit_code)
    return hosts


def _missing(store: dist.Store, size: int, deadline: float) -> list[int]:
    """The ranks that have not come until the deadline."""
    notice = time.monotonic() + NOTICE_SECONDS
    while not store.check([f"member/{rank}" for rank in range(size)]):
        now = time.monotonic()
        if now > deadline or now > notice:
            missing = [rank for rank in range(size) if not store.check([f"member/{rank}"])]
            if now > deadline:
                return missing
            left = "if no launcher has started this process, unset RANK and WORLD_SIZE"
            say(f"rank 0 at {_address()} waits for {named(missing)} of {size}; {left}", error=True)
            notice = deadline + 1
        time.sleep(0.05)
    return []


def on_one_host() -> bool:
    """Whether no rank is on another host, as the launcher's variables say."""
    size, address = os.environ.get("WORLD_SIZE", "1"), os.environ.get("MASTER_ADDR", "")
    return os.environ.get("LOCAL_WORLD_SIZE") == size or address in ("localhost", "::1") or address.startswith("127.")


def _store(rank: int, deadline: float) -> dist.Store:
    """A client of the store at MASTER_ADDR, which rank 0 serves unless torchrun does; of ranks of one host over the
    loopback interface alone. Raises BigtrainError."""
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served_by_torchrun
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if serves or (on_one_host() and not served_by_torchrun):
        host = "127.0.0.1"  # whoever gave rank 0's host another address, the others will say so
    if not serves:
        _reach(rank, host, port, deadline)
    try:
        return _answering(host, port, serves, deadline)
    except OSError as error:
        raise BigtrainError(_taken(port, error.strerror or str(error))) from None
    except dist.DistError as error:
        if serves:
            raise BigtrainError(_taken(port, first_line(error))) from None
        raise BigtrainError(_unreached(rank, first_line(error))) from None


def _answering(host: str, port: int, serves: bool, deadline: float) -> dist.Store:
    """The store, once it answers. Raises dist.DistError, OSError for a port that another program has, and
    BigtrainError when nothing has answered at the deadline: a client's constructor itself would wait for ever."""
    made: list[dist.Store | Exception] = []
    # of several hosts rank 0 listens at every address, as it does not know which one the others use
    listener = _loopback_listener(port) if serves and on_one_host() else None

    def make() -> None:
        try:
            made.append(
                dist.TCPStore(
                    host,
                    port,
                    is_master=serves,
                    timeout=timedelta(seconds=join_seconds()),
                    wait_for_workers=False,  # it would not say for whom it waits
                    multi_tenant=True,
                    master_listen_fd=listener,
                )
            )
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
            made.append(error)

    thread = threading.Thread(target=make, name="store", daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if not made:
        raise BigtrainError(
            f"{platform.node()}: what listens at {host}:{port} accepts connections and does not answer as rank 0's "
            f"store does, within {join_seconds():.0f} s. Another program has that port, or rank 0 hangs: choose "
            "another MASTER_PORT, the same for all ranks, and look for what rank 0 says. "
            f"({JOIN_SECONDS} changes how long to wait.)"
        )
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


def _loopback_listener(port: int) -> int | None:
    """A file descriptor that listens on the loopback interface alone; None where this process serves the port already.

    Raises OSError for a port that another program has.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError:
        if port in _SERVED:
            return None
        raise
    _SERVED.add(port)
    return listener.detach()


def _taken(port: int, reason: str) -> str:
    return (
        f"rank 0 on {platform.node()} cannot use port {port} (MASTER_PORT): {reason}. "
        "Another run may have it: choose another, the same on all hosts."
    )


def _reach(rank: int, host: str, port: int, deadline: float) -> None:
    """Wait until somebody listens there. Raises BigtrainError at the deadline."""
    notice = time.monotonic() + NOTICE_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            now = time.monotonic()
            if now > deadline:
                raise BigtrainError(_unreached(rank, error.strerror or str(error))) from None
            if now > notice:
                why = error.strerror or error
                say(f"rank {rank} on {platform.node()} waits for rank 0 at {_address()}: {why}", error=True)
                notice = deadline + 1
            time.sleep(0.1)


def _unreached(rank: int, reason: str) -> str:
    return (
        f"rank {rank} on {platform.node()} cannot reach rank 0 at {_address()}: {reason}. Check that MASTER_ADDR is "
        "the host of rank 0, by a name or address that this host knows, that MASTER_PORT is the same everywhere and no "
        f"firewall closes it, and that rank 0 has been started. {INTERFACES} (Waited {join_seconds():.0f} s; "
        f"{JOIN_SECONDS} changes that.)"
    )


def _absent(missing: list[int], size: int) -> str:
    return (
        f"{named(missing)} of {size} did not come to rank 0 on {platform.node()}, {_address()}, within "
        f"{join_seconds():.0f} s. Look for what these ranks say, and check that they were started, with the same "
        f"MASTER_ADDR, MASTER_PORT and WORLD_SIZE. {INTERFACES} ({JOIN_SECONDS} changes how long to wait.)"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def named(ranks: list[int]) -> str:
    """In words: `rank 3`, or `ranks 0, 1, 6`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {shorten([str(rank) for rank in ranks])}"


def first_line(error: Exception) -> str:
    """What an error of torch says, without the C++ frames."""
    return str(error).strip().splitlines()[0].rstrip(".")
