"""What keeps an experiment tracker from working here, as far as it shows without importing it."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

WANDB_HOSTS = ("wandb", "coreweave")  # in the names of its own servers


def wrong_with_tracker(name: str) -> str | None:
    """What to do first, in a sentence; None if nothing is known to be missing."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed; `pip install 'bigtrain[trackers]'`."
    if name == "wandb" and not _wandb_can_start():
        return (
            "wandb has no login here; `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline in the environment to "
            "keep its files in the run's folder."
        )
    return None


def _wandb_can_start() -> bool:
    """Whether there is any sign of a login or of working without one. https://docs.wandb.ai/models/track/environment-variables"""
    settings = {key: value for file in _wandb_settings() for key, value in _read(file).items()}
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "online")
    if mode in ("offline", "dryrun", "disabled"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "")).netloc
    known = [host for host in _netrc_hosts() if host == server or (not server and any(w in host for w in WANDB_HOSTS))]
    return bool(known)


def _wandb_settings() -> Iterator[Path]:
    """Where `wandb offline` and the like write, the nearest last."""
    yield Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb") / "settings"
    below = Path(os.environ.get("WANDB_DIR") or ".")
    yield from (below / name / "settings" for name in ("wandb", ".wandb"))


def _read(file: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, configparser.Error, UnicodeDecodeError):  # wandb itself goes on without it
        parser.read_string(file.read_text(encoding="utf-8"))
    return dict(parser["default"]) if "default" in parser else {}


def _netrc_hosts() -> list[str]:
    given = os.environ.get("NETRC")
    for file in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):  # wandb itself goes on without it
            return [host for host in netrc.netrc(str(file)).hosts if host != "default"]
    return []
