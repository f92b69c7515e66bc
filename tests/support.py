"""Small runs on real text for the tests that start the real command."""

import asyncio
import inspect
import json
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import yaml

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


def small_config(folder, steps=6, every=None, **changes):
    """A run's file in `folder`: two stages of a tiny Llama on a few modules of the standard library, two processes."""
    instructions(folder / "functions.jsonl")
    stage = {
        "held_out": 0.25,
        "sequence_length": 64,
        "global_batch_size": 5,  # uneven on two processes
        "steps": steps,
        "optimizer": {"lr": 3e-3, "eps": 1e-4},
        "evaluate": {"every": every, "sequences": 17},
        "checkpoint": {"every": every},
    }
    package = Path(asyncio.__file__).parent
    config = {
        "name": "small",
        "output": str(folder / "runs"),
        "model": {"from_config": MODEL},
        "tokenizer": {"train": {"vocab_size": 400}},
        "precision": "fp32",
        "parallel": {"engine": "zero2", "processes": 2, "micro_batch_size": 2},
        "stages": [
            {"name": "pretrain", "task": "pretrain", "data": [{"source": f"{package}/*.py"}], **stage},
            {
                "name": "finetune",
                "task": "sft",
                "from": "pretrain",
                "data": [{"source": str(folder / "functions.jsonl")}],
                **stage,
                "sequence_length": 128,
                "max_cut_answers": 1.0,
                "optimizer": {"lr": 1e-3, "eps": 1e-4},
            },
        ],
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def bigtrain(*arguments, **options):
    """Run the real command; returns the finished process with its output as text."""
    command = [sys.executable, "-m", "bigtrain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)
