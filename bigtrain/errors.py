"""Errors that are written for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from bigtrain.masking import masked

Ending = Literal["finished", "imported", "preempted", "refused", "failed", "killed"]


class BigtrainError(Exception):
    """Something went wrong that a sentence can explain; shown without a traceback, and without secrets."""

    exit_code = 1

    def __str__(self) -> str:
        return masked(super().__str__())


class ConfigError(BigtrainError):
    """The run's file, or an override of it, asks for something that cannot be done (exit code 2)."""

    exit_code = 2


class DataError(BigtrainError):
    """A source or a token store does not hold what the run's file says it holds (exit code 2)."""

    exit_code = 2


class CheckpointError(BigtrainError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written; `folder` is where it lies."""

    def __init__(self, folder: Path, text: str):
        super().__init__(text)
        self.folder = folder

    def __reduce__(self) -> tuple[type[DamagedError], tuple[Path, str]]:
        return DamagedError, (self.folder, str(self))  # ranks tell each other of it


class NotFiniteError(BigtrainError):
    """Training has led to numbers that are not finite. Every rank raises it at the same point of the loop; what can be
    done about it is said where the run's checkpoints are known."""


class ReportedError(BigtrainError):
    """Raised on every rank; rank 0 has already printed the reason. exit_code is that of the reason."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them when they are few."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known here: {', '.join(names)}." if len(names) <= 20 else "no known name is near it."


def one_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    said = error.args[0] if error.args and isinstance(error.args[0], bytes) else str(error)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def reason(error: Exception) -> str:
    """What an error says that was raised while the values of a file were looked at."""
    return f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def ending_of(error: BaseException) -> tuple[Ending, str]:
    """How an attempt ended that raised this, and why: a sentence."""
    if isinstance(error, BigtrainError):
        return "refused" if error.exit_code == 2 else "failed", str(error)
    if isinstance(error, KeyboardInterrupt):
        return "failed", "stopped from the keyboard"
    first = (str(error).strip().splitlines() or [""])[0]
    return "failed", f"{type(error).__name__}: {first}" if first else type(error).__name__
