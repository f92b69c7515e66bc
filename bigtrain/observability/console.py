"""The console that progress, previews and tables are printed on."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.segment import Segment

from bigtrain.terminal import guarded, printable


def console(file: Any = None, **options: Any) -> Console:
    """A console on a text stream, None for standard output, that prints words as they are, without control characters
    but for its own colours, and never raises: see `terminal.Guarded`. options: of rich's Console."""
    stream: Any = guarded(file or sys.stdout)
    made = Console(file=stream, highlight=False, soft_wrap=True, markup=False, emoji=False, **options)
    made.push_render_hook(_Printable())
    return made


class _Printable(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(renderable) for renderable in renderables]


class _Cleaned:
    """What another renderable gives, each text of it printable."""

    def __init__(self, renderable: RenderableType):
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = console.render(self._renderable, options)
        for text, style, control in segments:
            yield Segment(text if control else printable(text), style, control)
