"""Starting from a pretrained folder: its weights and tokenizer are taken, its code is never run."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain, small_config


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(folder, run) of a finished small run."""
    folder = tmp_path_factory.mktemp("first")
    process = bigtrain(
        "run", small_config(folder, steps=5), "stages.finetune.parallel.engine=fsdp", "parallel.engine=zero2"
    )
    assert process.returncode == 0, process.stderr
    return folder, folder / "runs" / "small"


def from_folder(folder, pretrained, *more):
    return [
        f"output={folder}",
        "name=second",
        f"model={{from_pretrained: {pretrained}}}",
        "tokenizer=null",
        *more,
    ]


def held_out(run, stage):
    return [r["loss"] for r in read_metrics(run) if r["stage"] == stage and r["kind"] == "evaluation"]


def test_a_stage_may_have_an_engine_of_its_own(first):
    _, run = first
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [stages[name]["engine"] for name in ("pretrain", "finetune")] == ["zero2", "fsdp"]
    assert held_out(run, "finetune")[-1] < held_out(run, "finetune")[0]


def test_goes_on_from_the_exported_folder(first, tmp_path):
    folder, run = first
    config = folder / "small.yaml"
    process = bigtrain("run", config, *from_folder(tmp_path, run / "pretrain" / "export"))
    assert process.returncode == 0, process.stderr
    second = held_out(tmp_path / "second", "pretrain")
    assert second[0] == pytest.approx(held_out(run, "pretrain")[-1], rel=1e-6)
    assert second[-1] < second[0]


def test_code_in_a_checkpoint_is_never_run(first, tmp_path):
    """Nor where transformers must read it, as of old files."""
    folder, run = first
    evil = shutil.copytree(run / "pretrain" / "export", tmp_path / "evil")
    torch.save(load_file(evil / "model.safetensors"), evil / "pytorch_model.bin")
    (evil / "model.safetensors").unlink()
    config = json.loads((evil / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["trust_remote_code"] = True
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(
        f"open({str(tmp_path / 'it-ran')!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    process = bigtrain("run", folder / "small.yaml", *from_folder(tmp_path, evil))
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "it-ran").exists()
    second = tmp_path / "second"
    assert held_out(second, "pretrain")[0] == pytest.approx(held_out(run, "pretrain")[-1], rel=1e-6)
    told = f"converted to {second / 'first-weights'} by one process for all, since it has no model.safetensors"
    assert process.stdout.count(told) == 1
    assert not (second / "first-weights").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.from_config.vocab_size=310"], "vocab_size"),
        (["stages.pretrain.data=[{source: EMPTY}]"], "empty.jsonl"),
    ],
)
def test_what_does_not_fit_is_answered_in_a_sentence(first, tmp_path, overrides, message):
    folder, _ = first
    (tmp_path / "empty.jsonl").write_text("")
    overrides = [o.replace("EMPTY", str(tmp_path / "empty.jsonl")) for o in overrides]
    refused = bigtrain("run", folder / "small.yaml", f"output={tmp_path}/runs", *overrides)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_hub_name_that_cannot_be_had_is_answered_in_a_sentence(tmp_path):
    config = small_config(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    overrides = ["model={from_pretrained: nobody/nothing}", "tokenizer=null"]
    refused = bigtrain("run", config, *overrides, env=environment)
    assert refused.returncode == 2
    assert "nobody/nothing cannot be opened" in refused.stderr
    assert "Traceback" not in refused.stderr
