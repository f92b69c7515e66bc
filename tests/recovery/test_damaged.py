"""A run whose newest checkpoint is damaged says so, goes on from the one before, and ends where it would have ended."""

import shutil

import pytest

from bigtrain.checkpoint.format import step_folder
from tests.support import assert_same_end, bigtrain, numbers, run, small_config

STEPS = 8
KEEP = ["stages.pretrain.checkpoint.keep=3", "stages.finetune.checkpoint.keep=3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(file, folder) of a run that has ended, with the checkpoints of three steps in each stage."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_config(folder, steps=STEPS, every=2)
    run(config, *KEEP)
    return config, folder / "runs" / "small"


def damage(folder):
    """Flip a bit of the weights of rank 1."""
    path = folder / "weights-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.soak
def test_damaged_before_it_is_exported_it_is_set_aside(whole):
    config, expected = whole
    broken = expected.with_name("unexported")
    shutil.copytree(expected, broken)
    shutil.rmtree(broken / "finetune" / "export")
    path = damage(step_folder(broken / "finetune" / "checkpoints", STEPS))
    refused = bigtrain("run", config, *KEEP, "name=unexported")
    assert refused.returncode == 1
    assert f"{path} is not what was written" in refused.stderr
    assert "start the run again" in refused.stderr
    assert f"resumed at step {STEPS - 2}" in run(config, *KEEP, "name=unexported")
    assert numbers(broken) == numbers(expected)
    assert (broken / "finetune" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("stage", "step", "options"),
    [
        pytest.param("finetune", STEPS - 2, [], id="goes-on"),
        pytest.param("pretrain", STEPS, ["--restart", "finetune"], id="starts-from"),
    ],
)
def test_damaged_it_goes_on_from_the_one_before(whole, stage, step, options):
    """One that a stage goes on from, or that the next stage starts from, which has to go back a stage then."""
    config, expected = whole
    name = f"damaged-{stage}"
    broken = expected.with_name(name)
    shutil.copytree(expected, broken)
    checkpoints = broken / stage / "checkpoints"
    if step < STEPS:
        shutil.rmtree(step_folder(checkpoints, STEPS))
    path = damage(step_folder(checkpoints, step))
    output = run(config, *KEEP, f"name={name}", *options)
    assert f"{path} is not what was written" in output
    assert "resumed at step" in output
    assert (checkpoints / f"damaged-{path.parent.name}" / path.name).exists()
    assert_same_end(broken, expected, STEPS)
