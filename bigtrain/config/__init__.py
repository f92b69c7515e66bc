"""The run's file: schema, loading, overrides, errors."""

from bigtrain.config.load import (
    Loaded,
    difference,
    differences,
    lacking,
    load,
    load_config,
    shareable,
    to_yaml,
    without_secrets,
)
from bigtrain.config.schema import RunConfig

__all__ = [
    "Loaded",
    "RunConfig",
    "difference",
    "differences",
    "lacking",
    "load",
    "load_config",
    "shareable",
    "to_yaml",
    "without_secrets",
]
