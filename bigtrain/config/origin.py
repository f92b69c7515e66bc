"""Another run's stage, which a run starts from: where its things lie, found without opening any of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.files import literal
from bigtrain.errors import nearest

DAMAGED = "damaged"  # begins the name of a checkpoint's folder that was set aside because of it
FORM = "name RUN_DIR/STAGE, or one checkpoint of it, RUN_DIR/STAGE/checkpoints/step-00000100"


@dataclass(frozen=True)
class Origin:
    """folder: of the other run. step: of the checkpoint that is meant; None for the stage's newest."""

    folder: Path
    stage: str
    step: int | None = None

    @classmethod
    def of(cls, text: str) -> Origin:
        """Of a `model.from_run`."""
        path = Path(text).absolute()
        found = re.fullmatch(r"step-(\d{8,})", path.name)
        if found and path.parent.name == "checkpoints":
            return cls(path.parents[2], path.parents[1].name, int(found[1]))
        return cls(path.parent, path.name)

    @property
    def checkpoints(self) -> Path:
        return self.folder / self.stage / "checkpoints"

    @property
    def checkpoint(self) -> Path | None:
        """The one that is meant, or the newest; None where there is none."""
        whole = sorted(manifest.parent for manifest in self.checkpoints.glob("step-*/manifest.json"))
        meant = [folder for folder in whole if self.step is None or folder.name == f"step-{self.step:08d}"]
        return meant[-1] if meant else None

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def architecture(self) -> Path:
        """A folder with a config.json of transformers."""
        return self.folder / "architecture"

    def problem(self) -> str | None:
        """What keeps a run from starting from it; None if nothing that can be seen from here does."""
        if not (self.folder / "config.yaml").is_file():
            return f"there is no run in {self.folder}; {FORM}."
        stages = sorted(root.parent.name for root in self.folder.glob("*/checkpoints"))
        if self.stage not in stages:
            known = nearest(self.stage, stages) if stages else "none of its stages has saved anything yet."
            return f"the run in {self.folder} has no stage {literal(self.stage)} with checkpoints; {known}"
        steps = sorted(manifest.parent.name for manifest in self.checkpoints.glob("step-*/manifest.json"))
        if not steps:
            return f"the run in {self.folder}: stage {self.stage} {without_checkpoint(self.checkpoints.parent)}"
        if self.step is not None and f"step-{self.step:08d}" not in steps:
            return f"{self.checkpoints} has no whole checkpoint of step {self.step}; it has {', '.join(steps)}."
        for kept in (self.tokenizer, self.architecture):
            if not (kept / "manifest.json").is_file():
                return (
                    f"there is no {kept}: that run was begun by a bigtrain that did not keep it. Export it, and start "
                    "from the export with from_pretrained."
                )
        return None


def without_checkpoint(stage: Path) -> str:
    """What is said of a stage, given its folder, that has no checkpoint to use: it has none yet, or none any more."""
    aside, export = damaged_ones(stage / "checkpoints"), stage / "export"
    if not aside:
        return "has no checkpoint yet."
    if (export / "config.json").is_file():
        way_on = f"use its export, {export}, as a pretrained model,"
    else:
        way_on = f"train it anew with `--restart {stage.name}`,"
    return f"has no checkpoint any more, as {aside[-1]} is damaged: {way_on} or {put_back(aside[-1])}."


def damaged_ones(checkpoints: Path) -> list[Path]:
    """The checkpoints of a stage that were set aside as damaged, in the order of their steps."""
    return sorted(checkpoints.glob(f"{DAMAGED}-step-*"))


def put_back(aside: Path) -> str:
    """How a checkpoint that was set aside is made one again."""
    before = re.sub(r"^.*?(step-\d+).*$", r"\1", aside.name)
    return (
        f"put whole files in place of the damaged ones, and rename the folder: `mv {aside} {aside.with_name(before)}`"
    )
