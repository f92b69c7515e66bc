"""What a checkpoint costs: the time until training goes on, what the writer takes from it, and the ways to and fro.

    python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 7] [--folder FOLDER]

A state in host memory, fp32: weights and two moments, in one process. All take turns in one run, in rotating order
after a round that is not counted, so that whatever disturbs the machine disturbs all of them; a ratio is the median of
the rounds' ratios with a 95 % confidence interval (bootstrap). Everything that is written is synced to the disk, and
each checkpoint replaces the one before; everything that is read lies in the page cache.

going on    the seconds that `Saver.save` takes, with a thread that writes behind it and buffers that are kept, against
            a save of the same state that waits until the checkpoint is complete.
computing   matrix products with all threads while the checkpoint is written, against the same ones without.
saving      a save that waits, against `torch.save` of the same tensors.
loading     `Checkpoint.read` of all boxes, each byte checked, copied into tensors that are there, against
            `torch.load(weights_only=True)` copied into them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from data import median, ratios, seconds_of, turns

from bigtrain.checkpoint import Checkpoint, Retention, Saver, newest
from bigtrain.disk import sync
from bigtrain.state import WEIGHT, Box

SIDE = 2048  # of a weight
SLOTS = (WEIGHT, "exp_avg", "exp_avg_sq")


class State:
    """Tensors as an optimizer holds them."""

    def __init__(self, megabytes: int):
        names = range(max(1, round(megabytes * 1e6 / (4 * SIDE**2 * len(SLOTS)))))
        self.tensors = {f"{n}.{slot}": torch.randn(SIDE, SIDE) for n in names for slot in SLOTS}
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def boxes(self) -> Iterator[Box]:
        for key, tensor in self.tensors.items():
            name, slot = key.split(".")
            yield Box(name, slot, tuple(tensor.shape), (0, 0), tensor)


class Ours:
    """A stage's saver, and the folder that it saves to."""

    def __init__(self, root: Path, state: State, *, asynchronous: bool):
        self.root, self._state, self._step = root, state, 0
        self._saver = Saver(root, Retention(keep=1), lambda _: None, asynchronous=asynchronous)

    def save(self) -> float:
        """The seconds until training goes on."""
        self._step += 1
        return seconds_of(lambda: self._saver.save(self._step, self._state.boxes(), {"updates": self._step}))

    def compute(self) -> tuple[float, int]:
        """(seconds, number) of the products that are computed until this checkpoint is complete."""
        matrix, count = torch.randn(1024, 1024), 0
        begun = time.perf_counter()
        while self._saver.busy:
            products(matrix, 1)
            count += 1
        seconds = time.perf_counter() - begun
        self._saver.finish()
        return seconds, count

    def load(self, into: State) -> float:
        return seconds_of(lambda: self._load(into))

    def _load(self, into: State) -> None:
        folder = newest(self.root)
        assert folder is not None
        with closing(Checkpoint(folder)) as checkpoint:
            for box in into.boxes():
                box.tensor.copy_(checkpoint.read(box.name, box.slot, box.offsets, tuple(box.tensor.shape)))


class Torch:
    """torch.save and torch.load, written as safely: under another name, synced, renamed."""

    def __init__(self, root: Path, state: State):
        self._path, self._state = root / "state.pt", state
        root.mkdir()

    def save(self) -> float:
        return seconds_of(self._save)

    def _save(self) -> None:
        partial = self._path.with_suffix(".partial")
        torch.save(self._state.tensors, partial)
        sync(partial)
        partial.replace(self._path)
        sync(self._path.parent)

    def load(self, into: State) -> float:
        return seconds_of(lambda: self._load(into))

    def _load(self, into: State) -> None:
        for key, tensor in torch.load(self._path, weights_only=True).items():
            into.tensors[key].copy_(tensor)


def products(matrix: torch.Tensor, count: int) -> None:
    for _ in range(count):
        matrix @ matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where checkpoints are written, default: a temporary folder of the system")
    asked = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        compare(State(asked.megabytes), State(asked.megabytes), asked.rounds, Path(folder))
    dist.destroy_process_group()


def compare(state: State, other: State, rounds: int, folder: Path) -> None:
    """`other`: what is loaded into."""
    behind = Ours(folder / "behind", state, asynchronous=True)
    waiting = Ours(folder / "waiting", state, asynchronous=False)
    theirs = Torch(folder / "torch", state)
    stalls, while_written, without = [], [], []

    def save_behind() -> float:
        stalls.append(behind.save())
        seconds, count = behind.compute()
        while_written.append(seconds)
        without.append(seconds_of(lambda: products(torch.randn(1024, 1024), count)))
        return stalls[-1]

    found = turns(
        rounds,
        {"behind": save_behind, "waiting": waiting.save, "torch": theirs.save},
    )
    loads = turns(rounds, {"ours": lambda: waiting.load(other), "torch": lambda: theirs.load(other)})
    for load in (waiting.load, behind.load, theirs.load):
        for tensor in other.tensors.values():
            tensor.zero_()
        load(other)
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in state.tensors.items())

    def rate(seconds: list[float]) -> str:
        return f"{median([state.bytes / s / 1e6 for s in seconds], 0)} MB/s"

    print(
        f"{state.bytes / 1e6:,.0f} MB in {len(state.tensors)} tensors, {torch.get_num_threads()} threads, {rounds} "
        f"rounds, load average {os.getloadavg()[0]:.1f}"
    )
    print(f"going on    Saver.save, the first      {stalls[0]:.3f} s")
    print(f"            Saver.save, later ones     {median(found['behind'], 3)} s")
    print(f"            a save that waits          {median(found['waiting'], 3)} s")
    print(
        f"              ratio                    {median(ratios(found['behind'], found['waiting']), 3)}   (bar: 0.15)"
    )
    print(f"computing   while it is written        {median(while_written[1:], 3)} s")
    print(f"            the same without           {median(without[1:], 3)} s")
    print(f"              ratio                    {median(ratios(while_written[1:], without[1:]))}")
    print(f"saving      a save that waits          {rate(found['waiting'])}")
    print(f"            torch.save                 {rate(found['torch'])}")
    print(f"              ratio                    {median(ratios(found['torch'], found['waiting']))}")
    print(f"loading     Checkpoint.read            {rate(loads['ours'])}")
    print(f"            torch.load                 {rate(loads['torch'])}")
    print(f"              ratio                    {median(ratios(loads['torch'], loads['ours']))}")


if __name__ == "__main__":
    main()
