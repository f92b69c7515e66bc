"""Who started this process, and as which rank of how many: read from the environment, and free of torch.

torchrun, deepspeed and accelerate say it in torch.distributed's own variables (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT); what srun and mpirun say is translated into them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.config.environment import FAILURE_FILE, check_settings, shown, whole
from bigtrain.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # that only a rank has
MPI = (  # rank, size, local rank, local size; those of Open MPI, and those of MPICH and Intel MPI
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
FIRST_PORT, PORTS = 10_000, 20_000  # for srun's ranks to meet at: below those that Linux gives to outgoing connections


@dataclass(frozen=True)
class Launcher:
    """why says in words why there are as many ranks; variables are torch.distributed's that it has not set itself."""

    why: str
    variables: Mapping[str, str]


def adopt() -> Launcher | None:
    """The launcher that started this process as a rank, its variables now set; None: this process is no rank yet.

    Raises ConfigError as `launcher` does, and for settings of a user that cannot be read.
    """
    check_settings()
    found = launcher(os.environ)
    if found is not None:
        os.environ.update(found.variables)
    return found


def launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Who started a process with this environment as a rank; None: nobody.

    Raises ConfigError for an environment that lacks what a rank has to know, contradicts itself, or holds what an
    earlier launcher has left.
    """
    found = _launcher(environ)
    if found is not None:
        _check({**environ, **found.variables})
    elif left := [name for name in PLACE if name in environ]:
        raise ConfigError(
            f"the environment has {_listed(left, environ)} but no RANK, so no launcher has started this process: "
            f"{_leave(environ)}. (Who starts ranks by hand sets {', '.join(RANK_VARIABLES)} in each.)"
        )
    return found


def _launcher(environ: Mapping[str, str]) -> Launcher | None:
    if "RANK" in environ:
        absent = [name for name in RANK_VARIABLES if name not in environ]
        if absent and environ.get("WORLD_SIZE") != "1":
            raise ConfigError(
                f"the environment has RANK={shown(environ['RANK'])}, but no {', '.join(absent)}: if a launcher has "
                f"started this process, set them too; else {_leave(environ)}."
            )
        return Launcher(f"as {_setter_of_rank(environ)} says", {})
    for names in MPI:
        if all(name in environ for name in names):
            return _mpirun(environ, *names)
    if "SLURM_STEP_NUM_TASKS" in environ and whole(environ, "SLURM_STEP_NUM_TASKS", 1, hint=_unset("SLURM_")) > 1:
        # sbatch's script and salloc's shell have a SLURM_PROCID too; only what srun starts has peers.
        return _srun(environ)
    for names in MPI:
        _check_half(environ, names)
    if "ACCELERATE_MIXED_PRECISION" in environ:  # set in every process of `accelerate launch`, RANK only in several
        return Launcher("as accelerate launch has started one", _variables("0", "1", "0", "1"))
    return None


def _check_half(environ: Mapping[str, str], names: tuple[str, ...]) -> None:
    """Raises ConfigError where mpirun has set some of its variables and not the others."""
    there = [name for name in names if name in environ]
    if there and environ.get(names[1]) != "1":  # srun's plug-ins set PMI_RANK and PMI_SIZE in a single task too
        absent = [name for name in names if name not in environ]
        raise ConfigError(
            f"the environment has {_listed(there, environ)}, which mpirun sets, but no {', '.join(absent)}: start all "
            f"processes with mpirun and set these too; or `unset {' '.join(there)}`, and bigtrain starts its processes "
            "itself."
        )


def _check(environ: Mapping[str, str]) -> None:
    """Raises ConfigError for a rank's variables that are no numbers, or contradict each other."""
    hint = f"Set it as the launcher has it; if no launcher has started this process, {_leave(environ)}."
    size = whole(environ, "WORLD_SIZE", 1, hint=hint)
    whole(environ, "RANK", 0, size - 1, f"WORLD_SIZE is {size}, and ranks count from 0. {hint}")
    if "LOCAL_WORLD_SIZE" in environ:
        whole(environ, "LOCAL_WORLD_SIZE", 1, size, f"WORLD_SIZE is {size}. {hint}")
    if "LOCAL_RANK" in environ:
        most = int(environ.get("LOCAL_WORLD_SIZE", size)) - 1
        whole(environ, "LOCAL_RANK", 0, most, f"It counts the processes of this host from 0. {hint}")
    if size == 1:
        return
    whole(
        environ,
        "MASTER_PORT",
        1,
        65535,
        "Set it to a port of rank 0's host, the same for all ranks. (Kubernetes sets MASTER_PORT=tcp://... in pods "
        "beside a Service named `master`: rename that, or give the pods `enableServiceLinks: false`.)",
    )
    if not re.fullmatch(r"[\w.:%-]+", environ["MASTER_ADDR"].strip()):
        raise ConfigError(
            f"MASTER_ADDR={shown(environ['MASTER_ADDR'])} in the environment is no name or address of a host. Set it "
            "to that of rank 0's host, like node0 or 10.0.0.1, without a port; MASTER_PORT has that."
        )


def _listed(names: list[str], environ: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={shown(environ[name])}" for name in names)


def _leave(environ: Mapping[str, str]) -> str:
    """How to be no rank."""
    return f"`unset {' '.join(n for n in PLACE if n in environ)}`, and bigtrain starts its processes itself"


def _unset(prefix: str) -> str:
    return f"Where no srun is meant: `unset ${{!{prefix}@}}` (bash)."


def _setter_of_rank(environ: Mapping[str, str]) -> str:
    if FAILURE_FILE in environ:
        return "bigtrain"
    if "ACCELERATE_MIXED_PRECISION" in environ:  # before torchrun, which it uses
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environ else "WORLD_SIZE"


def _mpirun(environ: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Launcher:
    """By the names of its variables. It tells nobody where rank 0 is; on one host there is nothing to tell."""
    hint = f"mpirun sets it. Where none is meant: `unset {rank} {size} {local_rank} {local_size}`."
    ranks = whole(environ, size, 1, hint=hint)
    here = whole(environ, local_size, 1, ranks, hint)
    if "MASTER_ADDR" not in environ and ranks != here:
        raise ConfigError(
            f"mpirun has started {ranks} processes on several hosts, and the environment has no MASTER_ADDR: give all "
            "of them the name of rank 0's host, like `mpirun -x MASTER_ADDR=node-a` (Open MPI) or "
            "`mpirun -genv MASTER_ADDR node-a` (MPICH, Intel MPI)."
        )
    place = (whole(environ, rank, 0, ranks - 1, hint), ranks, whole(environ, local_rank, 0, here - 1, hint), here)
    variables = _variables(*(str(number) for number in place))
    return Launcher("as mpirun says", variables | _meeting(environ, "127.0.0.1", "29500"))


def _srun(environ: Mapping[str, str]) -> Launcher:
    """https://slurm.schedmd.com/srun.html, output environment variables."""
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")
    if absent := [name for name in needed if name not in environ]:
        raise ConfigError(
            f"the environment has {_listed(['SLURM_STEP_NUM_TASKS'], environ)}, which srun sets, but no "
            f"{', '.join(absent)}: start all processes with srun. {_unset('SLURM_')}"
        )
    hint = f"srun sets it. {_unset('SLURM_')}"
    tasks = whole(environ, "SLURM_STEP_NUM_TASKS", 1, hint=hint)
    task = whole(environ, "SLURM_PROCID", 0, tasks - 1, f"SLURM_STEP_NUM_TASKS is {tasks}. {hint}")
    local_rank = whole(environ, "SLURM_LOCALID", 0, tasks - 1, hint)
    here = environ.get("SLURM_GTIDS")  # the ranks of this host
    local_size = str(len(here.split(","))) if here else None
    job, step = (whole(environ, name, 0, hint=hint) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = FIRST_PORT + (job * 31 + step) % PORTS  # other steps and jobs on the same host seldom have the same
    return Launcher(
        "as srun says",
        _variables(str(task), str(tasks), "0" if _has_own_gpus(environ) else str(local_rank), local_size)
        | _meeting(environ, first_host(environ["SLURM_STEP_NODELIST"]), str(port)),
    )


def _has_own_gpus(environ: Mapping[str, str]) -> bool:
    """Whether a task of srun sees only GPUs that no other task sees, and so counts its own from 0."""
    visible = _visible_gpus(environ)
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    if visible is not None and on_node.isdecimal() and visible < int(on_node):
        return True
    per_task = re.search(r"\d+$", environ.get("SLURM_GPUS_PER_TASK", ""))  # like 1 or a100:1
    # With --gpu-bind=none a task sees the others' too.
    return per_task is not None and (visible is None or visible <= int(per_task[0]))


def _visible_gpus(environ: Mapping[str, str]) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES lets a process see; None: it is not set, or empty.

    CUDA reads it up to the first entry that names no GPU (its programming guide, environment variables).
    """
    entries = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if entries == [""]:
        return None
    named = [re.fullmatch(r"\s*(\d+|GPU-[\w-]+|MIG-[\w/-]+)\s*", entry) is not None for entry in entries]
    return (*named, False).index(False)


def _variables(rank: str, size: str, local_rank: str, local_size: str | None) -> dict[str, str]:
    known = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    return known if local_size is None else known | {"LOCAL_WORLD_SIZE": local_size}


def _meeting(environ: Mapping[str, str], address: str, port: str) -> dict[str, str]:
    """Where the ranks meet: what a user has set wins."""
    return {"MASTER_ADDR": environ.get("MASTER_ADDR", address), "MASTER_PORT": environ.get("MASTER_PORT", port)}


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: `node[01-04,07],gpu3` -> `node01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)  # up to the first comma outside of brackets
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
