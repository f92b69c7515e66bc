"""Checkpoints of the logical state: one format for every engine and number of ranks."""

from bigtrain.checkpoint.load import Checkpoint
from bigtrain.checkpoint.save import complete, save

__all__ = ["Checkpoint", "complete", "save"]
