"""Small runs on real text for the tests that start the real command, and what they leave."""

import asyncio
import inspect
import json
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
import yaml

from bigtrain.checkpoint import Checkpoint, complete
from bigtrain.config.texts import written
from bigtrain.observability.events import Step
from bigtrain.observability.stream import read_metrics
from tests.forked import run_command

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


class Rows(list):
    """A reader of a stream that keeps the rows of its events."""

    def __call__(self, event):
        self.append(event.row())


def step(stage="s", number=1, **changes):
    """The event of a step."""
    values = {"lr": 0.1, "tokens": 8, "steps": 1, "loss": 1.0, "grad_norm": 1.0, "targets": 8, "step_seconds": 1.0}
    return Step(stage=stage, step=number, **values | {"tokens_per_second": 8.0, "memory_bytes": 1} | changes)


def instructions(path):
    """Write the functions of two standard modules as prompt (signature) and completion (body)."""
    rows = []
    for module in (statistics, textwrap):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            source, doc = inspect.getsource(function), function.__doc__
            if function.__module__ == module.__name__ and doc and doc in source:
                cut = source.index(doc) + len(doc) + 3
                rows.append({"prompt": source[: source.index(doc)], "completion": source[cut:]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) > 30


def small_config(folder, steps=6, every=None, dropout=0.0, ema=None, **changes):
    """A run's file in `folder`: two stages of a tiny Llama on a few modules of the standard library, two processes."""
    instructions(folder / "functions.jsonl")
    stage = {
        "held_out": 0.25,
        "sequence_length": 64,
        "global_batch_size": 5,  # uneven on two processes
        "steps": steps,
        "optimizer": {"lr": 3e-3, "eps": 1e-4, "ema": ema},
        "evaluate": {"every": every, "sequences": 17},
        "checkpoint": {"every": every},
    }
    package = Path(asyncio.__file__).parent
    config = {
        "name": "small",
        "output": written(str(folder / "runs")),
        "model": {"from_config": MODEL | {"attention_dropout": dropout}},
        "tokenizer": {"train": {"vocab_size": 400}},
        "precision": "fp32",
        "parallel": {"engine": "ddp", "processes": 2, "micro_batch_size": 2},
        "stages": [
            {"name": "pretrain", "task": "pretrain", "data": [{"source": f"{package}/*.py"}], **stage},
            {
                "name": "finetune",
                "task": {"name": "sft", "max_cut_answers": 1.0},
                "from": "pretrain",
                "data": [{"source": written(str(folder / "functions.jsonl"))}],
                **stage,
                "sequence_length": 128,
                "optimizer": {"lr": 1e-3, "eps": 1e-4, "ema": ema},
            },
        ],
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def bigtrain(*arguments, **options):
    """Run the real command; returns the finished process with its output as text.

    With `env` a new interpreter starts it, else `tests.forked`, which takes `variables`.
    """
    if "env" not in options:
        return run_command([*map(str, arguments)], **options)
    command = [sys.executable, "-m", "bigtrain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


def run(config, *overrides):
    """`bigtrain run`, to its end; returns what it has printed."""
    finished = bigtrain("run", config, *overrides)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def final_state(folder, stage):
    """(step, every tensor) of the newest checkpoint of a stage of a run."""
    checkpoint = Checkpoint(complete(folder / stage / "checkpoints")[-1])
    manifest = json.loads((checkpoint.folder / "manifest.json").read_text())
    return checkpoint.step, {
        (name, slot): checkpoint.read(name, slot, (0,) * len(entry["shape"]), tuple(entry["shape"]))
        for name, slots in manifest["state"].items()
        for slot, entry in slots.items()
    }


def assert_same_end(folder, expected, steps):
    """That two runs have reported the same numbers, and ended after `steps` steps of each stage in the same state."""
    assert numbers(folder) == numbers(expected)
    for stage in ("pretrain", "finetune"):
        (step, state), (expected_step, expected_state) = final_state(folder, stage), final_state(expected, stage)
        assert step == expected_step == steps
        assert state.keys() == expected_state.keys()
        for key, tensor in expected_state.items():
            assert torch.equal(state[key], tensor), key


def numbers(folder):
    """What a run has reported of its training, without times."""
    keys = ("kind", "stage", "step", "loss", "targets")
    rows = read_metrics(folder)
    return [[row[key] for key in keys] + [row.get("grad_norm"), row.get("lr")] for row in rows]
