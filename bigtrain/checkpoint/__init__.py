"""Checkpoints of the logical state: one format for every engine and number of ranks."""

from bigtrain.checkpoint.format import complete, step_of
from bigtrain.checkpoint.frozen import save_frozen
from bigtrain.checkpoint.load import Checkpoint, newest
from bigtrain.checkpoint.retention import AHEAD, Retention, discard_incomplete, set_aside
from bigtrain.checkpoint.save import NoSaver, Saved, Saver, save

__all__ = [
    "AHEAD",
    "Checkpoint",
    "NoSaver",
    "Retention",
    "Saved",
    "Saver",
    "complete",
    "discard_incomplete",
    "newest",
    "save",
    "save_frozen",
    "set_aside",
    "step_of",
]
