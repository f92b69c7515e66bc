"""The scripts for clusters: a Slurm batch script, and the objects that Kubernetes makes a run of. Free of torch."""

from __future__ import annotations

import math
import os.path
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from bigtrain.config.texts import written
from bigtrain.errors import ConfigError
from bigtrain.launching.foresight import room
from bigtrain.launching.job import PORT, SAVE_SECONDS, SIGNALS, Job, filled, for_torchrun
from bigtrain.run_folder import RunFolder

WORKPLACE = "/workspace"  # the folder of a pod that relative paths of the run's file start from
CPUS, MEMORY, SHARED_MEMORY = 8, 8, 1  # of a process: cores; GiB of its own; GiB that it shares with the others
CONFIG = "/etc/bigtrain/config.yaml"  # where a pod finds the run's file


def slurm(job: Job) -> str:
    """A batch script: srun starts the ranks, and a run that is interrupted saves and goes back into the queue."""
    return filled(
        "slurm.sbatch",
        headline=job.headline(),
        origin=job.origin(),
        name=job.name,
        nodes=job.nodes,
        processes=job.processes,
        gpus=f"#SBATCH --gpus-per-node={job.processes}\n" if job.uses_gpus else "",
        seconds=SAVE_SECONDS,
        mark=shlex.quote(str(RunFolder(job.loaded.run.folder).preempted)),
        command=shlex.join(["bigtrain", *job.arguments]),
    )


def kubernetes(job: Job) -> str:
    """An indexed Job whose pods meet at the first one, with what it needs: a Service, the run's file, a shared disk."""
    assert job.image is not None
    name, folder, needs = _object_name(job), mounted(job), room(job)
    output = _output(job)
    text = Path(job.config).read_text(encoding="utf-8-sig")
    return filled(
        "kubernetes.yaml",
        headline=job.headline(),
        origin=job.origin(),
        name=name,
        nodes=job.nodes,
        failures=3 * job.nodes,
        image=_yaml(job.image, '"'),
        output=_yaml(output, '"'),
        folder=_yaml(folder, '"'),
        storage=f"{needs.disk or 1024}Gi",
        room=needs.told,
        cpus=CPUS * job.processes,
        memory=f"{(MEMORY + SHARED_MEMORY) * job.processes + needs.memory}Gi",
        shared=f"{SHARED_MEMORY * job.processes}Gi",
        limits=f"{{nvidia.com/gpu: {job.processes}}}" if job.uses_gpus else "{}",
        grace=SAVE_SECONDS + 60,
        port=PORT,
        command=_indented(_yaml(_pod_command(job, name), '"'), 12),
        config=_indented(_yaml({os.path.basename(CONFIG): text}, "|"), 2),  # noqa: PTH119 - a path in a pod
        mount=os.path.dirname(CONFIG),  # noqa: PTH120
    )


def mounted(job: Job) -> str:
    """The folder of a pod that is on the shared disk, and from which relative paths start.

    Raises ConfigError for an `output` that means another folder there than here.
    """
    there, here = job.loaded.document.values.get("output"), job.loaded.run.output
    if there not in (None, here, written(here)):
        raise ConfigError(
            f"output: {there} is {here} here, and another folder in the pods, which have a home and "
            "variables of their own; for kubernetes write the path itself, like runs or /shared/runs."
        )
    output = _output(job)
    inside = output == WORKPLACE or output.startswith(f"{WORKPLACE}/")
    return WORKPLACE if inside else output


def _output(job: Job) -> str:
    return os.path.normpath(os.path.join(WORKPLACE, job.loaded.run.output))  # noqa: PTH118 - a path in a pod


def _pod_command(job: Job, name: str) -> list[str]:
    arguments = for_torchrun(["run", CONFIG, *job.overrides])
    return [
        *("python", "-P", "-m", "bigtrain.launching.elastic"),
        *("--nnodes", str(job.nodes), "--node-rank", "$(JOB_COMPLETION_INDEX)"),
        *("--nproc-per-node", str(job.processes)),
        *("--rdzv-backend", "static", "--rdzv-id", job.name, "--rdzv-endpoint", f"{name}-0.{name}:{PORT}"),
        *("--signals-to-handle", SIGNALS, "--shutdown-timeout", str(SAVE_SECONDS)),
        *("-m", "bigtrain", *(word.replace("$", "$$") for word in arguments)),  # Kubernetes replaces $(NAME), and $$
    ]


def _object_name(job: Job) -> str:
    """What the objects are called: a DNS label that leaves room for the number of a pod."""
    room = 63 - len(f"-{job.nodes}")
    return f"bigtrain-{re.sub('[^a-z0-9]+', '-', job.name.lower())}"[:room].strip("-")


def _yaml(value: Any, style: str) -> str:
    """A value as YAML with its texts in this style, or quoted where the style cannot hold them."""
    text = yaml.dump(value, default_style=style, default_flow_style=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n")


def _indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line if line else "" for line in text.split("\n"))
