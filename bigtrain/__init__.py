"""bigtrain: train large models from one file.

from bigtrain import load_config, run

run(load_config("configs/quickstart.yaml", ["parallel.engine=fsdp"]))
"""

from bigtrain.config import load_config
from bigtrain.launching.start import run

__all__ = ["load_config", "run"]
__version__ = "0.1.0"
