"""A model that is not finite is never saved, continued or told finished, and the way on that a message names works."""

import re

import pytest
import torch

from bigtrain.checkpoint import Checkpoint, Retention, complete, save
from bigtrain.distributed.world import joined
from bigtrain.errors import BigtrainError, CheckpointError, DamagedError
from bigtrain.inference.evaluate import evaluate
from bigtrain.inference.export import export
from bigtrain.observability.stream import read_metrics
from bigtrain.state import Box
from tests import tiny
from tests.support import final_state

CONSTANT = {"name": "constant"}


def follow(message, config):
    """Do as a message says; returns the run's folder."""
    overrides = re.findall(r"stages\.p\.\S+=[^\s`]*[^\s`.,]", message)
    restart = re.search(r"--restart (\w+)", message)
    assert overrides
    return tiny.train(config, *overrides, restart=restart and restart[1])


def assert_finite(folder):
    assert all(tensor.isfinite().all() for tensor in final_state(folder, "p")[1].values())


def test_a_last_update_that_is_not_finite_ends_the_run(tmp_path):
    config = tiny.config(tmp_path, steps=1, export=True)
    with pytest.raises(BigtrainError, match=r"after step 1 there are numbers that are not finite in model\.embed") as e:
        tiny.train(config, "stages.p.optimizer.lr=1e39")
    assert "intact" not in str(e.value)
    folder = tmp_path / "runs" / "tiny"
    assert not complete(folder / "p" / "checkpoints")
    assert not (folder / "p" / "export").exists()
    assert_finite(follow(str(e.value), config))


def test_a_step_after_a_checkpoint_names_it_and_the_way_on(tmp_path):
    """The weights are finite after step 1, of the order of 1e37, and the loss of step 2 is not."""
    config = tiny.config(tmp_path, steps=3, schedule=CONSTANT, checkpoint={"every": 1})
    huge = "stages.p.optimizer.lr=1e37"
    with pytest.raises(BigtrainError, match=r"step 2: the loss is .* --stage p --step 1`") as first:
        tiny.train(config, huge)
    (saved,) = complete(tmp_path / "runs" / "tiny" / "p" / "checkpoints")
    assert f"{saved} is intact" in str(first.value)
    with pytest.raises(BigtrainError) as second:
        tiny.train(config, huge)
    assert str(second.value) == str(first.value)  # "to the same end"
    assert_finite(follow(str(second.value), config))


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
    evaluated = {"schedule": CONSTANT, "held_out": 0.3, "evaluate": {}}
    config = tiny.config(tmp_path, steps=1, **evaluated)
    with pytest.raises(BigtrainError, match="the held-out loss after step 1 is") as e:
        tiny.train(config, "stages.p.optimizer.lr=1e38")
    folder = tmp_path / "runs" / "tiny"
    assert not complete(folder / "p" / "checkpoints")
    assert [row["step"] for row in read_metrics(folder) if row["kind"] == "evaluation"] == [0]
    assert_finite(follow(str(e.value), config))


def poison(folder, slot):
    """Write a checkpoint anew with one number of a slot not finite, as older versions would have saved it."""
    reader = Checkpoint(folder)
    _, state = final_state(folder.parents[2], "p")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name, slot][3, 4] = torch.inf
    boxes = [Box(n, s, tuple(t.shape), (0,) * t.dim(), t) for (n, s), t in state.items()]
    with joined("cpu", "fp32"):
        save(folder.parent, reader.step, boxes, reader.progress, Retention(9))
    return name


@pytest.mark.parametrize("slot", ["weight", "exp_avg_sq"])
def test_a_resume_does_not_start_from_what_is_not_finite(tmp_path, capsys, slot):
    config = tiny.config(tmp_path, steps=3, checkpoint={"every": 1, "keep": 9})
    tiny.train(config)
    folder = tmp_path / "runs" / "tiny"
    _, expected = final_state(folder, "p")
    _, older, newest = complete(folder / "p" / "checkpoints")
    newest.rename(tmp_path / "kept")
    name = poison(older, slot)
    tiny.train(config)
    told = capsys.readouterr().out
    assert f"not finite in fp32 in {name if slot == 'weight' else f'{slot} of {name}'}" in told
    assert older.with_name("damaged-" + older.name).exists()
    _, state = final_state(folder, "p")
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_what_is_not_finite_is_neither_exported_nor_evaluated(tmp_path):
    config = tiny.config(tmp_path, held_out=0.3, evaluate={}, checkpoint={"every": 1})
    folder = tiny.train(config)
    name = poison(complete(folder / "p" / "checkpoints")[-1], "weight")
    for use in (export, evaluate):
        with pytest.raises(DamagedError, match=f"not finite in {name}"):
            use(folder)
    with pytest.raises(CheckpointError, match=r"It is set aside as .*: start the run again"):
        tiny.train(config, "stages.p.export=true")
    assert_finite(tiny.train(config, "stages.p.export=true"))
    assert (folder / "p" / "export" / "model.safetensors").exists()


def test_first_weights_that_are_not_finite_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny.pretrained(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][5] = torch.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = tiny.config(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.from_pretrained: .* not finite in fp32 in model\.norm\.weight"):
        tiny.train(config, f"model={{from_pretrained: {base}}}", "tokenizer=null")
