"""What `bigtrain launch` starts, and the parts that all its scripts share: words, quoting, templates. Free of torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from bigtrain.config.load import Loaded

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # that torchrun passes on; SIGUSR1 is none of its own
PORT = 29400  # where the nodes meet, unless --head names another
SAVE_SECONDS = 180  # what the ranks get to write a checkpoint after a signal; the scripts say to change it


@dataclass(frozen=True)
class Job:
    """A run that another launcher is to start: `processes` ranks on each of `nodes`.

    config is the path as it was typed; why says why there are as many processes; head is where the nodes meet, made_by
    the command that this came from. None: not asked for.
    """

    loaded: Loaded
    config: str
    overrides: tuple[str, ...]
    launcher: str
    nodes: int
    processes: int
    why: str
    made_by: tuple[str, ...]
    head: tuple[str, int] | None = None
    hostfile: str | None = None
    image: str | None = None

    @property
    def name(self) -> str:
        return self.loaded.run.name

    @property
    def total(self) -> int:
        """Ranks over all nodes."""
        return self.nodes * self.processes

    @property
    def uses_gpus(self) -> bool:
        return self.loaded.run.parallel.device != "cpu"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `bigtrain`, in each rank."""
        return ("run", self.config, *self.overrides)

    def headline(self) -> str:
        """The first line of a script: what it trains, and on what."""
        ranks = "1 process" if self.total == 1 else f"{self.total} processes"
        where = "one machine" if self.nodes == 1 else f"{self.nodes} nodes, {self.processes} on each"
        return f"Trains {self.name} with {self.launcher}: {ranks} on {where}, {self.why}."

    def origin(self) -> str:
        """The command that prints the script again, as a comment can hold it."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shlex.join(self.made_by))


def for_torchrun(words: Iterable[str]) -> list[str]:
    """Words as torchrun has to get them: it replaces `${local_rank}` in them, and `$$` by `$`."""
    return [word.replace("$", "$$") for word in words]


def filled(template: str, **values: object) -> str:
    """The text of a template of this package with its {{names}} filled in."""
    text = files("bigtrain.launching").joinpath("templates", f"{template}.tmpl").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: str(values[found[1]]), text)
