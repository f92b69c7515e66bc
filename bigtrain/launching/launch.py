"""`bigtrain launch`: start a run with another launcher, or print the command or the script that does. Free of torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bigtrain.config import load
from bigtrain.errors import ConfigError, nearest
from bigtrain.launching import clusters, commands
from bigtrain.launching.foresight import warnings
from bigtrain.launching.job import PORT, Job
from bigtrain.launching.spawn import processes_here
from bigtrain.masking import MASK, masked
from bigtrain.terminal import printable, say, show

CLUSTERS = {"slurm": clusters.slurm, "kubernetes": clusters.kubernetes}
SUBMITTED_WITH = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "apply", "-f", "-"]}
GPUS_OF_A_NODE = 8  # of a cluster's, where this machine cannot be asked


@dataclass(frozen=True)
class Asked:
    """The words of `bigtrain launch`; None: not given. processes is of each node."""

    config: str
    overrides: tuple[str, ...]
    launcher: str
    nodes: int = 1
    processes: int | None = None
    head: str | None = None
    hostfile: str | None = None
    image: str | None = None


def launch(asked: Asked, print_only: bool) -> int:
    """Print the script (`print_only`), or start it; returns an exit code, if this process has not become the launcher.

    Raises ConfigError for wrong input, and for a launcher that is not on this machine.
    """
    job = plan(asked, here=not print_only)
    if not print_only:
        _check_programs(job)
    mounted = clusters.mounted(job) if job.launcher == "kubernetes" else None
    for text in warnings(job, mounted):
        say(f"warning: {text}", error=True)
    if print_only:
        show(_without_secrets(script(job)), end="")
        return 0
    if job.launcher in CLUSTERS:
        return _submit(job)
    return _become(job)


def _without_secrets(text: str) -> str:
    """A script to be shown: secrets of its overrides are left out, and it says so."""
    shown = masked(text)
    if shown == text:
        return text
    note = f"# {MASK} stands for a secret of an override: write that value into the run's file, not into a script.\n"
    first, newline, rest = shown.partition("\n")
    return f"{first}{newline}{note}{rest}"


def plan(asked: Asked, here: bool) -> Job:
    """Check what was asked for. here: the launcher is to be started on this machine, which must have what it names."""
    _check_options(asked)
    here = here and asked.launcher not in CLUSTERS
    loaded = load(asked.config, asked.overrides, here=here)
    processes, why = _processes(asked, loaded.run.parallel.processes, loaded.run.parallel.device)
    total = f"parallel.processes={asked.nodes * processes}"
    loaded = load(asked.config, [*asked.overrides, total], here=here)  # the rules about it hold for all nodes together
    if here and asked.hostfile is not None:
        _check_hosts(Path(asked.hostfile), asked.nodes)
    return Job(
        loaded,
        asked.config,
        asked.overrides,
        asked.launcher,
        asked.nodes,
        processes,
        why,
        _made_by(asked),
        None if asked.head is None else _head(asked.head),
        asked.hostfile,
        asked.image,
    )


def script(job: Job) -> str:
    """What `--print` prints: a script with a comment on each of its settings."""
    return CLUSTERS[job.launcher](job) if job.launcher in CLUSTERS else commands.script(job)


def _check_options(asked: Asked) -> None:
    for word in (asked.config, *asked.overrides, asked.head, asked.hostfile, asked.image):
        if word is not None and printable(word) != word:
            raise ConfigError(f"{word}: a script cannot show control characters; give another name, or use the file.")
    known = (*commands.COMMANDS, *CLUSTERS)
    if asked.launcher not in known:
        raise ConfigError(f"--with {asked.launcher}: there is no such launcher; {nearest(asked.launcher, known)}")
    for option, count in ("--nodes", asked.nodes), ("--processes", asked.processes):
        if count is not None and count < 1:
            raise ConfigError(f"{option} {count}: must be at least 1.")
    several = asked.nodes > 1
    for option, value, launchers, example in (
        ("--head", asked.head, ("torchrun", "accelerate") if several else (), "the name of one of them, like node0"),
        (
            "--hostfile",
            asked.hostfile,
            ("deepspeed",) if several else (),
            "a file of lines like `node0 slots=8`",
        ),
        ("--image", asked.image, ("kubernetes",), "a container image that bigtrain is installed in"),
    ):
        nodes = f" on {asked.nodes} nodes" if several else ""
        if value is None and asked.launcher in launchers:
            raise ConfigError(f"{option}: {asked.launcher}{nodes} needs it: {example}.")
        if value is not None and asked.launcher not in launchers:
            raise ConfigError(f"{option}: {asked.launcher}{nodes or ' on one node'} has no use for it; leave it out.")
    if asked.head is not None:
        _head(asked.head)
    if asked.launcher == "deepspeed" and several:
        _check_words(asked)


def _check_words(asked: Asked) -> None:
    """DeepSpeed has a shell read its words again on each node, and quotes only those with a space in them."""
    for word in (asked.config, *asked.overrides):
        safe = r"[\w@+=:,./-]*|(?=.* )[\w@+=:,./{}\[\]()*?'~#&;<>|^ -]*"
        if not re.fullmatch(safe, word, re.ASCII):
            raise ConfigError(
                f"{word}: the shells through which deepspeed reaches the nodes would change this; "
                "write the value into the run's file, and use plain names."
            )


def _processes(asked: Asked, configured: int | str, device: str) -> tuple[int, str]:
    """How many on each node, and why."""
    if asked.processes is not None:
        return asked.processes, "as --processes says"
    if asked.nodes > 1 and isinstance(configured, int):
        raise ConfigError(
            f"--processes: is needed with several nodes, as parallel.processes ({configured}) does not say "
            "how many run on each of them."
        )
    if configured == "auto" and asked.launcher in CLUSTERS:
        return (
            GPUS_OF_A_NODE,
            "as parallel.processes is auto and --processes not given",
        )
    return processes_here(configured, device)


def _head(head: str) -> tuple[str, int]:
    found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?", head)
    port = int(found[2] or PORT) if found else 0
    if found is None or not 0 < port < 2**16:
        raise ConfigError(f"--head {head}: is no HOST or HOST:PORT, like node0 or node0:{PORT}.")
    return found[1], port


def _check_hosts(file: Path, nodes: int) -> None:
    """DeepSpeed itself would go on with this machine alone, or with fewer nodes, and only mention it."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {file}: cannot be read: {error.strerror or error}.") from None
    hosts = [line for line in lines if re.match(r"\s*[^#\s]\S*\s+slots=\d+", line)]
    if len(hosts) < nodes:
        raise ConfigError(f"--hostfile {file}: has {len(hosts)} lines like `node0 slots=8`, --nodes asks for {nodes}.")


def _made_by(asked: Asked) -> tuple[str, ...]:
    words = ["bigtrain", "launch", asked.config, *asked.overrides, "--with", asked.launcher]
    words += ["--nodes", str(asked.nodes)] if asked.nodes > 1 else []
    words += ["--processes", str(asked.processes)] if asked.processes is not None else []
    for option, value in (("--head", asked.head), ("--hostfile", asked.hostfile), ("--image", asked.image)):
        words += [option, value] if value is not None else []
    return (*words, "--print")


def _become(job: Job) -> NoReturn:
    """Replace this process by the launcher."""
    command = commands.COMMANDS[job.launcher](job)
    each = f"; run the same on each of the {job.nodes} nodes" if job.nodes > 1 and job.head is not None else ""
    say(f"starting {shlex.join(command.words)}{each}")
    environ = {**os.environ, "PYTHONSAFEPATH": "1"}  # in the ranks too, no module comes from the working folder
    os.execvpe(command.here[0], command.here, environ)  # noqa: S606 - no shell is wanted


def _submit(job: Job) -> int:
    command = SUBMITTED_WITH[job.launcher]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # sbatch hands it on to the job
    done = subprocess.run(command, input=script(job), text=True, env={**os.environ, "PATH": path}, check=False)
    return 0 if done.returncode == 0 else 1


def _check_programs(job: Job) -> None:
    """Raises ConfigError where this machine lacks a program that starts the job."""
    program = SUBMITTED_WITH[job.launcher][0] if job.launcher in CLUSTERS else None
    if job.launcher == "deepspeed" and job.nodes > 1:
        program = "pdsh"
    if program is not None and shutil.which(program) is None:
        raise ConfigError(
            f"--with {job.launcher}: {program} is not on the PATH of this machine; install it, or take what --print "
            "prints to a machine that has it."
        )
