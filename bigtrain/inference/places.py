"""What a user may name: a run, a stage of it, a checkpoint, a Hugging Face folder or a Hub id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint import newest
from bigtrain.checkpoint.format import MANIFEST
from bigtrain.config import RunConfig, load_config
from bigtrain.config.files import literal
from bigtrain.config.origin import damaged_ones, without_checkpoint
from bigtrain.config.schema import StageConfig
from bigtrain.errors import CheckpointError, ConfigError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class RunPlace:
    """A complete checkpoint of a run.

    run: its resolved file, with `output` and `name` set to where the folder lies now.
    """

    folder: Path
    run: RunConfig
    stage: StageConfig
    checkpoint: Path

    @property
    def step(self) -> int:
        return int(json.loads((self.checkpoint / MANIFEST).read_text())["step"])

    def __str__(self) -> str:
        return f"{self.folder}, stage {self.stage.name}, step {self.step}"


@dataclass(frozen=True)
class PretrainedPlace:
    """What transformers opens by itself: a folder, a Hub id or a .gguf file."""

    source: str

    def __str__(self) -> str:
        return self.source


def locate(where: str | Path) -> RunPlace | PretrainedPlace:
    """Find out what `where` names; no model is opened and the network is not asked.

    A run stands for its last stage that has a checkpoint, a stage for its newest checkpoint. Raises ConfigError
    for what is none of these, CheckpointError for a run or stage that has saved nothing yet.
    """
    path = Path(where).expanduser()
    if (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file()):
        return PretrainedPlace(str(path))
    if (path / "config.yaml").is_file():
        return _newest(path)
    if (path.parent / "config.yaml").is_file():
        return _of_stage(path.parent, path.name)
    if path.name.startswith("step-") and path.is_dir():
        return _of_checkpoint(path)
    if path.exists():
        raise ConfigError(
            f"{path} is neither a run (config.yaml), a stage or a checkpoint of one, "
            "nor a Hugging Face model (config.json)."
        )
    if HUB_ID.fullmatch(str(where)) and (str(path.parent) == "." or not path.parent.is_dir()):
        return PretrainedPlace(str(where))
    raise ConfigError(f"{path}: there is no such folder{_neighbour(path)}")


def _newest(folder: Path) -> RunPlace:
    run = _load(folder)
    for stage in reversed(run.stages):
        found = newest(folder / stage.name / "checkpoints", weights_only=True)
        if found:
            return RunPlace(folder, run, stage, found)
    for stage in reversed(run.stages):
        if damaged_ones(folder / stage.name / "checkpoints"):
            raise CheckpointError(f"{folder}: stage {stage.name} {without_checkpoint(folder / stage.name)}")
    raise CheckpointError(f"{folder} has no checkpoint yet; `bigtrain run` saves one at the end of each stage.")


def _of_stage(folder: Path, name: str) -> RunPlace:
    run = _load(folder)
    stage = run.stage(name, f"{folder} has no stage {literal(name)}")
    found = newest(folder / name / "checkpoints", weights_only=True)
    if not found:
        raise CheckpointError(f"{folder}: stage {name} {without_checkpoint(folder / name)}")
    return RunPlace(folder, run, stage, found)


def _of_checkpoint(path: Path) -> RunPlace:
    stage = path.resolve().parent.parent  # of RUN/STAGE/checkpoints/step-00000100
    folder = stage.parent
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{path} lies in no run: a checkpoint is opened with the config.yaml of its run, at {folder}."
        )
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not complete: it has no {MANIFEST}.")
    run = _load(folder)
    return RunPlace(folder, run, run.stage(stage.name, f"{folder} has no stage {literal(stage.name)}"), path)


def _load(folder: Path) -> RunConfig:
    """The run's file; the token stores and tokenizers that it shares lie beside its folder, wherever that is now."""
    run = load_config(folder / "config.yaml")
    here = folder.resolve()
    return run.model_copy(update={"output": str(here.parent), "name": here.name})


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return "."
    names = [entry.name for entry in path.parent.iterdir() if (entry / "config.yaml").is_file()]
    return f"; {nearest(path.name, names)}" if names else "."
