"""Texts of a run's file that are more than text: names, durations, and paths.

In every path `$NAME` and `${NAME}` stand for variables of the environment and `~` at its start for the home folder;
a `$` is written `$$`. URLs (`s3://...`), `module:name` and Hub ids stay as they are, but for the path at the end of a
chained URL. A run knows its paths as they have become, whichever way they were written.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

STAGE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DURATION = r"^([0-9]{1,9}[dhms])+$"
REGION = r"^[A-Z]{2}$"
MEANINGS = {  # of each `pattern`, as a message says it
    STAGE_NAME: "may hold only letters, digits, '-' and '_', and begins with a letter or digit",
    RUN_NAME: "may hold only letters, digits, '.', '-' and '_', and begins with a letter or digit",
    DURATION: "is no time: write days, hours, minutes and seconds, like 11h30m, 2d or 90s",
    REGION: "is no country: write two capital letters (ISO 3166), like US",
}

VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\}|(?P<broken>\{))", re.ASCII
)


def expanded(text: str) -> str:
    """A path as it is used, of one as it is written; of URLs only parts without `://`, like `~/a.zip` in
    `zip://*.jsonl::~/a.zip`.

    Raises ValueError with a sentence for a variable that is not set or empty, and a user who is not there.
    """
    return "::".join(part if "://" in part else _path(part) for part in text.split("::"))


def written(path: str) -> str:
    """What `expanded` reads as this path."""
    return "::".join(part if "://" in part else part.replace("$", "$$") for part in path.split("::"))


def _path(text: str) -> str:
    path = VARIABLE.sub(_value, text)
    if not path.startswith("~"):
        return path
    home = os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises another error
    if home.startswith("~"):
        user = path.partition("/")[0][1:]
        raise ValueError(f"there is no user {user} on this machine; a name that begins with ~ is written ./~")
    return home


def _value(found: re.Match[str]) -> str:
    dollar, plain, braced, broken = found.groups()
    if dollar:
        return "$"
    if broken:
        raise ValueError("after `${` come a variable's name and `}`, like ${HOME}; a `$` of the path is written $$")
    name = plain or braced
    if not os.environ.get(name):
        state = "empty" if name in os.environ else "not set"
        raise ValueError(f"the environment variable {name} is {state}; set it, or write the path (a `$` of it as $$)")
    return os.environ[name]


PathText = Annotated[str, AfterValidator(expanded), PlainSerializer(written)]
