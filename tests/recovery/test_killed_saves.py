"""Saves that are killed: what is on the disk afterwards is whole or not there."""

import multiprocessing
import random
from collections import Counter
from math import prod

import torch
import torch.distributed as dist

from bigtrain.checkpoint import Checkpoint, Retention, Saver, complete, discard_incomplete, newest
from bigtrain.checkpoint.format import MANIFEST, PROGRESS, step_folder
from tests.recovery.saving import NARROW, boxes, check, half_files, start


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
