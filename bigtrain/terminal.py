"""What bigtrain prints: text without control characters, through streams whose loss ends nothing. Free of torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from bigtrain.masking import masked

# All but newline and tab of ASCII's and Latin-1's control characters; what reorders text; halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text as a terminal may get it: a control character is spelt, like \\x1b. Newlines and tabs stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, *, error: bool = False) -> None:
    """Print a message of bigtrain's own, without secrets; on standard error with `error`. Never raises."""
    show(masked(text), error=error)


def show(text: str, *, end: str = "\n", error: bool = False) -> None:
    """Print data or what a model says: as it is, but for control characters. Never raises."""
    stream = guarded(sys.stderr if error else sys.stdout)
    stream.write(printable(text) + end)
    stream.flush()


class Guarded:
    """A text stream that never raises: what its encoding lacks is spelt, like \\xb7, and once it can take nothing more
    all that follows is dropped. failure: why it cannot; None while it can."""

    def __init__(self, stream: Any):
        """stream: to write to; None for one that was closed before the program began."""
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _try(self, action: Callable[[], Any]) -> None:
        if self._stream is None or self.failure is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.failure = error

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # while the object is being made or copied
            raise AttributeError(name)
        return getattr(self._stream, name)


def guarded(stream: Any) -> Guarded:
    """The stream as one that never raises."""
    return stream if isinstance(stream, Guarded) else Guarded(stream)


def guard() -> None:
    """Let neither standard stream of this process end it, whatever happens to them and whoever writes to them."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # one that was closed: else a file that is opened later would take its place
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = guarded(sys.stdout or os.fdopen(1, "w", closefd=False))
    sys.stderr = guarded(sys.stderr or os.fdopen(2, "w", closefd=False))
