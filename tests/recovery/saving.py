"""Small states whose every number follows from the step, and processes that save them."""

import itertools
import json
import multiprocessing
from contextlib import closing

import torch
import torch.distributed as dist

from bigtrain.checkpoint import Checkpoint, Retention, Saver
from bigtrain.checkpoint.format import step_folder
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


def read(folder, shapes):
    """The whole state as three ranks read it, one after the other."""
    with closing(Checkpoint(folder)) as checkpoint:
        state = {}
        for name, shape in shapes.items():
            cuts = [shape[0] * rank // 3 for rank in range(4)]
            for slot in checkpoint.slots_of(name):
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


# Two processes that save, forked by one that has imported what they need.


def member(work, store, rank, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def start(work, store, *arguments):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=member, args=(work, store, rank, *arguments), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def save_steps(rank, root, steps, shapes, retention=ALL):
    with Saver(root, retention, lambda _: None, asynchronous=False) as saver:
        for step in steps:
            saver.save(step, boxes(step, shapes, rank, 2), {"updates": step})
