"""Views as one page that needs nothing beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from bigtrain.errors import ConfigError
from bigtrain.observability.progress import count
from bigtrain.preview.batch import View
from bigtrain.preview.terminal import heading, summary


def write_page(path: Path, name: str, views: list[View]) -> None:
    """Write the page of a run called `name`. Raises ConfigError if the file cannot be written."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("bigtrain.preview").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(name=name, views=views, summary=summary, heading=heading, count=count)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error.strerror}.") from error
