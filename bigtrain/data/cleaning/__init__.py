"""Cleaning of a stage's training documents: text repaired and redacted; poor, repeated and leaked documents dropped."""

from bigtrain.data.cleaning.decisions import Decisions, decide, kept
from bigtrain.data.cleaning.judge import HELD_OUT

__all__ = ["HELD_OUT", "Decisions", "decide", "kept"]
