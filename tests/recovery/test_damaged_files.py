"""Checkpoints that are not what was written: whoever reads them is told, and of which file."""

import itertools
import json
import os
import random

import pytest

from bigtrain.checkpoint.format import BLOCK, MANIFEST, PROGRESS, step_folder
from bigtrain.errors import DamagedError
from tests.recovery.saving import WIDE, check, read, save_steps, start


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
