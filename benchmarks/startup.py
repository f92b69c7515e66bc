"""From the command to the end of the first step: `bigtrain run` against a minimal script with the Hugging Face Trainer.

    python benchmarks/startup.py [--runs 15]

Both train the same small Llama for one step, in one process on the CPU, on the same tokens, which lie prepared on the
disk: bigtrain's in its token store, the script's as a dataset of the `datasets` library. Each run is a process of its
own; the two alternate. Printed are the medians and the median of the paired ratios with a 95 % confidence interval
(bootstrap).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from throughput import interval

from bigtrain.config import load_config
from bigtrain.data.batches import Batches
from bigtrain.data.prepare import prepare_stage
from bigtrain.models.architecture import model_config
from bigtrain.observability.stream import read_metrics
from bigtrain.pipeline.build import open_tokenizer

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS, LENGTH = 4, 128

SCRIPT = """
import sys
import time

from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

folder, out = sys.argv[1:]


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        with open(f"{out}/first-step", "w") as file:
            file.write(repr(time.time()))


Trainer(
    model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
    args=TrainingArguments(
        output_dir=out,
        max_steps=1,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=load_from_disk(f"{folder}/dataset"),
    callbacks=[Clock()],
).train()
"""


def prepare(folder: Path) -> None:
    """A run's file with its stores made, and beside it what the script reads: the same rows, the same model."""
    config = {
        "name": "startup",
        "output": str(folder / "runs"),
        "model": {"from_config": MODEL},
        "tokenizer": {"train": {"vocab_size": 1024}},
        "precision": "fp32",
        "parallel": {"engine": "ddp", "processes": 1, "device": "cpu", "micro_batch_size": ROWS},
        "stages": [
            {
                "name": "pretrain",
                "task": "pretrain",
                "data": [{"source": f"{Path(json.__file__).parent}/*.py"}],
                "sequence_length": LENGTH,
                "global_batch_size": ROWS,
                "steps": 1,
                "optimizer": {"lr": 1e-3},
                "export": False,
            }
        ],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run = load_config(folder / "run.yaml")
    tokenizer = open_tokenizer(run)
    (stage,) = run.stages
    stores = prepare_stage(stage, stage.task, tokenizer, stores=run.stores, seed=run.seed).train
    batch = Batches(stores, None, seed=run.seed, global_batch_size=ROWS, total_samples=ROWS, data_rank=0, data_size=1)(
        0
    )
    ids = batch.tensors["input_ids"].tolist()
    Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(str(folder / "dataset"))
    model_config(run.model, tokenizer).save_pretrained(folder)
    (folder / "script.py").write_text(SCRIPT.replace("ROWS", str(ROWS)))


def bigtrain(folder: Path, number: int) -> float:
    """Seconds until `bigtrain run` has recorded its first step, in a run of its own."""
    name = f"run-{number}"
    command = [sys.executable, "-m", "bigtrain", "run", str(folder / "run.yaml"), f"name={name}"]
    begun = start(command)
    return read_metrics(folder / "runs" / name)[0]["time"] - begun


def trainer(folder: Path, number: int) -> float:
    """Seconds until the script's first step is done."""
    out = folder / f"trainer-{number}"
    out.mkdir()
    begun = start([sys.executable, str(folder / "script.py"), str(folder), str(out)])
    return float((out / "first-step").read_text()) - begun


def start(command: list[str]) -> float:
    """Run a command to its end; returns when it was started, in seconds since the epoch."""
    begun = time.time()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    return begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted pairs; one more comes before, to warm the disk")
    runs = parser.parse_args().runs
    pairs = []
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for number in range(runs + 1):
            order = (bigtrain, trainer) if number % 2 else (trainer, bigtrain)
            taken = {who: who(folder, number) for who in order}
            pairs.append((taken[bigtrain], taken[trainer]))
    times = torch.tensor(pairs[1:], dtype=torch.float64)
    ratios = times[:, 0] / times[:, 1]
    low, high = interval(ratios)
    print(f"{runs} pairs of processes, {os.cpu_count()} cores: from the command to the end of the first step")
    for who, column in (("bigtrain run", times[:, 0]), ("Trainer script", times[:, 1])):
        print(f"  {who:<16} {column.median().item():.2f} s")
    print(f"  bigtrain / Trainer = {ratios.median().item():.4f}   ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
