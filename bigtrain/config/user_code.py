"""A user's own code, which a run's file names as `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigtrain.errors import one_line

NAMED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def imported(name: str) -> Any:
    """What `package.module:name` names: of a module that is installed, on PYTHONPATH, or in the working folder.

    Raises ValueError with a sentence if there is nothing.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: none of its files takes the place of a library
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except ImportError as error:
        raise ValueError(
            f"{module_name} cannot be imported: {error}. It was looked for among the installed modules, on PYTHONPATH "
            f"and in {here}."
        ) from error
    except BaseException as error:
        raise ValueError(f"{module_name} cannot be imported: {raised(error)}") from error
    if not hasattr(module, attribute):
        file = getattr(module, "__file__", None) or "built into Python"
        raise ValueError(
            f"{module_name} ({file}) has no {attribute}; the nearest is {closest(attribute, vars(module))}. "
            "A module of the working folder needs a name that no installed one has."
        )
    return getattr(module, attribute)


def raised(error: BaseException) -> str:
    """What a user's code has raised, and where, in a line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = f": {one_line(error)}" if str(error) else ""
    return f"{type(error).__name__}{said} ({place.filename}, line {place.lineno})."


def closest(name: str, names: Iterable[Any]) -> str:
    """The name that is most like this one; empty if there are none."""
    return next(iter(difflib.get_close_matches(name, list(map(str, names)), n=1, cutoff=0.0)), "")
