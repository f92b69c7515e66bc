"""Checkpoints of the logical state: one format for every engine and number of ranks."""

from bigtrain.checkpoint.format import complete
from bigtrain.checkpoint.load import Checkpoint, newest
from bigtrain.checkpoint.retention import Retention, discard_incomplete, set_aside
from bigtrain.checkpoint.save import NoSaver, Saved, Saver, save

__all__ = [
    "Checkpoint",
    "NoSaver",
    "Retention",
    "Saved",
    "Saver",
    "complete",
    "discard_incomplete",
    "newest",
    "save",
    "set_aside",
]
