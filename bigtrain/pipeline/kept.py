"""The tokenizer and the architecture that a run keeps, so that they stay what they were when it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import RunConfig
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.disk import make_once
from bigtrain.models.architecture import keep_config, kept_config, model_config
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def own_tokenizer(config: RunConfig, folder: RunFolder) -> Any:
    """The tokenizer that the run keeps; one that begins opens the one that its file names, and keeps it."""

    def keep(empty: Path) -> None:
        tokenizer = open_tokenizer(config)
        tokenizer.save_pretrained(empty)
        (empty / "manifest.json").write_text(json.dumps({"from": tokenizer.name_or_path}) + "\n")

    return load_tokenizer(make_once(folder.tokenizer, keep))


def own_architecture(config: RunConfig, folder: RunFolder, tokenizer: Any) -> PreTrainedConfig:
    """The model's configuration; the run keeps it, for runs that start from this one. If it was taken from another run,
    it is read from the kept one alone: the other run may be gone."""

    kind = config.stages[0].task.model_kind

    def keep(empty: Path) -> None:
        keep_config(config.model, model_config(config.model, tokenizer, config.adds_tokens, kind), empty)
        (empty / "manifest.json").write_text(json.dumps({"from": config.name}) + "\n")

    kept = make_once(folder.architecture, keep)
    if config.model.from_run is not None:
        return kept_config(kept)
    return model_config(config.model, tokenizer, config.adds_tokens, kind)
