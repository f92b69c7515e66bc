"""Pretrained things by name: a folder, a Hub id, or a .gguf file, as arguments for transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError


def arguments(source: str) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) for any `from_pretrained` of transformers. Code of the checkpoint is never run."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name, "trust_remote_code": False}
    return (str(path) if path.exists() else source), {"trust_remote_code": False}


def quiet() -> None:
    """Keep the progress bars of transformers and datasets out of what bigtrain prints."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # importing it takes long, and not all need it


@contextmanager
def opening(source: str, key: str) -> Iterator[None]:
    """Turn what transformers raises for a checkpoint that cannot be had into one sentence about `key`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: {source} cannot be opened: {reason} (A folder must exist; a Hub id needs the network or the local "
            "cache, and for a gated model `hf auth login`.)"
        ) from error
