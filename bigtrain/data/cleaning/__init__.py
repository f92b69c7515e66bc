"""Cleaning of a stage's training documents: text repaired and redacted; poor, repeated and leaked documents dropped."""

from bigtrain.data.cleaning.decisions import Decisions, decide, kept

__all__ = ["Decisions", "decide", "kept"]
