"""Environment variables: those with which `bigtrain run` speaks to the ranks that it starts, and those of a user; and
how a rank says why it ends.

Free of torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError
from bigtrain.masking import masked
from bigtrain.terminal import say

FAILURE_FILE = "BIGTRAIN_FAILURE_FILE"  # where a rank writes why it failed
PROCESSES_WHY = "BIGTRAIN_PROCESSES_WHY"  # in words, why there are as many ranks as there are
JOIN_SECONDS = "BIGTRAIN_JOIN_SECONDS"  # how long the ranks wait for each other at the start; set by a user, or absent
DEFAULT_JOIN_SECONDS = 600.0
LONGEST_JOIN_SECONDS = 7 * 86_400.0
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def whole(environ: Mapping[str, str], name: str, least: int, most: int | None = None, hint: str = "") -> int:
    """A variable that must be a whole number from `least` to `most`. Raises ConfigError, which ends with `hint`."""
    text = environ[name].strip()
    if re.fullmatch(r"[0-9]{1,18}", text) and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ConfigError(f"{name}={shown(text)} in the environment is no whole number {limits}. {hint}".strip())


def join_seconds() -> float:
    """How long the ranks wait for each other. Raises ConfigError for a user's setting that is no such time."""
    text = os.environ.get(JOIN_SECONDS, str(DEFAULT_JOIN_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if 0 < seconds <= LONGEST_JOIN_SECONDS:
        return seconds
    raise ConfigError(
        f"{JOIN_SECONDS}={shown(text)} in the environment is no number of seconds above 0 and up to "
        f"{LONGEST_JOIN_SECONDS:.0f}. Write one, like 600, or `unset {JOIN_SECONDS}`."
    )


def threads(name: str) -> int | None:
    """A number of threads (of the outermost level, where OpenMP may have a list) that the environment sets; None: it
    does not, or leaves the choice to the library.

    Raises ConfigError for anything else.
    """
    text = os.environ.get(name, "").strip()
    first, *inner = text.split(",") if name == "OMP_NUM_THREADS" else [text]
    if all(re.fullmatch(r" *[0-9]{1,9} *", part) for part in (first or "0", *inner)):
        return int(first or 0) or None
    raise ConfigError(
        f"{name}={shown(text)} in the environment is no number of threads. Write one, like 4, or `unset {name}`."
    )


def check_settings() -> None:
    """Raises ConfigError for a variable of a user's that some library would read wrongly, or fail at, later."""
    join_seconds()
    for name in THREADS:
        threads(name)


def shown(text: str) -> str:
    """A variable's value as a message can hold it: one line, printable, not long."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return f"{line[:57]}..." if len(line) > 60 else line


def has_launcher() -> bool:
    """Whether `bigtrain run` has started this process as a rank, and waits for what it has to tell."""
    file = os.environ.get(FAILURE_FILE)
    return file is not None and Path(file).parent.is_dir()  # a shell may have inherited it from a rank


def tell(text: str, code: int) -> None:
    """Say why this process ends: to the launcher that started it, or to the terminal. Never raises."""
    if not has_launcher():
        say(text, error=True)
        return
    file = os.environ[FAILURE_FILE]
    partial = Path(file).with_suffix(".partial")
    failure: dict[str, Any] = {"text": masked(text), "code": code, "time": time.time()}
    try:
        partial.write_text(json.dumps(failure))
        partial.replace(file)
    except OSError:  # the disk of temporary files is full, or the folder is gone
        say(text, error=True)
