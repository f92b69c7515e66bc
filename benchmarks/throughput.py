"""bigtrain against a plain PyTorch loop: the same model and batches, one process, steps alternating in one run.

    python benchmarks/throughput.py [--steps 60]

Each pair is one step of each, in alternating order; printed is the median of the paired ratios of their times,
with a 95 % confidence interval of the median (bootstrap). A ratio of 1.00 means that bigtrain adds nothing.
"""

import argparse
import gc
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bigtrain.config.schema import Optimizer
from bigtrain.data.batches import Batch
from bigtrain.models.causal_lm import empty_model
from bigtrain.models.weights import ModelWeights
from bigtrain.parallel import build_engine
from bigtrain.tasks.causal_lm import CausalLM

SIZES = {
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048},
    "6M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 4096},
}
ROWS, LENGTH = 4, 256
OPTIMIZER = Optimizer(lr=3e-4)


def batch(step, vocabulary):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH + 1), generator=generator)
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous(),
    }


def plain(model):
    """A plain PyTorch loop, as one would write it by hand."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    model.train()

    def step(number):
        tensors = batch(number, model.config.vocab_size)
        logits = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tensors["targets"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ours(model):
    """bigtrain's engine, with the same weights."""

    def build(meta=False):
        return empty_model(model.config, attention="sdpa", activation_checkpointing="none", meta=meta)

    engine = build_engine(
        "ddp",
        build,
        CausalLM(),
        replicate=1,
        precision="fp32",
        micro_batch_size=ROWS,
        optimizer=OPTIMIZER,
        seed=0,
        device=torch.device("cpu"),
    )
    engine.load(ModelWeights(model), {"updates": 0})
    vocabulary = model.config.vocab_size
    return lambda number: engine.step(Batch(batch(number, vocabulary), ROWS, number), OPTIMIZER.lr).loss.item()


def compare(size, steps, warmup=5):
    """Paired ratios bigtrain / plain of the steps' times; checks that both train the same."""
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES[size])
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    sides = [("bigtrain", ours(model)), ("plain", plain(model))]
    ratios = []
    gc.collect()
    gc.disable()
    for number in range(warmup + steps):
        times, losses = {}, {}
        for name, step in sides if number % 2 else sides[::-1]:
            begun = time.perf_counter()
            losses[name] = step(number)
            times[name] = time.perf_counter() - begun
        assert abs(losses["bigtrain"] / losses["plain"] - 1) < 1e-4, losses
        if number >= warmup:
            ratios.append(times["bigtrain"] / times["plain"])
    gc.enable()
    return torch.tensor(ratios, dtype=torch.float64)


def interval(ratios, draws=2000):
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(ratios), (draws, len(ratios)), generator=generator)
    medians = ratios[picks].median(dim=1).values
    return medians.quantile(0.025).item(), medians.quantile(0.975).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="counted pairs of steps for each size")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, fp32, ddp, one process"
    )
    for size in SIZES:
        ratios = compare(size, arguments.steps)
        low, high = interval(ratios)
        print(
            f"{size}: {ROWS} x {LENGTH} tokens a step, {len(ratios)} pairs: bigtrain / plain = "
            f"{ratios.median().item():.4f}  (95 % interval {low:.4f} to {high:.4f})"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
