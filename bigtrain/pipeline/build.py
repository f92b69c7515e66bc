"""What a stage is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.config.schema import RunConfig, StageConfig
from bigtrain.data.prepare import StageData, counts, prepare_stage, prepare_tokenizer
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.observability.stream import Stream
from bigtrain.tasks import TASKS


def open_tokenizer(config: RunConfig) -> Any:
    """The tokenizer that the run's file names, with the tokens that it adds; trained first where nobody has."""
    settings, where = config.tokenizer, config.given_tokenizer
    if settings is None:
        key = "model.from_pretrained" if config.model.from_run is None else "model.from_run"
        assert where is not None
        return load_tokenizer(where, key=key)
    if settings.train is not None:
        where = str(prepare_tokenizer(settings.train, config.stages[0], config.stores))
    if where is None:
        raise ConfigError("tokenizer: give either train or from_pretrained.")
    return load_tokenizer(where, settings.add_tokens)


def prepare_stages(
    stages: Sequence[StageConfig], tokenizer: Any, *, stores: Path, seed: int, stream: Stream
) -> dict[str, StageData]:
    """The data of each stage, by name; made first where nobody has. The stream hears of each store.

    Raises as `prepare_stage` does.
    """
    data = {}
    for stage in stages:
        stream.emit("preparing", what=f"data of {stage.name}")
        made = prepare_stage(stage, TASKS[stage.task](), tokenizer, stores=stores, seed=seed, stream=stream)
        if made.cleaning is not None:
            summary = made.cleaning.summary()
            stream.emit("cleaned", stage=stage.name, **summary)
            if summary["warning"] is not None:
                stream.emit("cleaned_too_much", stage=stage.name, text=summary["warning"], folder=summary["folder"])
        for store in (*made.train, *made.held_out):
            stream.emit("prepared", stage=stage.name, folder=str(store.folder), **counts(store))
        data[stage.name] = made
    return data
