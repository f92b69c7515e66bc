"""The end of a run: its exports, and their answers to the prompts of its file. On rank 0 alone."""

from __future__ import annotations

from collections.abc import Sequence

from bigtrain.checkpoint import newest, set_aside
from bigtrain.config.schema import StageConfig
from bigtrain.errors import CheckpointError, ConfigError, DamagedError
from bigtrain.inference.export import export
from bigtrain.inference.generate import generate
from bigtrain.inference.load import LoadedModel, load_model
from bigtrain.observability.events import Exporting
from bigtrain.observability.stream import Stream
from bigtrain.pipeline.history import lost
from bigtrain.run_folder import RunFolder

ANSWER_TOKENS = 64  # of an answer to one of a stage's `prompts`


def finish(stages: Sequence[StageConfig], folder: RunFolder, stream: Stream) -> None:
    """Export each stage that asks for it and is not exported yet, and let the exported model answer its prompts.

    Raises CheckpointError for a damaged checkpoint, once it is set aside.
    """
    for stage in stages:
        if not stage.export or folder.is_exported(stage.name):
            continue
        try:
            _export(stage, folder, stream)
        except DamagedError as damaged:
            aside = set_aside(damaged.folder)
            if newest(damaged.folder.parent) is not None:
                way_on = "start the run again, and its stage goes on from the checkpoint before it."
            else:
                way_on = lost(stages, folder, stage)
            raise CheckpointError(f"{damaged}. It is set aside as {aside}: {way_on}") from None


def _export(stage: StageConfig, folder: RunFolder, stream: Stream) -> None:
    stream.emit(Exporting(stage=stage.name, folder=str(folder.export(stage.name))))
    where = export(folder.path, stage.name)
    opened = load_model(str(folder.stage(stage.name))) if stage.prompts else None
    answers = [{"prompt": prompt, "answer": _answer(opened, prompt)} for prompt in stage.prompts if opened]
    steps = folder.metadata()["stages"][stage.name]["steps"]
    folder.record(stage.name, export=str(where), exported_step=steps, answers=answers)


def _answer(opened: LoadedModel, prompt: str) -> str:
    """A text to be read; a prompt that cannot be answered ends no run."""
    try:
        return generate(opened, prompt, max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    except ConfigError as error:
        return f"(none: {error})"
