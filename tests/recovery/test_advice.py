"""What a message advises works: a run that was refused, or failed before it saved, takes the corrected file."""

import asyncio
from pathlib import Path

import pytest

from bigtrain import run
from bigtrain.errors import BigtrainError, DataError
from bigtrain.observability.stream import read_metrics
from bigtrain.run_folder import RunFolder
from tests.support import numbers, small_config

ONE = [
    "parallel.processes=1",
    "stages.pretrain.export=false",
    "stages.finetune.export=false",
    f"stages.pretrain.data.0.source={Path(asyncio.__file__).parent}/*events.py",
    "stages.pretrain.held_out=0.5",
]
STRICT = ["stages.finetune.task.max_cut_answers=0.0", "stages.finetune.sequence_length=64"]


def test_each_advice_can_be_followed_until_a_stage_has_saved(tmp_path):
    config = small_config(tmp_path, steps=3)
    with pytest.raises(
        DataError,
        match=r"raise stages\.finetune\.sequence_length, .* allow more with stages\.finetune\.task\.max_cut_answers",
    ):
        run(config, [*ONE, *STRICT])
    with pytest.raises(BigtrainError, match=r"step \d: the loss is (nan|inf).* its values may change"):
        run(config, [*ONE, "stages.pretrain.optimizer.lr=1e39", "stages.pretrain.optimizer.max_grad_norm=null"])
    better = [*ONE, "tokenizer.train.vocab_size=350", "stages.pretrain.sequence_length=32", "stages.pretrain.steps=2"]
    folder = run(config, better).folder
    assert numbers(folder) == numbers(run(config, [*better, "name=at-once"]).folder)
    assert {row["step"] for row in read_metrics(folder) if row["stage"] == "pretrain"} == {0, 1, 2}
    ends = [attempt["ended"] for attempt in RunFolder(folder).metadata()["attempts"]]
    assert [end["how"] for end in ends] == ["refused", "failed", "finished"]
    assert "max_cut_answers" in ends[0]["reason"]
    assert "stages.pretrain.optimizer.lr=0.001" in ends[1]["reason"]
    kept, fresh = (path / "tokenizer" / "tokenizer.json" for path in (folder, folder.with_name("at-once")))
    assert kept.read_bytes() == fresh.read_bytes()
