"""A changed byte of a token store is found and named by the step that reads it, and the way on that is told works."""

import asyncio
import re
import shutil
from pathlib import Path

import numpy as np

from bigtrain.config import load_config
from bigtrain.data.batches import Batches
from bigtrain.data.columns import BLOCK
from bigtrain.data.prepare import prepare_stage
from bigtrain.observability.stream import read_metrics
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.tasks.pretrain import Pretrain
from tests.support import bigtrain, small_config

SEQUENCE, STEPS = 64, 12


def last_new_block(store, config):
    """(the last step that reads a block of tokens.bin which no step before it reads, that block)."""
    batches = Batches(
        [store], None, seed=config.seed, global_batch_size=1, total_samples=STEPS, data_rank=0, data_size=1
    )
    seen, found = set(), None
    for step in range(STEPS):
        [(_, sample)] = batches.ids(step)
        size = np.dtype(store.manifest["dtype"]).itemsize
        first, last = (sample * SEQUENCE * size // BLOCK, ((sample + 1) * SEQUENCE + 1) * size // BLOCK)
        if not {first, last} & seen:
            found = step, first
        seen |= {first, last}
    assert found is not None and found[0] >= 3
    return found


def test_a_changed_byte_is_found_by_the_step_that_reads_it_and_the_run_goes_on_as_told(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(Path(asyncio.__file__).parent, data, ignore=shutil.ignore_patterns("__*"))
    path = small_config(tmp_path, steps=STEPS, every=1)
    one = ["stages.pretrain.global_batch_size=1", "stages.finetune.steps=1", "parallel.processes=1"]
    here = [*one, f"stages.pretrain.data.0.source={data}/*.py"]
    config = load_config(path, here)
    stage = config.stages[0]
    [store] = prepare_stage(stage, Pretrain(), open_tokenizer(config), stores=config.stores, seed=config.seed).train
    step, block = last_new_block(store, config)
    with (store.folder / "tokens.bin").open("r+b") as file:
        file.seek(block * BLOCK + 7)
        byte = file.read(1)[0]
        file.seek(block * BLOCK + 7)
        file.write(bytes([byte ^ 1]))

    stopped = bigtrain("run", path, *here)
    assert stopped.returncode == 2, stopped.stderr
    assert f"{store.folder}/tokens.bin: block {block} (bytes " in stopped.stderr
    assert f"Remove the folder {store.folder}; the next start makes it again" in stopped.stderr
    assert "Traceback" not in stopped.stderr

    shutil.rmtree(store.folder)
    shutil.move(data, tmp_path / "moved")  # the same bytes elsewhere, with other times
    for file in (tmp_path / "moved").iterdir():
        file.touch()
    finished = bigtrain("run", path, *one, f"stages.pretrain.data.0.source={tmp_path}/moved/*.py")
    assert finished.returncode == 0, finished.stderr
    resumed = re.search(r"resumed at step (\d+)", finished.stdout)
    assert resumed and 1 <= int(resumed[1]) <= step
    rows = read_metrics(tmp_path / "runs" / "small")
    steps = [row["step"] for row in rows if row["kind"] == "step" and row["stage"] == "pretrain"]
    assert steps == list(range(1, STEPS + 1))
