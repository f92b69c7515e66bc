"""Imported once by the server that `tests.forked` forks: what a rank of a run takes seconds to import.

With what DeepSpeed's first engine and torch's first compiled layer import.
"""

import gc

import datasets  # noqa: F401
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.engine
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import torch._dynamo.repro.after_dynamo
import torch._inductor.compile_fx
import torch._inductor.lowering
import torch.distributed.fsdp
import torch.profiler  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import bigtrain.cli
import bigtrain.parallel.mesh
import bigtrain.parallel.zero
import bigtrain.pipeline.run  # noqa: F401

gc.freeze()  # the forks share these pages
