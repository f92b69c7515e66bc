"""The run's file: schema, loading, overrides, errors."""

from bigtrain.config.load import Loaded, differences, lacking, load, load_config, to_yaml
from bigtrain.config.schema import Run

__all__ = ["Loaded", "Run", "differences", "lacking", "load", "load_config", "to_yaml"]
