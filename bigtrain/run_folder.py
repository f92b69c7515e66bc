"""The folder of a run: where things lie in it, whether this is the run that lives there, and its lineage in run.json.

Free of torch, so that a launcher can answer before it starts anything.
"""

from __future__ import annotations

import errno
import itertools
import json
import platform
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from bigtrain.config import RunConfig, difference, differences, load_config, shareable, without_secrets
from bigtrain.config.files import literal
from bigtrain.config.folder import LOCK, is_occupied
from bigtrain.config.origin import damaged_ones, put_back
from bigtrain.config.restart import choices, restart_choice, stage_of, with_dependents
from bigtrain.config.schema import StageConfig
from bigtrain.disk import append_lines, clean, remove, told_as, write_whole
from bigtrain.errors import CheckpointError, ConfigError, Ending
from bigtrain.masking import masked_values
from bigtrain.terminal import say

ENDING_SECONDS = 120.0  # how long a job that was killed may take to end, or NFS to notice that its host is lost
CANNOT_BEGIN = "Make room or mend the permissions there, or set `output` to a folder that can be written."
VERSIONS = ("bigtrain", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors")


class RunFolder:
    """`folder` of a run's file. Only rank 0 writes to it through this class."""

    def __init__(self, path: Path):
        self.path = path
        self._attempt: str | None = None  # the id of the one that this process has begun
        # a lock that is a mere file would outlive a job whose host is lost
        self._lock = filelock.FileLock(path / LOCK, fallback_to_soft=False)

    def stage(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self, stage: str) -> Path:
        return self.path / stage / "checkpoints"

    def export(self, stage: str) -> Path:
        return self.path / stage / "export"

    @property
    def preempted(self) -> Path:
        """A file that is there while the run waits to be started again: it was asked to stop, saved, and left."""
        return self.path / "preempted"

    @property
    def save_request(self) -> Path:
        """A file that asks the running job for a checkpoint."""
        return self.path / "save-now"

    @property
    def first_weights(self) -> Path:
        """What transformers has made of a pretrained model, until all ranks have read it."""
        return self.path / "first-weights"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run trains with, kept with it."""
        return self.path / "tokenizer"

    @property
    def architecture(self) -> Path:
        """The model's config.json, and generation_config.json if it has one, for runs that start from this one."""
        return self.path / "architecture"

    def metadata(self) -> dict[str, Any]:
        """The content of run.json; empty for a run that has not begun. Raises ConfigError for one that bigtrain has not
        written."""
        file = self.path / "run.json"
        try:
            metadata = json.loads(file.read_bytes())
            _check_metadata(metadata)
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} is not what bigtrain has written: {error}. Put a copy of it back, or take it away (`mv {file} "
                f"{file}.damaged`): the run goes on from its checkpoints without what it said of earlier attempts."
            ) from None
        return metadata

    def has_state(self, stage: str) -> bool:
        """Whether a stage has more behind it than steps that were never saved: a checkpoint, a damaged one among them,
        or its end, or an import. Only such a stage is bound to the values that it began with."""
        metadata = self.metadata().get("stages", {}).get(stage, {})
        return bool(metadata.get("finished")) or "imported" in metadata or _has_checkpoint(self.checkpoints(stage))

    def is_kept(self) -> bool:
        """Whether any stage has a state, one that was set aside too: they share the model, tokenizer and seed."""
        stages = {*self.metadata().get("stages", {}), *(root.parent.name for root in self.path.glob("*/checkpoints"))}
        return any(self.has_state(stage) for stage in stages)

    def check(self, config: RunConfig, restart: str | None = None) -> None:
        """Raises ConfigError when something else lives in the folder, or a run that trains something else.

        What no state depends on may change: a stage that has saved nothing takes the values of `config`.
        """
        if restart is not None:
            config.asked_stage(restart, "--restart")
        self._check_origins(config.stages, with_dependents(config.stages, restart))
        if is_occupied(self.path):
            raise ConfigError(f"{self.path} is not empty and holds no run; choose another `name` or `output`.")
        if not self.is_kept():
            return
        anew = with_dependents(config.stages, restart)
        changed = [
            change
            for change in differences(self._written(), without_secrets(config), "mathematics")
            if (stage := stage_of(change[0])) is None or (stage not in anew and self.has_state(stage))
        ]
        if not changed:
            return
        lines = [f"  {difference(*change)}" for change in changed]
        raise ConfigError(
            f"{self.path} holds a run that trains something else:\n" + "\n".join(lines) + "\n"
            "Nothing was changed. Choose:\n" + "\n".join(choices(config.stages, [key for key, _, _ in changed]))
        )

    def _check_origins(self, stages: Sequence[StageConfig], anew: list[str]) -> None:
        """Raises ConfigError when a stage that is to begin anew starts from one that has lost its checkpoints."""
        for stage in stages:
            origin = stage.from_stage
            if stage.name not in anew or origin is None or origin in anew or not self.has_state(origin):
                continue
            root = self.checkpoints(origin)
            if not any(root.glob("step-*/manifest.json")):
                aside = damaged_ones(root)
                others = put_back(aside[-1]) if aside else f"put a checkpoint back into {root}"
                raise ConfigError(
                    f"--restart {anew[0]}: {stage.name} starts from {origin}, and {root} has no whole checkpoint any "
                    f"more. Nothing was changed. Choose:\n{restart_choice(stages, origin)}\n  {others}."
                )

    def _written(self) -> RunConfig:
        """The run as it was begun, without secrets."""
        return without_secrets(load_config(self.path / "config.yaml"))

    def is_finished(self, config: RunConfig) -> bool:
        """Whether every stage is trained to its end, and its last checkpoint and the export it asks for are there.

        Where its data lies elsewhere now, it is not known: the data must be looked at.
        """
        begun = (self.path / "config.yaml").is_file()
        changed = differences(self._written(), without_secrets(config), "execution") if begun else []
        return not any(key.endswith(".source") for key, _, _ in changed) and all(
            self._stage_is_finished(stage) for stage in config.stages
        )

    def _stage_is_finished(self, stage: StageConfig) -> bool:
        metadata = self.metadata().get("stages", {}).get(stage.name, {})
        if not metadata.get("finished"):
            return False
        last = self.checkpoints(stage.name) / f"step-{metadata.get('steps', 0):08d}" / "manifest.json"
        return last.exists() and (self.is_exported(stage.name) or not stage.export)

    def is_exported(self, stage: str) -> bool:
        """Whether the stage's export is there and of its last step."""
        metadata = self.metadata()["stages"].get(stage, {})
        return self.export(stage).exists() and metadata.get("exported_step") == metadata.get("steps")

    def begin(
        self, config: RunConfig, restart: str | None, origin: dict[str, Any] | None = None, **execution: Any
    ) -> int:
        """Check, set a restarted stage and its dependents aside, and record a new attempt; returns its number.

        origin: what run.json is to say of the other run that this one starts from, while it has no state of its own.

        Until `leave` the folder is this process's alone. Raises ConfigError when another one holds it and does not end.
        """
        self.check(config, restart)
        with told_as(ConfigError, f"the run's folder {self.path}", CANNOT_BEGIN):
            self.path.mkdir(parents=True, exist_ok=True)
            self._enter()
            self.check(config, restart)  # again: another job may have begun meanwhile
            clean(self.path)
            clean(config.stores)
            return self._begin(config, restart, origin, execution)

    def _begin(
        self, config: RunConfig, restart: str | None, origin: dict[str, Any] | None, execution: dict[str, Any]
    ) -> int:
        for stage in with_dependents(config.stages, restart):
            self._set_aside(stage)
        for name in sorted({*self.metadata().get("stages", {}), *(stage.name for stage in config.stages)}):
            if not self.has_state(name):
                self._forget(name)
        if not self.is_kept():
            remove(self.tokenizer)  # the next one may be another
            remove(self.architecture)
        write_whole(self.path / "config.yaml", shareable(config))
        metadata = {"attempts": [], "stages": {}, **self.metadata(), "name": config.name, "seed": config.seed}
        if not self.is_kept():
            metadata["origin"] = origin
        self._close(metadata["attempts"])
        self._attempt = uuid.uuid4().hex
        metadata["attempts"].append(
            {
                "id": self._attempt,
                "started": time.time(),
                "machine": platform.node(),
                "python": platform.python_version(),
                "versions": {name: version(name) for name in VERSIONS},
                **execution,
            }
        )
        self._write(metadata)
        remove(self.first_weights)  # an earlier attempt was killed before it had
        self.preempted.unlink(missing_ok=True)
        for file in self.path.glob(f"{self.save_request.name}*"):
            file.unlink()
        return len(metadata["attempts"])

    def end(self, how: Ending, reason: str | None, since: float) -> None:
        """Record in run.json how the attempt ended that was begun after `since` (seconds since 1970), and why.

        One that was refused before it had begun gets an entry of its own. Nothing is recorded where there is no run;
        while another job is at work in the folder, an event only.
        """
        held = self._lock.is_locked
        if how in ("refused", "failed"):
            self.note(how, reason)
        with suppress(OSError, filelock.Timeout):  # the next attempt will take this one for killed
            if not (self.path / "run.json").exists():
                return
            if not held:
                self._lock.acquire(timeout=0)
            metadata = self.metadata()
            attempts = metadata["attempts"]
            if self._attempt is not None and self.newest_attempt() != self._attempt:
                return  # another run has taken the folder's place
            if not attempts or attempts[-1]["started"] < since:
                self._close(attempts)
                attempts.append({"id": uuid.uuid4().hex, "started": since, "machine": platform.node()})
            attempts[-1]["ended"] = {"how": how, "reason": reason, "time": time.time()}
            self._write(metadata)
        if not held:
            self.leave()

    def note(self, how: Ending, reason: str | None, **number: int) -> None:
        """Add to events.jsonl, where there is a run, how an attempt or a rank ended that has no stream of events, or no
        longer. number: of the attempt or the rank."""
        event = masked_values(
            {"kind": how, "time": time.time(), "machine": platform.node(), "reason": reason, **number}
        )
        with suppress(OSError):  # nothing hangs on it
            if (self.path / "run.json").exists():
                with append_lines(self.path / "events.jsonl") as events:
                    events.write(json.dumps(event) + "\n")

    def _close(self, attempts: list[dict[str, Any]]) -> None:
        """Say of the attempt before that it was killed, if it left no word of its end: nobody is at work any more."""
        if attempts and "ended" not in attempts[-1]:
            reason = "it was killed, or its machine was lost: it left no word of its end"
            attempts[-1]["ended"] = {"how": "killed", "reason": reason, "time": None}
            self.note("killed", reason, attempt=len(attempts))

    def leave(self) -> None:
        """Let another job begin."""
        self._lock.release(force=True)

    def check_there(self) -> None:
        """Raises CheckpointError if the folder in which this process has begun is gone, or another one in its place."""
        with suppress(OSError, ConfigError):  # a disk that answers late is no lost one: a save will tell
            if self._attempt is None or self.newest_attempt() == self._attempt:
                return
            gone = "was removed" if not (self.path / "run.json").exists() else "has been replaced by another run"
            raise CheckpointError(
                f"the run's folder {self.path} {gone} while this run trained: it has nowhere to save. Put the folder "
                "back, and start the run again: it goes on from its newest checkpoint there. If it is lost, choose "
                "another `name` or an empty `output`: the run begins anew."
            )

    def is_at_work(self) -> bool:
        """Whether a job holds the folder."""
        try:
            with self._lock.acquire(timeout=0):
                return False
        except filelock.Timeout:
            return True
        except OSError:  # a disk without locks
            return False

    def _enter(self) -> None:
        try:
            self._lock.acquire(timeout=0)
            return
        except filelock.Timeout:
            other = self._job()
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            say(f"the disk of {self.path} has no locks: a second job could train the same run as well.", error=True)
            return
        say(f"{other}; waiting up to {ENDING_SECONDS:.0f} s for it to end ...", error=True)
        try:
            self._lock.acquire(timeout=ENDING_SECONDS, poll_interval=0.2)
        except filelock.Timeout:
            raise ConfigError(
                f"{other}. Two jobs cannot train one run: wait until that one has ended, or end it; or give this run "
                f"another `name`. (If its host is lost, remove {self.path / LOCK}.)"
            ) from None

    def _job(self) -> str:
        attempts = self.metadata().get("attempts")
        if not attempts:
            return f"another job has begun in {self.path}"
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempts[-1]["started"]))
        return f"another job, begun at {begun} on {attempts[-1]['machine']}, is at work in {self.path}"

    def newest_attempt(self) -> str | None:
        """The id of the attempt that was begun last, different for each one of each run; None where there is none."""
        attempts = self.metadata().get("attempts") or [{}]
        return attempts[-1].get("id")

    def record(self, stage: str, **metadata: Any) -> None:
        """Add to what run.json says of a stage."""
        everything = self.metadata()
        everything["stages"].setdefault(stage, {}).update(metadata)
        self._write(everything)

    def _set_aside(self, stage: str) -> None:
        """Rename a stage's folder, so that nothing is lost, and let its rows of metrics.jsonl no longer count."""
        metadata = self.metadata()
        if self.has_state(stage) or _has_files(self.stage(stage)):
            names = (f"{stage}.{number}" for number in itertools.count(1))
            aside = next(n for n in names if n not in metadata["stages"] and not self.stage(n).exists())
            if self.stage(stage).exists():
                self.stage(stage).rename(self.stage(aside))
            metadata["stages"][aside] = metadata["stages"].pop(stage, {})
            self._write(metadata)
            self._end_rows(stage, kept_as=aside)
        self._forget(stage)

    def _forget(self, stage: str) -> None:
        """Take away what a stage that has saved nothing has left: what run.json says of it, its rows of metrics.jsonl
        (they count no longer), half-made folders."""
        metadata = self.metadata()
        if metadata.get("stages", {}).pop(stage, None) is not None:
            self._write(metadata)
        self._end_rows(stage)
        if self.stage(stage).exists() and not _has_files(self.stage(stage)):
            shutil.rmtree(self.stage(stage))

    def _end_rows(self, stage: str, **where: str) -> None:
        """Let the rows of a stage in metrics.jsonl no longer count, if there are any."""
        path, counts = self.path / "metrics.jsonl", False
        if not path.exists():
            return
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if f'"stage": "{stage}"' in line:
                    counts = '"kind": "restarted"' not in line
        if counts:
            with append_lines(path) as metrics:
                row = {"kind": "restarted", "time": time.time(), "stage": stage, "step": 0, **where}
                metrics.write(json.dumps(row) + "\n")

    def _write(self, metadata: dict[str, Any]) -> None:
        write_whole(self.path / "run.json", json.dumps(masked_values(metadata), indent=1) + "\n")


def _check_metadata(metadata: Any) -> None:
    """Raises ValueError, TypeError or AttributeError unless all is there that is relied on, and names are names."""
    for attempt in metadata.get("attempts", []):
        if not isinstance(attempt.get("started"), float | int):
            raise ValueError("an attempt has no time")
    for name, stage in metadata.get("stages", {}).items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.\d+)?", name):
            raise ValueError(f"{literal(name)} is no name of a stage")
        if type(stage.get("steps", 0)) is not int:
            raise ValueError(f"the steps of {name} are no number")


def _has_checkpoint(root: Path) -> bool:
    """Whether there is one under `root`, whole or damaged; what an interrupted save has left is none."""
    folders = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    return any(not folder.name.startswith("step-") or (folder / "manifest.json").exists() for folder in folders)


def _has_files(folder: Path) -> bool:
    """Whether a stage's folder holds anything worth keeping: a file, but for those of interrupted saves."""
    files = (path.relative_to(folder).parts for path in folder.rglob("*") if not path.is_dir())
    return _has_checkpoint(folder / "checkpoints") or any(parts[0] != "checkpoints" for parts in files)
