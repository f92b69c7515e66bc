"""Who started this process, and as which rank of how many: read from the environment, and free of torch.

torchrun, deepspeed and accelerate say it in torch.distributed's own variables (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT); what srun and mpirun say is translated into them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.config.environment import FAILURE_FILE
from bigtrain.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
    """The launcher that started this process as a rank, its variables now set; None: this process is no rank yet."""
    found = launcher(os.environ)
    if found is not None:
        os.environ.update(found.variables)
    return found


def launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Who started a process with this environment as a rank; None: nobody.

    Raises ConfigError for an environment that lacks what a rank has to know.
    """
    if "RANK" in environ:
        absent = [name for name in RANK_VARIABLES if name not in environ]
        if absent and environ.get("WORLD_SIZE") != "1":
            raise ConfigError(f"the environment has RANK={environ['RANK']}, but no {', '.join(absent)}: set them too.")
        return Launcher(f"as {_setter_of_rank(environ)} says", {})
    for rank, size, local_rank, local_size in MPI:
        if all(name in environ for name in (rank, size, local_rank, local_size)):
            return _mpirun(environ, environ[rank], environ[size], environ[local_rank], environ[local_size])
    # sbatch's script and salloc's shell have a SLURM_PROCID too; only what srun starts has peers.
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return _srun(environ)
    if "ACCELERATE_MIXED_PRECISION" in environ:  # set in every process of `accelerate launch`, RANK only in several
        return Launcher("as accelerate launch has started one", _variables("0", "1", "0", "1"))
    return None


def _setter_of_rank(environ: Mapping[str, str]) -> str:
    if FAILURE_FILE in environ:
        return "bigtrain"
    if "ACCELERATE_MIXED_PRECISION" in environ:  # before torchrun, which it uses
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environ else "WORLD_SIZE"


def _mpirun(environ: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Launcher:
    """mpirun tells nobody where rank 0 is; on one host there is nothing to tell."""
    if "MASTER_ADDR" not in environ and size != local_size:
        raise ConfigError(
            f"mpirun has started {size} processes on several hosts, and the environment has no MASTER_ADDR: give all "
            "of them the name of rank 0's host, like `mpirun -x MASTER_ADDR=node-a` (Open MPI) or "
            "`mpirun -genv MASTER_ADDR node-a` (MPICH, Intel MPI)."
        )
    return Launcher(
        "as mpirun says", _variables(rank, size, local_rank, local_size) | _meeting(environ, "127.0.0.1", "29500")
    )


def _srun(environ: Mapping[str, str]) -> Launcher:
    """https://slurm.schedmd.com/srun.html, output environment variables."""
    local_rank = "0" if _has_own_gpus(environ) else environ["SLURM_LOCALID"]
    here = environ.get("SLURM_GTIDS")  # the ranks of this host
    local_size = str(len(here.split(","))) if here else None
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    port = FIRST_PORT + (job * 31 + step) % PORTS  # other steps and jobs on the same host seldom have the same
    return Launcher(
        "as srun says",
        _variables(environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"], local_rank, local_size)
        | _meeting(environ, first_host(environ["SLURM_STEP_NODELIST"]), str(port)),
    )


def _has_own_gpus(environ: Mapping[str, str]) -> bool:
    """Whether a task of srun sees only GPUs that no other task sees, and so counts its own from 0."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1 if environ.get("CUDA_VISIBLE_DEVICES") else None
    if visible is not None and visible < int(environ.get("SLURM_GPUS_ON_NODE", 0)):
        return True
    per_task = re.search(r"\d+$", environ.get("SLURM_GPUS_PER_TASK", ""))  # like 1 or a100:1
    # With --gpu-bind=none a task sees the others' too.
    return per_task is not None and (visible is None or visible <= int(per_task[0]))


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
