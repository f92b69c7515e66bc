"""What runs give, to the last bit, to be compared over a change that is to change no number.

    python -m tests.golden record FOLDER              before the change
    python -m tests.golden compare FOLDER [NAME...]   after it, on the same machine; NAME: cases, all if none is given

All layouts on 1 to 3 processes in fp32 and bf16, both tasks, packed and not, with accumulation, evaluation, a moving
average, dropout, and one run that is killed and started again. Kept are losses, norms, learning rates and counts of
each step and evaluation, the samples of each step, and every tensor of the state at the end.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np
import xxhash

from bigtrain.data.order import Order
from tests.recovery.test_kill import kill_after_step
from tests.support import final_state, numbers, run, small_config

LAYOUTS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STAGES = ("pretrain", "finetune")
CASES = {
    **{
        f"{engine}-{size}-{precision}": [
            f"parallel.engine={engine}",
            f"parallel.processes={size}",
            f"precision={precision}",
        ]
        for engine in LAYOUTS
        for size in (1, 2, 3)
        for precision in ("fp32", "bf16")
    },
    "fsdp-replicas": ["parallel.engine=fsdp", "parallel.processes=2", "parallel.replicate=2"],
    "checkpointing": ["parallel.activation_checkpointing=full"],
    "micro-1": ["parallel.micro_batch_size=1", "parallel.processes=1"],
    "dropout": ["model.from_config.attention_dropout=0.1"],
    "killed": ["parallel.engine=zero2", "precision=bf16"],
}


def samples():
    """The order of samples, of sizes, weights and seeds that a stage may have."""
    asked = [([1000], None, 0), ([1000, 300], None, 1), ([1000, 300, 7], [0.5, 0.3, 0.2], 2)]
    return [
        [part.tolist() for part in Order(np.array(sizes), weights, seed)(np.arange(0, 5000, 7))]
        for sizes, weights, seed in asked
    ]


def outcome(folder):
    """Numbers and hashes of a run's folder."""
    state = {}
    for stage in STAGES:
        step, tensors = final_state(folder, stage)
        state[stage] = {
            "step": step,
            "tensors": {
                f"{name} {slot}": xxhash.xxh3_128_hexdigest(tensor.contiguous().numpy())
                for (name, slot), tensor in sorted(tensors.items())
            },
        }
    return {"numbers": numbers(folder), "state": state}


def results(names):
    """(name, outcome) of each of the cases `names`, as it is done."""
    with tempfile.TemporaryDirectory() as folder:
        config = small_config(Path(folder), steps=6, every=3, ema=0.9)
        for name in names:
            if name == "samples":
                yield name, samples()
                continue
            overrides = [f"name={name}", *CASES[name]]
            if name == "killed":
                kill_after_step(["run", str(config), *overrides], Path(folder) / "runs" / name, "finetune", 4)
            run(config, *overrides)
            yield name, outcome(Path(folder) / "runs" / name)


def main(verb, folder, names):
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    different = []
    for name, got in results(names or ["samples", *CASES]):
        file = folder / f"{name}.json"
        if verb == "record":
            file.write_text(json.dumps(got))
        elif json.loads(file.read_text()) != json.loads(json.dumps(got)):
            different.append(name)
        print(f"{name}: {'recorded' if verb == 'record' else 'different' if name in different else 'the same'}")
    return 1 if different else 0


if __name__ == "__main__":
    verb, folder, *names = sys.argv[1:]
    if verb not in ("record", "compare"):
        sys.exit(__doc__)
    if unknown := {*names} - {"samples", *CASES}:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are samples, {', '.join(CASES)}")
    sys.exit(main(verb, folder, names))
