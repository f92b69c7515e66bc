"""A stage that trains a part of its model, with the real command."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bigtrain.checkpoint import Checkpoint, complete
from tests.support import bigtrain, numbers, run, small_config

FREEZE = "stages.finetune.freeze=[model.embed_tokens, model.layers.0]"
OPTIONS = [FREEZE, "parallel.engine=zero2", "precision=bf16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two stages, of which the second trains a part; (its file, its folder)."""
    folder = tmp_path_factory.mktemp("frozen")
    config = small_config(folder, steps=4, every=2, ema=0.9)
    run(config, *OPTIONS)
    return config, folder / "runs" / "small"


def weights(folder, stage, step=-1):
    """The whole model of a checkpoint of a stage, as its reader has it, and the slots of each parameter."""
    checkpoint = Checkpoint(complete(folder / stage / "checkpoints")[step])
    state = checkpoint._tensors()
    shapes = {name: tuple(slots["weight"]["shape"]) for name, slots in state.items()}
    read = {name: checkpoint.read(name, "weight", (0,) * len(shape), shape) for name, shape in shapes.items()}
    return read, {name: checkpoint.slots_of(name) for name in shapes}


def test_what_is_frozen_comes_whole_from_the_stage_before(trained):
    _, folder = trained
    (before, _), (after, slots) = weights(folder, "pretrain"), weights(folder, "finetune")
    assert before.keys() == after.keys()
    still = {name for name in after if torch.equal(before[name], after[name])}
    assert still == {n for n in after if n == "model.embed_tokens.weight" or n.startswith("model.layers.0.")}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(slots[name] == (["weight"] if name in still else ["ema", "exp_avg", "exp_avg_sq", "weight"])
               for name in after)  # fmt: skip


@pytest.mark.parametrize("ema", [False, True])
def test_the_export_is_whole(trained, tmp_path, ema):
    _, folder = trained
    made = bigtrain("export", folder / "finetune", "--to", tmp_path / "made", "--dtype", "fp32", *["--ema"] * ema)
    assert made.returncode == 0, made.stderr
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict()
    expected, slots = weights(folder, "finetune")
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor) == (not ema or slots[name] == ["weight"]), name


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(trained):
    config, folder = trained
    expected, told = weights(folder, "finetune")[0], numbers(folder)
    shutil.rmtree(complete(folder / "finetune" / "checkpoints")[-1])
    run(config, *OPTIONS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder, "finetune")[0].items())
    assert [row for row in numbers(folder) if row not in told] == []


def test_the_dry_run_says_how_much_trains(trained, tmp_path):
    config, folder = trained
    shown = bigtrain("run", config, FREEZE, "name=other", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    after, slots = weights(folder, "finetune")
    trained_ones = sum(tensor.numel() for name, tensor in after.items() if slots[name] != ["weight"])
    whole = sum(tensor.numel() for tensor in after.values())
    assert f"trained parameters      {trained_ones:,} of {whole:,}" in shown.stdout
    wrong = ["stages.finetune.freeze=[model.embed_tokenz]", "name=other"]
    for arguments in (wrong, [*wrong, "--dry-run"]):
        refused = bigtrain("run", config, *arguments)
        assert refused.returncode == 2
        assert (
            "stages.finetune.freeze: no parameter of the model is named model.embed_tokenz; did you" in refused.stderr
        )
    assert not (folder.parent / "other").exists()


def test_another_freeze_is_another_run(trained):
    config, _ = trained
    refused = bigtrain("run", config, *OPTIONS[1:])
    assert refused.returncode == 2
    assert "stages.finetune.freeze" in refused.stderr


def test_damaged_frozen_weights_are_told_and_set_nothing_aside(trained, tmp_path):
    config, folder = trained
    copy = shutil.copytree(folder.parent, tmp_path / "runs") / "small"
    [file, *_] = sorted((copy / "finetune" / "frozen").glob("step-*/weights-*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-100] ^= 1
    file.write_bytes(damaged)
    shutil.rmtree(complete(copy / "finetune" / "checkpoints")[-1])
    failed = bigtrain("run", config, *OPTIONS, f"output={tmp_path / 'runs'}")
    assert failed.returncode == 1
    assert "needs the weights that do not train" in failed.stderr
    assert str(file) in failed.stderr
    assert (
        "Put whole files in place of the damaged ones, or train the stage anew with `--restart finetune`."
        in failed.stderr
    )
    assert len(complete(copy / "finetune" / "checkpoints")) == 1
    run(config, *OPTIONS, f"output={tmp_path / 'runs'}", "--restart", "finetune")
