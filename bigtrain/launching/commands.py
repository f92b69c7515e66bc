"""The command lines of torchrun, deepspeed and accelerate, with a word on each of their options. Free of torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

from bigtrain.launching.job import SAVE_SECONDS, SIGNALS, Job, filled, for_torchrun

NETWORKS = """\
#
# If the nodes have several networks, name the one to use:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
"""


@dataclass(frozen=True)
class Option:
    """An option of a launcher's command line, its value if it takes one, and why it is there."""

    name: str
    why: str
    value: str | None = None

    @property
    def words(self) -> list[str]:
        return [self.name] if self.value is None else [self.name, self.value]


@dataclass(frozen=True)
class Command:
    """A launcher's command: its name as a user types it, the Python module that is the same program, its options, and
    what ends them."""

    program: tuple[str, ...]
    module: str
    options: list[Option]
    rest: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """As a user types it."""
        return [*self.program, *(word for option in self.options for word in option.words), *self.rest]

    @property
    def here(self) -> list[str]:
        """The same, with the launcher that is installed beside this very interpreter; no file of the working folder
        stands before its modules."""
        return [sys.executable, "-P", "-m", self.module, *self.words[len(self.program) :]]


def torchrun(job: Job) -> Command:
    """PyTorch's launcher; on several nodes they meet at the head, and the same command runs on each."""
    processes = Option("--nproc-per-node", "processes", str(job.processes))
    if job.nodes == 1:
        options = [Option("--standalone", "one machine: there is no address to agree on"), processes]
    else:
        assert job.head is not None
        options = [
            Option("--nnodes", "machines that take part; the first wait ten minutes for the others", str(job.nodes)),
            Option("--nproc-per-node", "processes on each of them", str(job.processes)),
            Option("--rdzv-backend", "they find each other through a store on the head", "c10d"),
            Option("--rdzv-id", "the same on all of them, another for each run on the same head", job.name),
            Option("--rdzv-endpoint", "the head: one of them, and a free port there", _address(job.head)),
            Option("--signals-to-handle", "passed on to the processes, which SIGUSR1 would orphan else", SIGNALS),
            Option("--shutdown-timeout", "seconds to write a checkpoint in after a signal", str(SAVE_SECONDS)),
        ]
    return Command(("torchrun",), "torch.distributed.run", options, ("-m", "bigtrain", *for_torchrun(job.arguments)))


def deepspeed(job: Job) -> Command:
    """DeepSpeed's launcher; on several nodes it is run once, and reaches the others by ssh."""
    options = [Option("--num_gpus", "processes on each node, on GPUs 0, 1, ...", str(job.processes))]
    if job.nodes > 1:
        assert job.hostfile is not None
        options = [
            Option("--hostfile", "a line `NAME slots=GPUS` for each node that ssh reaches", job.hostfile),
            Option("--num_nodes", "how many of them take part: the first ones of the file", str(job.nodes)),
            *options,
        ]
    return Command(("deepspeed",), "deepspeed.launcher.runner", options, ("--module", "bigtrain", *job.arguments))


def accelerate(job: Job) -> Command:
    """accelerate's launcher; the same command runs on each node."""
    options = [
        Option("--num_processes", "processes on all nodes together", str(job.total)),
        Option("--num_machines", "nodes", str(job.nodes)),
        Option("--mixed_precision", "bigtrain decides it: `precision` in the run's file", "no"),
        Option("--dynamo_backend", "the same for compiling", "no"),
    ]
    if job.total > 1:
        options.insert(0, Option("--multi_gpu", "several processes; on CPUs too, where --cpu would start a single one"))
    if job.nodes > 1:
        assert job.head is not None
        options += [
            Option("--rdzv_backend", "the nodes find each other through a store on the head", "c10d"),
            Option("--machine_rank", "accelerate asks for a number, and c10d does not look at it", "0"),
            Option("--main_process_ip", "the head: one of the nodes", job.head[0]),
            Option("--main_process_port", "a free port there", str(job.head[1])),
        ]
    # It has torchrun start several processes, and starts a single one itself.
    arguments = for_torchrun(job.arguments) if job.total > 1 else job.arguments
    rest = ("--module", "bigtrain", *arguments)
    return Command(("accelerate", "launch"), "accelerate.commands.launch", options, rest)


COMMANDS: dict[str, Callable[[Job], Command]] = {"torchrun": torchrun, "deepspeed": deepspeed, "accelerate": accelerate}


def where(job: Job) -> str:
    """Where the command is to be run, in words."""
    if job.nodes == 1:
        return "Run it on the machine that trains"
    if job.launcher == "deepspeed":
        return "Run it on one of the nodes, in a folder that all of them see under the same name"
    return f"Run it on each of the {job.nodes} nodes, in a folder that all of them see"


def script(job: Job) -> str:
    """The command as a shell script with a comment on every option."""
    command = COMMANDS[job.launcher](job)
    width = max(len(" ".join(option.words)) for option in command.options if len(" ".join(option.words)) <= 40)
    lines = [[*command.program], *(option.words for option in command.options), [*command.rest]]
    return filled(
        "command.sh",
        headline=job.headline(),
        where=where(job),
        origin=job.origin(),
        options="\n".join(_told(option, width) for option in command.options),
        networks=NETWORKS if job.nodes > 1 else "",
        command=" \\\n  ".join(shlex.join(line) for line in lines),
    )


def _told(option: Option, width: int) -> str:
    words = shlex.join(option.words)
    gap = "\n#   " + " " * width if len(words) > width else " " * (width - len(words))
    return f"#   {words}{gap}  {option.why}"


def _address(head: tuple[str, int]) -> str:
    return f"{head[0]}:{head[1]}"
