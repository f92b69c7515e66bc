"""bigtrain: train large models from one file.

from bigtrain import load_config, run

for lr in (1e-3, 3e-3, 1e-2):
    result = run(load_config("configs/quickstart.yaml", [f"name=lr-{lr}", f"stages.pretrain.optimizer.lr={lr}"]))
    print(lr, result.stages["pretrain"].held_out_loss)

generate(load_model("runs/lr-0.001"), "def is_empty(self):"), evaluate("runs/lr-0.001") and export("runs/lr-0.001") do
what the commands of these names do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.config import load_config
    from bigtrain.errors import BigtrainError
    from bigtrain.inference.evaluate import evaluate
    from bigtrain.inference.export import export
    from bigtrain.inference.generate import generate
    from bigtrain.inference.load import load_model
    from bigtrain.launching.start import RunError, run
    from bigtrain.observability.results import RunResult, StageResult

__all__ = [
    "BigtrainError",
    "RunError",
    "RunResult",
    "StageResult",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "load_model",
    "run",
]
__version__ = "0.1.0"

_HOMES = {
    "BigtrainError": "bigtrain.errors",
    "RunError": "bigtrain.launching.start",
    "RunResult": "bigtrain.observability.results",
    "StageResult": "bigtrain.observability.results",
    "evaluate": "bigtrain.inference.evaluate",
    "export": "bigtrain.inference.export",
    "generate": "bigtrain.inference.generate",
    "load_config": "bigtrain.config",
    "load_model": "bigtrain.inference.load",
    "run": "bigtrain.launching.start",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then, for the command's sake: its help is there in a fraction of a second."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
