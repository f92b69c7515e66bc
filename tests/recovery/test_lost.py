"""A run whose resumable checkpoints are all damaged does not begin anew by itself; each of its choices works."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from bigtrain import run
from bigtrain.checkpoint import complete
from bigtrain.errors import CheckpointError
from bigtrain.run_folder import RunFolder
from tests import tiny
from tests.support import numbers, small_config

KEEP = {"every": 3, "keep": 2, "keep_every": 6, "keep_weights_only": True}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(file, folder, numbers of the whole run) of a run that was killed after step 12 of 13, where it has that
    checkpoint and the weights of step 6."""
    config = small_config(tmp_path_factory.mktemp("stopped"), steps=13)
    values = yaml.safe_load(config.read_text())
    stage = values["stages"][0] | {"checkpoint": KEEP, "export": False, "evaluate": None, "held_out": 0.0}
    values["stages"], values["parallel"]["processes"] = [stage], 1
    config.write_text(yaml.safe_dump(values))
    folder = run(config).folder
    whole = numbers(folder)
    checkpoints = folder / "pretrain" / "checkpoints"
    assert [path.name for path in complete(checkpoints)] == ["step-00000006", "step-00000012", "step-00000013"]
    shutil.rmtree(checkpoints / "step-00000013")
    RunFolder(folder).record("pretrain", finished=False)
    return config, folder, whole


def copy_of(folder, name):
    """A copy of a run whose newest checkpoint is damaged; (its checkpoints, the damaged file, what it was)."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    path = copy / "pretrain" / "checkpoints" / "step-00000012" / "weights-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return copy / "pretrain" / "checkpoints", path, data


def test_it_is_refused_each_time_and_nothing_is_lost(stopped):
    config, folder, whole = stopped
    checkpoints, path, data = copy_of(folder, "refused")
    for _ in range(2):
        with pytest.raises(CheckpointError) as refused:
            run(config, ["name=refused"])
        assert "has the weights of step 6 and damaged-step-00000012. Nothing was begun" in str(refused.value)
        assert "`--restart pretrain`" in str(refused.value)
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["damaged-step-00000012", "step-00000006"]
    assert RunFolder(folder.with_name("refused")).metadata()["attempts"][-1]["ended"]["reason"] == str(refused.value)
    weights = re.search(r"`model: \{from_run: (.*)\}` and no `tokenizer`", str(refused.value))[1]
    other = run(config, ["name=other", f"model={{from_run: {weights}}}", "tokenizer=null", "stages.pretrain.steps=1"])
    assert RunFolder(other.folder).metadata()["origin"]["step"] == 6
    words = str(refused.value).split("`mv ")[1].split("`")[0].split()
    (checkpoints / "damaged-step-00000012" / path.name).write_bytes(data)
    shutil.move(*words)
    run(config, ["name=refused"])
    assert numbers(folder.with_name("refused")) == whole


def test_restarted_it_is_trained_anew_and_the_old_one_kept(stopped):
    config, folder, whole = stopped
    copy_of(folder, "anew")
    assert numbers(run(config, ["name=anew"], restart="pretrain").folder) == whole
    kept = folder.with_name("anew") / "pretrain.1" / "checkpoints"
    assert [entry.name for entry in sorted(kept.iterdir())] == ["step-00000006", "step-00000012"]


def test_weights_ahead_of_the_run_are_set_aside(stopped):
    """Of a run whose user has put an older checkpoint back."""
    config, folder, whole = stopped
    copy = folder.with_name("ahead")
    shutil.copytree(folder, copy)
    checkpoints = copy / "pretrain" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000018")
    run(config, ["name=ahead"])
    assert numbers(copy) == whole
    assert (checkpoints / "ahead-step-00000018" / "manifest.json").exists()


def test_damaged_before_it_is_exported_each_choice_works(tmp_path):
    """A stage that was finished, whose only checkpoint is found damaged when it is exported."""
    config = tiny.config(tmp_path, export=True)
    whole = tiny.train(config)
    shutil.rmtree(whole / "p" / "export")
    [file] = (whole / "p" / "checkpoints").glob("step-*/weights-*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for begin in ("weights-00000.safetensors is not what was written", "stage p is still to be exported"):
        with pytest.raises(CheckpointError, match=rf"(?s){begin}.*`--restart p`: p is trained from") as refused:
            tiny.train(config)
    ways = {name: shutil.copytree(whole, whole.with_name(name)) for name in ("goes-without", "anew")}
    tiny.train(config, "name=goes-without", "stages.p.export=false")
    assert tiny.train(config, "name=anew", restart="p") == ways["anew"]
    aside, before = re.search("`mv (.*)`", str(refused.value))[1].split()
    (Path(aside) / file.name).write_bytes(data)
    shutil.move(aside, before)
    tiny.train(config)
    exports = [(folder / "p" / "export" / "model.safetensors").read_bytes() for folder in (whole, ways["anew"])]
    assert exports[0] == exports[1]
