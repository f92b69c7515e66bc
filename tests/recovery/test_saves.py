"""Saves that are killed, damaged, without room or in each other's way: what is on the disk is whole or not there."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
from collections import Counter
from contextlib import closing
from math import prod

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bigtrain.checkpoint import Checkpoint, Retention, Saver, complete, discard_incomplete, newest
from bigtrain.checkpoint.format import BLOCK, MANIFEST, PROGRESS, step_folder
from bigtrain.checkpoint.retention import resumable
from bigtrain.errors import CheckpointError, DamagedError
from bigtrain.state import WEIGHT, Box

SLOTS = (WEIGHT, "exp_avg", "exp_avg_sq")
NARROW = {"embed": (6, 2**17), "norm": (7,)}  # 6 MB a rank in a world of two
WIDE = {"embed": (6, 2**19), "norm": (7,)}  # a rank's box of it is longer than a block
ALL = Retention(keep=100)


def tensor_of(name, slot, step, shapes=NARROW):
    """The tensor after `step` steps."""
    numbers = torch.rand(shapes[name], generator=torch.Generator().manual_seed(len(name)))
    return numbers.add_(1000 * SLOTS.index(slot) + step)


def boxes(step, shapes=NARROW, rank=0, size=1):
    """A rank's boxes: its share of the rows of a matrix; vectors are rank 0's."""
    for name, shape in shapes.items():
        first, last = (shape[0] * rank // size, shape[0] * (rank + 1) // size) if len(shape) > 1 else (0, shape[0])
        if len(shape) > 1 or rank == 0:
            for slot in SLOTS:
                part = tensor_of(name, slot, step, shapes)[first:last]
                yield Box(name, slot, shape, (first, *(0 for _ in shape[1:])), part)


def read(folder, shapes=NARROW, weights_only=False, size=3):
    """The whole state as `size` ranks read it, one after the other."""
    with closing(Checkpoint(folder, weights_only)) as checkpoint:
        state = {}
        for name, shape in shapes.items():
            cuts = [shape[0] * rank // size for rank in range(size + 1)]
            for slot in checkpoint.slots:
                parts = [
                    checkpoint.read(name, slot, (a, *(0 for _ in shape[1:])), (b - a, *shape[1:]))
                    for a, b in itertools.pairwise(cuts)
                ]
                state[name, slot] = torch.cat(parts)
        return checkpoint.step, checkpoint.progress, state


def check(folder, shapes=NARROW, slots=SLOTS):
    """That a checkpoint holds what its step had."""
    step, progress, state = read(folder, shapes)
    assert step_folder(folder.parent, step) == folder
    assert progress == {"updates": step}
    assert state.keys() == {(name, slot) for name in shapes for slot in slots}
    for (name, slot), tensor in state.items():
        assert torch.equal(tensor, tensor_of(name, slot, step, shapes)), (folder, name, slot)


def half_files(root):
    """Files that are shorter than their header says, or not under their last name yet."""
    return [path for path in root.glob("step-*/*") if path.suffix == ".partial" or is_short(path)]


def is_short(path):
    if path.suffix != ".safetensors":
        return False
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + max(length, 1):
        return True
    entries = json.loads(data[8 : 8 + length]).values()
    return len(data) != 8 + length + max(entry["data_offsets"][1] for entry in entries if "data_offsets" in entry)


# Two processes that save, forked by one that has imported all this.


def member(work, store, rank, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def start(work, store, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=member, args=(work, store, rank, *arguments), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def save_steps(rank, root, steps, shapes, retention=ALL):
    with Saver(root, retention, lambda _: None, asynchronous=False) as saver:
        for step in steps:
            saver.save(step, boxes(step, shapes, rank, 2), {"updates": step})


def save_for_ever(rank, told, root, first):
    """As the loop does: some saves are asked for while the one before is still written."""
    with Saver(root, Retention(keep=2), lambda saved: told.send(saved.step)) as saver:
        for step in range(first, first + 100):
            busy = torch.ones(1)
            while busy and step % 4:
                busy.fill_(saver.busy)
                dist.all_reduce(busy)
            if not busy:
                saver.publish()
            saver.save(step, boxes(step, NARROW, rank, 2), {"updates": step})


# Killed.


def choose_instant(root, step, choice):
    """A random instant of the save of a step, or shortly after it; as the function that tells that it has come."""
    folder, rank = step_folder(root, step), choice.randrange(2)
    weights, optimizer = (folder / f"{kind}-{rank:05d}.safetensors" for kind in ("weights", "optimizer"))
    older = step_folder(root, step - 2) / MANIFEST
    some = choice.random()
    size = prod(NARROW["embed"]) * 4 // 2
    instants = [
        folder.exists,
        lambda: has_bytes(weights, some * size),
        lambda: has_bytes(weights, size),
        lambda: has_bytes(optimizer, some * 2 * size),
        lambda: has_bytes(optimizer, 2 * size),
        (folder / f"part-{rank:05d}.json").exists,
        (folder / PROGRESS).exists,
        (folder / MANIFEST).exists,
        lambda: (folder / MANIFEST).exists() and not older.exists(),
        lambda: (folder / MANIFEST).exists() and not older.parent.exists(),
    ]
    chosen = choice.choice(instants)
    return lambda: chosen() or step_folder(root, step + 1).exists()  # it was too short to be seen


def has_bytes(path, size):
    try:
        return path.stat().st_size >= size
    except FileNotFoundError:
        return False


def phase(root):
    """What the last save was doing."""
    whole = complete(root)
    left = sorted(set(root.glob("step-*")) - set(whole))
    if not left:
        return "between saves"
    if whole and left[0] < whole[-1]:
        return "removing an older one"
    names = {path.name for path in left[0].iterdir()}
    if names & {PROGRESS, "progress.partial", "manifest.partial"}:
        return "manifest"
    if {"part-00000.json", "part-00001.json"} <= names:
        return "before the manifest"
    if half_files(root):
        return "within a file"
    return "between files" if names else "before the first file"


def drained(pipe):
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        return


def test_killed_at_random_instants_the_newest_is_whole(tmp_path):
    root, choice = tmp_path / "checkpoints", random.Random(0)
    root.mkdir()
    last, phases = 0, Counter()
    for number in range(56):
        here, there = multiprocessing.Pipe(duplex=False)
        processes = start(save_for_ever, tmp_path / f"store-{number}", there, root, last + 1)
        there.close()
        reached = choose_instant(root, last + choice.randrange(1, 3), choice)
        while not reached():
            assert all(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        phases[phase(root)] += 1
        told = max(drained(here), default=last)
        found = complete(root)
        assert newest(root) == (found[-1] if found else None)
        last = Checkpoint(found[-1]).step if found else 0
        assert last >= told, "a checkpoint that was told complete is gone"
        assert len(found) >= min(2, last)
        for folder in found:
            check(folder)
        discard_incomplete(root)
        assert sorted(root.iterdir()) == found
        assert half_files(root) == []
    assert len(phases) >= 4, phases


# Damaged.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of two ranks, of the steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    processes = start(save_steps, root / "store", root / "checkpoints", (1, 2), WIDE)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return root / "checkpoints"


def assert_told(folder, *files):
    """That one who reads the whole state is told of a damaged file."""
    with pytest.raises(DamagedError) as raised:
        read(folder, WIDE)
    assert raised.value.folder == folder
    assert any(str(file) in str(raised.value) for file in files), (files, str(raised.value))


def places(path, choice):
    """Bytes of a file: all of a JSON file; of the others the first and last, some of the header, of each block."""
    size = path.stat().st_size
    if path.suffix == ".json":
        return range(size)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    padding = data.rindex(b"}", 0, end) + 1
    assert padding < end < BLOCK < size
    blocks = [choice.randrange(at, min(at + BLOCK, size)) for at in range(end, size, BLOCK)]
    return [*range(8), *choice.sample(range(8, padding), 8), *range(padding, end), end, *blocks, size - 1]


def changes(path, right, choice):
    """Other values of a byte: one bit of it flipped, any; in a JSON file also such as may leave it JSON."""
    likely = b" \t\r\n0179abfAEe" if path.suffix == ".json" else b""
    found = {right ^ 1 << choice.randrange(8), choice.randrange(256), *likely}
    return found - {right}


def test_every_damaged_byte_is_found_and_its_file_named(saved):
    folder, choice = step_folder(saved, 2), random.Random(1)
    check(folder, WIDE)
    names = [f"{kind}-0000{rank}.safetensors" for kind in ("optimizer", "weights") for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, PROGRESS, *names])
    still_json = 0
    for path in sorted(folder.iterdir()):
        descriptor = os.open(path, os.O_RDWR)
        for at in places(path, choice):
            right = os.pread(descriptor, 1, at)
            for value in changes(path, right[0], choice):
                os.pwrite(descriptor, bytes([value]), at)
                assert_told(folder, path)
                still_json += path.suffix == ".json" and is_json(path)
            os.pwrite(descriptor, right, at)
        os.close(descriptor)
    assert still_json > 1000
    check(folder, WIDE)


def is_json(path):
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def test_cut_removed_swapped_and_others_files_are_found(saved):
    folder, other = step_folder(saved, 2), step_folder(saved, 1)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for wrong in (data[:-1], b"", data + b" ", (other / path.name).read_bytes()):
            path.write_bytes(wrong)
            assert_told(folder, *(folder.iterdir() if path.name == MANIFEST else [path]))
        path.unlink()
        assert_told(folder, path)
        path.write_bytes(data)
    for one, two in itertools.combinations(sorted(folder.iterdir()), 2):
        swap(one, two)
        assert_told(folder, one, two)
        swap(one, two)
    check(folder, WIDE)


def swap(one, two):
    """Exchange two files' contents."""
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


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
