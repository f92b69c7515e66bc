"""What is known before a stage is trained: the size of its checkpoints and the room there is for them."""

import io
import shutil

import pytest
import torch
import torch.distributed as dist

from bigtrain.config import load_config
from bigtrain.errors import CheckpointError
from bigtrain.history import History
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Stream
from bigtrain.parallel.world import World
from bigtrain.run_folder import RunFolder
from tests.support import small_config


@pytest.fixture
def history(tmp_path):
    """(of a run that has not begun, its first stage, the events that it emits, what it prints)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = load_config(small_config(tmp_path, ema=0.9))
    events, out = [], io.StringIO()
    world = World(0, 1, torch.device("cpu"), [], None)
    yield (
        History(config, world, RunFolder.of(config), Stream([events.append, Progress(out)])),
        config.stages[0],
        events,
        out,
    )
    dist.destroy_process_group()


def test_size_and_room_are_told_before_the_first_save(history, tmp_path):
    found, stage, events, out = history
    found.plan(stage, 1_000_000, 0)
    assert events[0]["bytes"] == 16_000_000  # weight, two moments and the average of each parameter, in fp32
    assert events[0]["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert "checkpoints: 16.0 MB each, 2 of them kept; " in out.getvalue()


def test_a_run_that_cannot_save_even_once_is_refused(history):
    found, stage, *_ = history
    with pytest.raises(
        CheckpointError, match=r"a checkpoint of stage pretrain takes .* MB, .* could not save even once"
    ):
        found.plan(stage, 10**15, 0)


def test_little_room_is_told(history, tmp_path):
    found, stage, _, out = history
    found.plan(stage, shutil.disk_usage(tmp_path).free // 24, 0)
    assert "room for 1 only: `checkpoint.keep` and the one being written need 3" in out.getvalue()


def test_a_stage_whose_end_is_gone_is_over_only_when_nobody_needs_it(history):
    found, stage, *_ = history
    folder, config = found._folder, found._config
    folder.begin(config, None, world_size=1)
    folder.record("pretrain", finished=True, steps=6, exported_step=6)
    with pytest.raises(
        CheckpointError, match=r"^stage finetune starts from pretrain, and stage pretrain is still to be e"
    ):
        found.is_over(stage)
    folder.export("pretrain").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"(?s)^stage finetune starts from pretrain, but .*`--restart pretrain`"):
        found.is_over(stage)
    folder.record("finetune", finished=True)
    assert found.is_over(stage)
    folder.record("pretrain", exported_step=3)
    with pytest.raises(CheckpointError, match=r"^stage pretrain is still to be exported"):
        found.is_over(stage)
    assert not found.is_over(config.stages[1].model_copy(update={"name": "other"}))
    folder.leave()
