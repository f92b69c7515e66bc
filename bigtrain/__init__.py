"""bigtrain: train large models from one file.

from bigtrain import load_config, run

run(load_config("configs/quickstart.yaml", ["parallel.engine=fsdp"]))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.config import load_config
    from bigtrain.launching.start import run

__all__ = ["load_config", "run"]
__version__ = "0.1.0"

_HOMES = {"load_config": "bigtrain.config", "run": "bigtrain.launching.start"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then, for the command's sake: its help is there in a fraction of a second."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
