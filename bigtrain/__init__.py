"""bigtrain: train large models from one file."""

__version__ = "0.1.0"
