"""Consistency checks: what must be the same on all ranks, and a message by host and rank where it is not.

Versions, source and configuration are compared before there is a process group; the run's folder once rank 0 has begun
the run there.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import yaml

import bigtrain
from bigtrain.config.files import flat, literal
from bigtrain.distributed.collectives import end_together
from bigtrain.distributed.rendezvous import Member, named
from bigtrain.errors import ConfigError
from bigtrain.run_folder import VERSIONS, RunFolder

CONFIG, SIZE, DEVICE, SOURCE = "the run's file", "WORLD_SIZE", "device", "the source of bigtrain"
REMEDIES = {
    CONFIG: "start all ranks with the same file and overrides",
    SIZE: "tell all hosts of the same number of processes",
    DEVICE: "look at that host's GPU driver (nvidia-smi), or set parallel.device: cpu",
}
INSTALL = "install the same on all hosts"
SEE_SECONDS = 5.0  # that a file may take to show on another host: network disks cache what a folder holds

Result = TypeVar("Result")


def in_common(config: str) -> dict[str, str]:
    """Of this process: what has to be the same on all ranks, and what it is. config: the run's file without secrets."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        SOURCE: _source(),
        CONFIG: config,
    }


def differences_among(members: list[Member]) -> list[str]:
    """What the others have not as rank 0 has it, a line for each host and difference."""
    first, *others = members
    found: dict[tuple[str, str], list[int]] = {}
    for other in others:
        for about, theirs in other.metadata.items():
            ours = first.metadata.get(about, "nothing")
            if theirs == ours:
                continue
            values = _differing(ours, theirs) if about == CONFIG else [(about, ours, theirs)]
            remedy = REMEDIES.get(about, INSTALL)
            for name, a, b in values:
                line = f"{name} {b}, rank 0 on {first.host} has {a}; {remedy}."
                found.setdefault((other.host, line), []).append(other.rank)
    differing = [f"{named(ranks)} on {host}: {line}" for (host, line), ranks in found.items()]
    return differing + _sharing(members)


def _sharing(members: list[Member]) -> list[str]:
    """The ranks of a host that would compute on one GPU, a line for each GPU."""
    users: dict[tuple[str, str], list[int]] = {}
    for member in members:
        if member.gpu is not None:
            users.setdefault((member.host, member.gpu), []).append(member.rank)
    return [
        f"{named(ranks)} on {host} have one GPU together ({gpu}). Start as many processes as there are GPUs, let the "
        "launcher give each its own, or set parallel.device: cpu."
        for (host, gpu), ranks in users.items()
        if len(ranks) > 1
    ]


def _differing(ours: str, theirs: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, our value, their value) of two resolved run's files."""
    a, b = (dict(flat(yaml.safe_load(text))) for text in (ours, theirs))
    for key in (*a, *(key for key in b if key not in a)):
        if a.get(key) != b.get(key):
            yield f"{key}:", _told(a.get(key, "no such key")), _told(b.get(key, "no such key"))


def _told(value: Any) -> str:
    return value if isinstance(value, str) else literal(value)


def _source() -> str:
    """A fingerprint of the files of this package: of a checkout, the version alone tells nothing."""
    digest = hashlib.sha256()
    root = Path(bigtrain.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def check_same_folder(folder: RunFolder, attempt: str) -> None:
    """Raises ReportedError on every rank unless all of them see, in `folder`, the attempt that rank 0 has begun.

    attempt: its id. Collective.
    """
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (platform.node(), str(folder.path.absolute()), _sees(folder, attempt)))
    first = seen[0][0]
    blind: dict[tuple[str, str], list[int]] = {}
    for rank, (host, path, sees) in enumerate(seen):
        if not sees:
            blind.setdefault((host, path), []).append(rank)
    lines = [f"{named(ranks)} on {host}: {path}" for (host, path), ranks in blind.items()]
    text = (
        f"What rank 0 on {first} has written to {seen[0][1]} is not seen by\n  "
        + "\n  ".join(lines)
        + "\nAll ranks read and write the run's folder. Put it on a disk that all hosts share (NFS, Lustre, ...), with "
        "output=FOLDER, or run on one host."
    )
    end_together(text if lines and dist.get_rank() == 0 else "", ConfigError.exit_code)


def _sees(folder: RunFolder, attempt: str) -> bool:
    deadline = time.monotonic() + SEE_SECONDS
    while True:
        with suppress(OSError):  # a file handle of NFS may be stale
            list(folder.path.iterdir())  # makes NFS look again
            if folder.newest_attempt() == attempt:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
