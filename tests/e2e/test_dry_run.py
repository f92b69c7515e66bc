"""`bigtrain run CONFIG --dry-run` tells what a run amounts to, and a wrong key is answered before torch is imported."""

import re
import subprocess
import sys

import pytest
import torch

from bigtrain.config import load
from bigtrain.config.show import resolved
from bigtrain.data.batches import Batch
from bigtrain.data.prepare import prepare_stage
from bigtrain.errors import ConfigError
from bigtrain.launching.dry_run import dry_run, model_size, shares
from bigtrain.parallel.micro_batches import micro_batches
from bigtrain.pipeline.build import open_tokenizer
from tests.support import MODEL, bigtrain, small_config
from tests.unit.test_wrong_input import CONFIGS, files_below, recipe_data


def llama_parameters(vocabulary, hidden, intermediate, layers, heads, groups, tied):
    """Counted by hand: projections of attention and of the gated MLP, two norms a layer and one at the end."""
    attention = hidden * hidden * 2 + hidden * (hidden // heads) * groups * 2
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden


ONE = llama_parameters(128256, 2048, 8192, 16, 32, 8, tied=True)
EIGHT = llama_parameters(128256, 4096, 14336, 32, 32, 8, tied=False)
# What a recipe amounts to: lines that its dry run must print, in this order.
FIGURES = {
    "quickstart": [
        ("parameters", f"{llama_parameters(4096, 192, 512, 4, 6, 2, tied=True):,} (786,432 of them in the embedding)"),
        ("global batch", "16 sequences of 256 = 4,096 tokens"),
        ("length", "300 steps = 1,228,800 tokens"),
        ("tokens per parameter", "0.52"),
        ("processes", "2 (zero2)"),
        ("rows per process", "8"),
        ("micro-batches per step", "1 of 8"),
        ("length", "100 steps = 409,600 tokens"),
    ],
    "smollm2-finetune": [
        ("parameters", "not known without loading HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("global batch", "16 sequences of 2,048 = 32,768 tokens"),
        ("length", "2 x all data; how many steps that is, the token store will tell; it is not made yet"),
    ],
    "continue-and-finetune": [
        ("parameters", "not known without loading Qwen/Qwen2.5-0.5B"),
        ("global batch", "64 sequences of 2,048 = 131,072 tokens"),
        ("global batch", "16 sequences of 2,048 = 32,768 tokens"),
    ],
    "llama-1b-zero3-8gpu": [
        ("parameters", f"{ONE:,} (262,668,288 of them in the embedding)"),
        ("global batch", "512 sequences of 4,096 = 2,097,152 tokens"),
        ("length", "11,921 steps = 25,000,148,992 tokens"),
        ("tokens per parameter", "20.2"),
        ("processes", "8 (zero3)"),
        ("rows per process", "64"),
        ("micro-batches per step", "32 of 2"),
    ],
    "llama-8b-fsdp-64gpu": [
        ("parameters", f"{EIGHT:,} (525,336,576 of them in the embedding)"),
        ("global batch", "512 sequences of 8,192 = 4,194,304 tokens"),
        ("length", "38,147 steps = 160,000,114,688 tokens"),
        ("tokens per parameter", "19.9"),
        ("processes", "64 (fsdp, 8 replicas of 8)"),
        ("rows per process", "8"),
        ("micro-batches per step", "8 of 1"),
    ],
}
FIGURES["llama-1b-fsdp-8gpu"] = [(key, text.replace("zero3", "fsdp")) for key, text in FIGURES["llama-1b-zero3-8gpu"]]
FIGURES["llama-8b-zero3-64gpu"] = [
    (key, text.replace("fsdp, 8 replicas of 8", "zero3")) for key, text in FIGURES["llama-8b-fsdp-64gpu"]
]


def test_the_formula_gives_the_published_sizes():
    assert (ONE, EIGHT) == (1_235_814_400, 8_030_261_248)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe(recipe, tmp_path):
    recipe_data(tmp_path)
    before = files_below(tmp_path)
    told = bigtrain("run", recipe, "--dry-run", "--all", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert files_below(tmp_path) == before
    lines = [tuple(re.split(r"  +", line.strip())) for line in told.stdout.splitlines()]
    found = iter(lines)
    for figure in FIGURES[recipe.stem]:
        assert figure in found, f"{figure} is not there, or not in its place:\n{told.stdout}"
    name_line = 1 + recipe.read_text().splitlines().index(f"name: {load(recipe).run.name}")
    assert ("name", load(recipe).run.name, f"{recipe}:{name_line}") in lines
    assert ("attention", "sdpa", "default") in lines
    assert [section for section in lines if section in (("given",), ("defaults",))] == [("given",), ("defaults",)]
    assert lines.index(("given",)) > lines.index(FIGURES[recipe.stem][-1])  # what it amounts to stands first


def test_the_values_that_were_given_are_shown_and_the_defaults_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    loaded = load(small_config(tmp_path), ["seed=3"])
    dry_run(loaded)
    told = capsys.readouterr().out
    plan, values = told.split("\ngiven\n")
    assert "parameters" in plan and "global batch" in plan
    assert re.search(r"^  seed +3 +command line$", values, re.MULTILINE)
    assert not re.search(r" default$", told, re.MULTILINE)
    left = [key for key, _, origin in resolved(loaded) if origin == "default"]
    assert f"{len(left)} more values are defaults; --all shows them" in values
    dry_run(loaded, defaults=True)
    shown = re.findall(r"^  (\S+) .* default$", capsys.readouterr().out, re.MULTILINE)
    assert shown == left
    refused = bigtrain("run", tmp_path / "small.yaml", "--all")
    assert (refused.returncode, refused.stderr) == (2, "--all: it says what --dry-run prints; give both.\n")


def run_imports(*arguments, cwd):
    """(exit code, stdout and messages, the modules that the command imported)."""
    command = [sys.executable, "-X", "importtime", "-m", "bigtrain", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)
    lines = process.stderr.splitlines()
    modules = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    told = [line for line in lines if not line.startswith("import time:")]
    return process.returncode, process.stdout + "\n".join(told), modules


HEAVY = {"torch", "numpy", "transformers", "deepspeed", "datasets", "accelerate", "tokenizers", "safetensors"}


def test_a_wrong_key_is_answered_before_anything_heavy_is_imported(tmp_path):
    for options in ([], ["--dry-run"]):
        code, told, modules = run_imports("run", CONFIGS / "quickstart.yaml", "precison=fp32", *options, cwd=tmp_path)
        assert code == 2
        assert told.strip() == "command line: precison: unknown key; did you mean `precision`?"
        assert "bigtrain.config.load" in modules
        assert not modules & HEAVY
    assert not files_below(tmp_path)


def test_help_imports_nothing_heavy(tmp_path):
    code, told, modules = run_imports("--help", cwd=tmp_path)
    assert code == 0
    assert "Train large models from one file" in told
    assert "typer" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "model.from_config.hiden_size: llama has no such key; did you mean `hidden_size`?"),
        ({"model_type": "lama"}, "model.from_config.model_type: no causal language model lama in transformers"),
        (
            {"hidden_act": 5},
            "model.from_config.hidden_act: no model can be built and trained with 5: TypeError: Field",
        ),
        (
            {"hidden_act": "nope"},
            "model.from_config.hidden_act: no model can be built and trained with nope: KeyError: 'nope'",
        ),
    ],
)
def test_an_architecture_that_cannot_be(tmp_path, change, message):
    config = small_config(tmp_path, model={"from_config": MODEL | change})
    with pytest.raises(ConfigError) as error:
        dry_run(load(config))
    assert str(error.value).startswith(message)


def test_origins(tmp_path):
    config = small_config(tmp_path, trackers=[])
    values = {key: (value, origin) for key, value, origin in resolved(load(config, ["parallel={engine: fsdp}"]))}
    assert values["parallel.engine"] == ("fsdp", "command line")
    assert values["parallel.micro_batch_size"] == (8, "default")  # the override replaces the whole section
    line = 1 + config.read_text().splitlines().index("name: small")
    assert values["name"] == ("small", f"{config}:{line}")
    assert values["stages.finetune.from"][0] == "pretrain"
    assert values["model.from_config.hidden_size"][0] == 32
    assert values["stages.pretrain.data.0.weight"] == (None, "default")
    assert values["trackers"][0] == []


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 19])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_those_of_the_step_contract(rows, processes, size):
    told = shares(rows, processes, size)
    counts = [(rank + 1) * rows // processes - rank * rows // processes for rank in range(processes)]
    assert told.rows == (min(counts), max(counts))
    dummies = 0
    for count in counts:
        micros = micro_batches(Batch({"targets": torch.ones(count, 4)}, rows, 0), size, processes)
        assert [len(micro["targets"]) for micro in micros] == [told.micro_batch_size] * told.micro_batches
        dummies += sum(len(micro["targets"]) for micro in micros) - count
    assert told.dummies == dummies


def test_epochs_are_known_once_the_store_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    loaded = load(small_config(tmp_path))
    changes = ["stages.pretrain.steps=null", "stages.pretrain.epochs=2.5", "stages.finetune.steps=null"]
    changes += ["stages.finetune.epochs=3", "tokenizer.train.vocab_size=300"]
    loaded = load(small_config(tmp_path), changes)
    dry_run(loaded)
    assert capsys.readouterr().out.count("the token store will tell") == 2
    tokenizer = open_tokenizer(loaded.run)
    expected = []
    for stage in loaded.run.stages:
        data = prepare_stage(stage, stage.task, tokenizer, stores=loaded.run.stores, seed=loaded.run.seed)
        sequences = round(stage.epochs * data.train[0].samples)
        expected.append(f"{-(-sequences // 5):,} steps = {sequences * stage.sequence_length:,} tokens")
    before = files_below(tmp_path)
    dry_run(loaded)
    told = capsys.readouterr().out
    assert [line.split("  ")[-1].strip() for line in told.splitlines() if line.startswith("  length")] == expected
    assert files_below(tmp_path) == before
    dry_run(load(small_config(tmp_path), [*changes, "tokenizer.train.vocab_size=301"]))
    assert capsys.readouterr().out.count("the token store will tell") == 2


def test_size_of_a_checkpoint_folder(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**MODEL | {"vocab_size": 500})).save_pretrained(tmp_path / "model")
    config = small_config(tmp_path, model={"from_pretrained": str(tmp_path / "model")})
    size = model_size(load(config, ["tokenizer.train.vocab_size=300"]).run)
    assert size.parameters == llama_parameters(500, 32, 64, 2, 4, 2, tied=True)
    assert size.embedding == 500 * 32


def test_size_without_a_known_vocabulary(tmp_path):
    config = small_config(tmp_path, tokenizer={"from_pretrained": "owner/name"})
    assert model_size(load(config).run) == (
        "not known without loading the tokenizer owner/name; model.from_config.vocab_size would tell"
    )


def test_processes_that_the_replicas_do_not_divide(tmp_path):
    config = small_config(tmp_path, parallel={"engine": "fsdp", "processes": "auto", "device": "cpu", "replicate": 3})
    with pytest.raises(ConfigError, match=r"parallel.replicate: 2 as the number of processes is no multiple of 3"):
        dry_run(load(config))
