"""`bigtrain preview`: what a stage shows its model in one step, on the terminal or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.config import RunConfig
from bigtrain.config.schema import StageConfig
from bigtrain.errors import ConfigError
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Stream
from bigtrain.pipeline.build import open_tokenizer, prepare_stages
from bigtrain.pretrained import quiet
from bigtrain.preview.batch import View, view
from bigtrain.preview.page import write_page
from bigtrain.preview.terminal import show
from bigtrain.terminal import say


def preview(config: RunConfig, *, stage: str | None, step: int, rows: int, html: Path | None) -> None:
    """Show batch `step` (from 0) of a stage, None for all, and metadata of its data; what is missing is prepared first.

    rows: sequences of the batch whose tokens are shown. html: the page to write as well. Of all stages, those that have
    no such step are named and passed over.
    Raises ConfigError for a stage or step that there is not, DataError for sources that cannot be read.
    """
    chosen: list[StageConfig] = config.stages if stage is None else [config.asked_stage(stage)]
    quiet()
    tokenizer: Any = open_tokenizer(config)
    data = prepare_stages(chosen, tokenizer, stores=config.stores, seed=config.seed, stream=Stream([Progress()]))
    views: list[View] = []
    absent: list[str] = []
    for one in chosen:
        try:
            views.append(view(one, data[one.name], tokenizer, config.seed, step, rows))
        except ConfigError as error:
            absent.append(str(error))
    if not views:
        raise ConfigError("\n".join(absent))
    for seen in views:
        show(seen)
    for told in absent:
        say(told)
    if html is not None:
        write_page(html, config.name, views)
        say(f"written to {html}")
