"""Saves without room, in each other's way, and which of them stay."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bigtrain.checkpoint import Checkpoint, Retention, Saver, complete, newest
from bigtrain.checkpoint.format import FORMAT, MANIFEST, PROGRESS, step_folder, write_manifest
from bigtrain.checkpoint.retention import is_usable, resumable
from bigtrain.errors import CheckpointError, DamagedError
from bigtrain.state import WEIGHT
from tests.recovery.saving import ALL, NARROW, SLOTS, boxes, check, half_files, tensor_of

# No room, no folder, no leave to write.


@pytest.fixture(scope="module", autouse=True)
def alone():
    """This process is a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "bigtrain-test", where], capture_output=True)
    if mounting.returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    yield where
    subprocess.run(["umount", where], check=True)


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def fill(disk, free):
    """Leave `free` bytes of a disk; returns the file that takes the others."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free)
    return filler


def saving(root, retention=ALL, told=None, **options):
    return Saver(root, retention, told.append if told is not None else lambda _: None, **options)


def save(saver, step):
    saver.save(step, boxes(step), {"updates": step})


@pytest.mark.parametrize("room", ["none", "half the weights", "half the optimizer", "no manifest"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk(disk, room, asynchronous):
    root = disk / "checkpoints"
    with saving(root) as saver:
        for step in (1, 2):
            save(saver, step)
        saver.finish()
    sizes = {path.name.split("-")[0]: path.stat().st_size for path in step_folder(root, 2).glob("*.safetensors")}
    weights, optimizer = sizes["weights"], sizes["optimizer"]
    pages = sum(-(-size // 4096) * 4096 for size in (weights, optimizer))
    free = {
        "none": 0,
        "half the weights": weights // 2,
        "half the optimizer": weights + optimizer // 2,
        "no manifest": pages,
    }
    filler = fill(disk, free[room])
    with (
        pytest.raises(CheckpointError, match=r"No space left on device.*The checkpoints before it are whole"),
        saving(root, asynchronous=asynchronous) as saver,
    ):
        save(saver, 3)
        saver.finish()
    assert half_files(root) == []
    assert [folder.name for folder in complete(root)] == ["step-00000001", "step-00000002"]
    for folder in complete(root):
        check(folder)
    filler.unlink()
    with saving(root, asynchronous=asynchronous) as saver:
        save(saver, 3)
        saver.finish()
    check(newest(root))
    assert newest(root) == step_folder(root, 3)


def test_a_disk_that_is_read_only_for_a_while(disk):
    root = disk / "checkpoints"
    with saving(root) as saver:
        save(saver, 1)
        saver.finish()
        remount(disk, "ro")
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: Read-only file system.*are whole"):
            save(saver, 2)
        check(newest(root))
        remount(disk, "rw")
        save(saver, 2)
        saver.finish()
    assert newest(root) == step_folder(root, 2)
    check(newest(root))


def test_a_folder_that_is_removed_between_saves_is_made_again(tmp_path):
    root = tmp_path / "checkpoints"
    with saving(root, Retention(keep=1)) as saver:
        save(saver, 1)
        saver.finish()
        shutil.rmtree(root)
        save(saver, 2)
        saver.finish()
    assert complete(root) == [step_folder(root, 2)]
    check(newest(root))


def go_on_training(saver):
    while saver.busy:
        pass


def begin_another(saver):
    save(saver, 3)


# One after the other, and no error that stays unheard.


@pytest.mark.parametrize("call", [go_on_training, begin_another, Saver.finish])
def test_an_error_while_the_files_are_written_is_raised_by_the_next_call(tmp_path, call):
    root = tmp_path / "checkpoints"
    with saving(root) as saver:
        save(saver, 1)
        save(saver, 2)
        root.rename(tmp_path / "gone")
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: No such file.*none before it"):
            call(saver)
            saver.finish()  # if the files were written before the folder was gone
        with pytest.raises(CheckpointError, match="step-00000002 cannot be written"):
            begin_another(saver)
    check(newest(tmp_path / "gone"))


@pytest.mark.parametrize("call", [begin_another, Saver.finish])
def test_an_error_while_a_checkpoint_is_made_complete_is_raised_by_the_next_call(tmp_path, call):
    root = tmp_path / "checkpoints"
    with saving(root) as saver:
        save(saver, 1)
        save(saver, 2)
        go_on_training(saver)
        (step_folder(root, 2) / "part-00000.json").unlink()
        saver.publish()
        with pytest.raises(CheckpointError, match=r"No such file.*part-00000.json.*before it are whole"):
            call(saver)
    assert newest(root) == step_folder(root, 1)


def test_a_save_waits_for_the_one_before(tmp_path):
    told = []
    with saving(tmp_path, told=told) as saver:
        for step in range(1, 6):
            save(saver, step)
            assert [saved.step for saved in told] == list(range(1, step))
        saver.finish()
    assert [saved.step for saved in told] == [1, 2, 3, 4, 5]
    for saved in told:
        assert saved.folder == step_folder(tmp_path, saved.step)
        check(saved.folder)


# Which of them stay.


def steps_of(folders):
    return [int(folder.name.removeprefix("step-")) for folder in folders]


@pytest.mark.parametrize(
    ("retention", "whole", "weights"),
    [
        (Retention(keep=2), [11, 12], []),
        (Retention(keep=1, every=4), [4, 8, 12], []),
        (Retention(keep=3, every=4, weights_only=True), [10, 11, 12], [4, 8]),
    ],
)
def test_retention(tmp_path, retention, whole, weights):
    with saving(tmp_path, retention) as saver:
        for step in range(1, 13):
            save(saver, step)
        saver.finish()
    found = complete(tmp_path)
    assert sorted(tmp_path.iterdir()) == found
    assert steps_of(found) == weights + whole
    assert steps_of(filter(resumable, found)) == whole
    for folder in found:
        check(folder, slots=SLOTS if resumable(folder) else [WEIGHT])
    for step in weights:
        folder = step_folder(tmp_path, step)
        assert {path.name for path in folder.iterdir()} == {MANIFEST, PROGRESS, "weights-00000.safetensors"}
        tensors = load_file(folder / "weights-00000.safetensors")
        assert tensors.keys() == NARROW.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, tensor_of(name, WEIGHT, step))


def test_of_those_without_optimizer_none_is_continued_from(tmp_path):
    with saving(tmp_path, Retention(keep=1, every=1, weights_only=True)) as saver:
        for step in (1, 2):
            save(saver, step)
        saver.finish()
    shutil.rmtree(step_folder(tmp_path, 2))
    assert newest(tmp_path) is None
    assert newest(tmp_path, weights_only=True) == step_folder(tmp_path, 1)


def test_killed_before_the_optimizer_was_removed_it_is_removed_the_next_time(tmp_path):
    """Between the manifest without it and its files."""
    retention, old = (
        Retention(keep=1, every=1, weights_only=True),
        step_folder(tmp_path, 1) / "optimizer-00000.safetensors",
    )
    with saving(tmp_path, retention) as saver:
        save(saver, 1)
        saver.finish()
        file = old.read_bytes()
        save(saver, 2)
        saver.finish()
        assert not old.exists()
        old.write_bytes(file)
        check(old.parent, slots=[WEIGHT])
        save(saver, 3)
        saver.finish()
        assert not old.exists()
    check(old.parent, slots=[WEIGHT])
    assert steps_of(filter(resumable, complete(tmp_path))) == [3]


def test_a_damaged_one_is_left_as_it_is(tmp_path):
    """The run goes on: who reads it will be told."""
    with saving(tmp_path, Retention(keep=1, every=1, weights_only=True)) as saver:
        save(saver, 1)
        saver.finish()
        (step_folder(tmp_path, 1) / "optimizer-00000.safetensors").unlink()
        for step in (2, 3):
            save(saver, step)
        saver.finish()
    assert steps_of(complete(tmp_path)) == [1, 2, 3]
    assert (step_folder(tmp_path, 1) / "weights-00000.safetensors").exists()
    with pytest.raises(DamagedError, match=r"optimizer-00000\.safetensors is missing"):
        Checkpoint(step_folder(tmp_path, 1))


def tiny(root, step):
    """A checkpoint without tensors, made by hand: what retention looks at."""
    folder = step_folder(root, step)
    folder.mkdir()
    (folder / "optimizer-00000.safetensors").write_bytes(b"moments")
    (folder / PROGRESS).write_bytes(b"{}")
    describe(folder, step, "optimizer-00000.safetensors", PROGRESS)
    return folder


def empty_file(folder):
    (folder / PROGRESS).write_bytes(b"")


def no_manifest(folder):
    (folder / MANIFEST).write_bytes(b"{}")


def no_optimizer(folder):
    """As keep_weights_only leaves it."""
    (folder / "optimizer-00000.safetensors").unlink()
    describe(folder, 0, PROGRESS, weights_only=True)


def describe(folder, step, *names, weights_only=False):
    files = {name: {"bytes": (folder / name).stat().st_size, "header": 0, "checksum": ""} for name in names}
    metadata = {"format": FORMAT, "step": step, "block": 1, "weights_only": weights_only}
    write_manifest(folder, {**metadata, "files": files, "state": {}})


@settings(max_examples=150, deadline=None)
@given(
    st.builds(Retention, st.integers(1, 3), st.sampled_from([None, 2, 3]), st.booleans()),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([empty_file, no_manifest, no_optimizer])), max_size=4),
    st.sets(st.integers(1, 12), max_size=3),
)
def test_what_a_resume_can_use_stays_whatever_is_damaged(retention, damages, ahead):
    """After each save; damages: (after which step, how the newest checkpoint then is damaged)."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        copy = tiny(root, 99).rename(root / "step-00000099.mine")
        later = [tiny(root, 100 + step) for step in ahead]
        usable, damaged, fallen = [], [], []
        for step in range(1, 13):
            retention.apply(tiny(root, step))
            usable = [*usable, step][-retention.keep :]
            for when, damage in damages:
                if when == step and usable:
                    damage(step_folder(root, usable[-1]))
                    (fallen if damage is no_optimizer else damaged).append(usable.pop())
            there = steps_of(complete(root))
            assert set(usable) <= set(there)
            assert [n for n in there if n < 100 and is_usable(step_folder(root, n))][-len(usable) or 99 :] == usable
            marked = {n for n in range(1, step + 1) if retention.every and n % retention.every == 0}
            assert marked <= set(there)
            expired = set(there) - set(usable) - marked - set(damaged) - set(fallen)
            assert {n for n in expired if n < 100} == set()
        assert all((folder / MANIFEST).exists() for folder in (copy, *later))
