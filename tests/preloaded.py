"""Imported once by the server that `tests.forked` forks: what a rank of a run takes seconds to import."""

import gc

import datasets  # noqa: F401
import deepspeed.ops  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import bigtrain.cli
import bigtrain.parallel.mesh
import bigtrain.parallel.zero
import bigtrain.pipeline.run  # noqa: F401

gc.freeze()  # the forks share these pages
