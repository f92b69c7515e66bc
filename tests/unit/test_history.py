"""What is known before a stage is trained: the size of its checkpoints and the room there is for them."""

import io
import shutil

import pytest
import torch
import torch.distributed as dist

from bigtrain.config import load_config
from bigtrain.data.prepare import StageData
from bigtrain.data.store import open_store
from bigtrain.data.types import Layout
from bigtrain.data.writing import write_store
from bigtrain.distributed.world import World
from bigtrain.errors import CheckpointError, DataError
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Stream
from bigtrain.pipeline.history import History
from bigtrain.pipeline.stages import lineage_of
from bigtrain.run_folder import RunFolder
from tests.support import Rows, small_config


@pytest.fixture
def history(tmp_path):
    """(of a run that has not begun, its first stage, the events that it emits, what it prints)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = load_config(small_config(tmp_path, ema=0.9))
    events, out = Rows(), io.StringIO()
    world = World(0, 1, torch.device("cpu"), [], None)
    yield (
        History(config.stages, world, RunFolder(config.folder), Stream([events, Progress(out)])),
        config.stages[0],
        events,
        out,
    )
    dist.destroy_process_group()


def test_size_and_room_are_told_before_the_first_save(history, tmp_path):
    found, stage, events, out = history
    found.plan(stage, {"weight": (1000, 1000)}, 0)
    assert events[0]["bytes"] == 16_000_000  # weight, two moments and the average of each parameter, in fp32
    assert events[0]["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert "checkpoints: 16.0 MB each, 2 of them kept; " in out.getvalue()


def test_a_run_that_cannot_save_even_once_is_refused(history):
    found, stage, *_ = history
    with pytest.raises(
        CheckpointError, match=r"a checkpoint of stage pretrain takes .* MB, .* could not save even once"
    ):
        found.plan(stage, {"weight": (10**15,)}, 0)


def test_little_room_is_told(history, tmp_path):
    found, stage, _, out = history
    found.plan(stage, {"weight": (shutil.disk_usage(tmp_path).free // 24,)}, 0)
    assert "room for 1 only: `checkpoint.keep` and the one being written need 3" in out.getvalue()


def test_a_stage_whose_end_is_gone_is_over_only_when_nobody_needs_it(history, tmp_path):
    found, stage, *_ = history
    folder, config = found._folder, load_config(tmp_path / "small.yaml")
    folder.begin(config, None, world_size=1)
    folder.record("pretrain", finished=True, steps=6, exported_step=6)
    with pytest.raises(
        CheckpointError, match=r"^stage finetune starts from pretrain, and stage pretrain is still to be e"
    ):
        found.is_over(stage)
    folder.export("pretrain").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"(?s)^stage finetune starts from pretrain, but .*`--restart pretrain`: pretrain, and f"
    ):
        found.is_over(stage)
    folder.record("finetune", finished=True)
    assert found.is_over(stage)
    folder.record("pretrain", exported_step=3)
    with pytest.raises(CheckpointError, match=r"^stage pretrain is still to be exported"):
        found.is_over(stage)
    assert not found.is_over(config.stages[1].model_copy(update={"name": "other"}))
    folder.leave()


def store(folder, *documents):
    folder.mkdir(parents=True)
    metadata = {"source": "a.jsonl", "documents_are": "all", "fingerprint": str(folder)}
    write_store(
        folder, [(ids, None) for ids in documents], Layout("windows"), vocabulary_size=99, seed=0, metadata=metadata
    )
    return open_store(folder, 2)


@pytest.mark.parametrize(("changed", "key"), [("train", "data"), ("held_out", "evaluate.data")])
def test_other_documents_are_noticed(history, tmp_path, changed, key):
    """Of training and of evaluations; the same ones in a store that was made in another way are the same."""
    found, stage, _, _ = history
    own = stage.evaluate.model_copy(update={"data": stage.data})
    stage = stage.model_copy(update={"evaluate": own, "held_out": 0.0})
    begun = {name: store(tmp_path / f"first-{name}", [1, 2, 3, 4], [5]) for name in ("train", "held_out")}
    found._folder.begin(load_config(tmp_path / "small.yaml"), None, world_size=1)
    found._folder.record("pretrain", data=lineage_of([begun["train"]]), held_out=lineage_of([begun["held_out"]]))
    again = {name: [store(tmp_path / f"again-{name}", [1, 2, 3, 4], [5])] for name in begun}
    found.check_same_data(stage, StageData(weights=None, **again))
    other = again | {changed: [store(tmp_path / "other", [1, 2, 3, 4], [6])]}
    with pytest.raises(DataError, match=rf"stages\.pretrain\.{key}: a\.jsonl has changed .*--restart pretrain"):
        found.check_same_data(stage, StageData(weights=None, **other))


def test_stores_of_an_earlier_version_are_compared_by_what_they_hold(history, tmp_path):
    found, stage, _, _ = history
    begun = store(tmp_path / "first", [1, 2, 3, 4])
    found._folder.begin(load_config(tmp_path / "small.yaml"), None, world_size=1)
    known = [{name: value for name, value in lineage_of([begun])[0].items() if name != "content"}]
    found._folder.record("pretrain", data=known)
    found.check_same_data(stage, StageData([store(tmp_path / "same", [1, 2, 3, 4])], None, []))
    with pytest.raises(DataError, match="has changed"):
        found.check_same_data(stage, StageData([store(tmp_path / "other", [1, 2, 3, 5])], None, []))
