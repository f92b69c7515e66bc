"""Several processes make one token store together; one that is killed leaves what it has finished; a disk fills up."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain import cli
from bigtrain.config import to_yaml
from bigtrain.config.model import TrainTokenizerConfig
from bigtrain.config.schema import ModelConfig, RunConfig, SourceConfig, StageConfig, TokenizerConfig
from bigtrain.data import shards, writing
from bigtrain.data.prepare import prepare_stage
from bigtrain.errors import DataError
from bigtrain.observability.stream import Stream
from bigtrain.optim.adamw import AdamW
from bigtrain.pipeline.build import open_tokenizer
from tests.support import Rows

ROWS = 60
FORKS = multiprocessing.get_context("forkserver")
MODULE = """
import os, pathlib
folder = pathlib.Path({folder!r})

def rows():
    for i in range({rows}):
        if (folder / "kill").exists() and int((folder / "kill").read_text()) == i:
            os.kill(os.getpid(), 9)
        yield dict(key=f"k{{i}}", text=f"document {{i}} " + "words and words " * (i % 7 + 2),
                   prompt=f"question {{i}}", completion=f"answer {{i}} " + "and so on " * (i % 5))
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows that kill the process which reads the one whose number is in the file `kill`."""
    name = f"rows_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(folder=str(tmp_path), rows=ROWS))
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:rows"


def make_run(output: Path, source: str, task: str = "pretrain") -> RunConfig:
    stage = StageConfig(
        name="s",
        task=task,
        data=[SourceConfig(source=source)],
        held_out=0.0,
        sequence_length=32,
        global_batch_size=2,
        steps=1,
        optimizer=AdamW(lr=1e-3),
    )
    return RunConfig(
        name="r",
        output=str(output),
        model=ModelConfig(from_config={"model_type": "llama"}),
        tokenizer=TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300)),
        stages=[stage],
    )


class Logged:
    """A task that writes down which rows it encodes in which process. With a barrier, the first call of each process
    waits for the others', so that all of them take part; the process that is to die does so then."""

    def __init__(self, task: Any, log: Path, together: Barrier | None, dies: bool):
        self.layout, self.encoding, self.columns = task.layout, task.encoding, task.columns
        self.store_columns, self.long_documents = task.store_columns, task.long_documents
        self._task, self._log, self._together, self._dies = task, log, together, dies

    def encode(self, rows: list[dict[str, Any]], tokenizer: Any, layout: Any = None) -> Any:
        if self._together is not None:
            self._together.wait(60)
            self._together = None
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        with self._log.open("a") as log:
            log.write("".join(f"{os.getpid()} {row['key']}\n" for row in rows))
        return self._task.encode(rows, tokenizer)


def work(
    run: RunConfig, block_bytes: int, log: Path, together: Barrier | None = None, dies: bool = False, stream: Any = None
) -> Path:
    """Prepare the store of a run, a few rows a block; returns its folder."""
    shards.BLOCK_BYTES = (block_bytes, block_bytes)
    (stage,) = run.stages
    task = Logged(stage.task, log, together, dies)
    (store,) = prepare_stage(stage, task, open_tokenizer(run), stores=run.stores, seed=run.seed, stream=stream).train
    return store.folder


@pytest.fixture(autouse=True)
def _usual_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", shards.BLOCK_BYTES)  # put back what `work` sets


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stores(output: Path) -> list[str]:
    """What lies beside the finished stores and the tokenizer, but for lock files."""
    return [p.name for p in (output / "stores").iterdir() if "." in p.name and p.suffix != ".lock"]


def encoded(log: Path) -> dict[int, list[str]]:
    """process -> the keys of the rows that it has encoded."""
    found: dict[int, list[str]] = {}
    for line in log.read_text().splitlines():
        pid, key = line.split()
        found.setdefault(int(pid), []).append(key)
    return found


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_blocks_of_any_size_make_the_same_store(tmp_path: Path, source: str, task: str, monkeypatch) -> None:
    whole = work(make_run(tmp_path / "whole", source, task), 10**9, tmp_path / "log")
    for size in (1, 333, 2000):
        monkeypatch.setattr(writing, "ASSEMBLY_BYTES", size)
        made = work(make_run(tmp_path / str(size), source, task), size, tmp_path / "log")
        assert contents(made) == contents(whole)
        assert stores(tmp_path / str(size)) == []


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_processes_share_the_work_and_make_the_same_store(tmp_path: Path, source: str, processes: int) -> None:
    whole = work(make_run(tmp_path / "whole", source), 10**9, tmp_path / "log-whole")
    run, log = make_run(tmp_path / "out", source), tmp_path / "log"
    open_tokenizer(run)
    together = FORKS.Barrier(processes)
    started = [FORKS.Process(target=work, args=(run, 300, log, together)) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(90)
    assert [process.exitcode for process in started] == [0] * processes
    shares = encoded(log)
    assert shares.keys() == {process.pid for process in started}
    assert Counter(key for keys in shares.values() for key in keys) == Counter(f"k{i}" for i in range(ROWS))
    (made,) = (path for path in (tmp_path / "out" / "stores").glob("windows-*") if path.is_dir())
    assert contents(made) == contents(whole)
    assert stores(tmp_path / "out") == []


def shards_of(output: Path) -> dict[str, tuple[int, int, int]]:
    """Each finished shard: inode and modification time of its tokens, and who made it."""
    return {
        manifest.parent.name: (
            (stat := (manifest.parent / "tokens.bin").stat()).st_ino,
            stat.st_mtime_ns,
            json.loads(manifest.read_text())["pid"],
        )
        for manifest in (output / "stores").glob("*.shards/*/manifest.json")
        if manifest.parent.name.isdecimal()
    }


def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path, source: str) -> None:
    run, log = make_run(tmp_path / "out", source), tmp_path / "log"
    open_tokenizer(run)
    seen: dict[str, tuple[int, int, int]] = {}
    for row in (25, 45):
        (tmp_path / "kill").write_text(str(row))
        process = FORKS.Process(target=work, args=(run, 300, log))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        now = shards_of(tmp_path / "out")
        assert len(now) > len(seen)
        assert seen.items() <= now.items()
        assert {pid for name, (_, _, pid) in now.items() if name not in seen} == {process.pid}
        seen = now
    (tmp_path / "kill").unlink()
    made = work(run, 300, log)
    assert Counter(key for keys in encoded(log).values() for key in keys) == Counter(f"k{i}" for i in range(ROWS))
    assert contents(made) == contents(work(make_run(tmp_path / "whole", source), 10**9, log))
    assert stores(tmp_path / "out") == []


def test_what_a_dead_process_had_claimed_is_taken_over(tmp_path: Path, source: str) -> None:
    """Both are inside a block of their own when one of them dies."""
    run, log = make_run(tmp_path / "out", source), tmp_path / "log"
    open_tokenizer(run)
    together = FORKS.Barrier(2)
    victim, survivor = (FORKS.Process(target=work, args=(run, 300, log, together, dies)) for dies in (True, False))
    victim.start()
    survivor.start()
    victim.join(60)
    survivor.join(60)
    assert (victim.exitcode, survivor.exitcode) == (-signal.SIGKILL, 0)
    assert Counter(encoded(log)[survivor.pid]) == Counter(f"k{i}" for i in range(ROWS))


def test_half_a_shard_is_no_shard(tmp_path: Path, source: str) -> None:
    """What a process leaves that dies while it writes a shard, or the store, is made again."""
    run, log = make_run(tmp_path / "out", source), tmp_path / "log"
    whole = work(make_run(tmp_path / "whole", source), 300, log)
    left = tmp_path / "out" / "stores" / f"{whole.name}.shards" / "00001.partial"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")
    (left.parent.parent / f"{whole.name}.partial").mkdir()
    (left.parent.parent / f"{whole.name}.partial" / "tokens.bin").write_bytes(b"half")
    assert contents(work(run, 300, log)) == contents(whole)
    assert stores(tmp_path / "out") == []


def test_a_source_that_changes_its_mind_is_refused(tmp_path: Path, source: str) -> None:
    run, log = make_run(tmp_path / "out", source), tmp_path / "log"
    open_tokenizer(run)
    (tmp_path / "kill").write_text("40")
    process = FORKS.Process(target=work, args=(run, 300, log))
    process.start()
    process.join(60)
    (tmp_path / "kill").unlink()
    (manifest, *_) = sorted((tmp_path / "out" / "stores").glob("*.shards/*/manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rows": 1}))
    with pytest.raises(DataError, match=f"{source}: gives other documents than when it was read before"):
        work(run, 300, log)


def test_progress_is_told_with_rates_and_the_time_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "TELL_SECONDS", 0.0)
    events = Rows()
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"text {i} " + "more and more words " * 10)
    size = sum(path.stat().st_size for path in folder.iterdir())
    made = work(make_run(tmp_path / "out", str(folder)), 300, tmp_path / "log", stream=Stream([events]))
    told = [event for event in events if event["kind"] == "tokenizing"]
    assert len(told) >= 10
    done = [event["text_bytes"] for event in told]
    assert done == sorted(done)
    assert told[-1]["expected_bytes"] == done[-1] == size
    assert (told[-1]["documents"], told[-1]["seconds_left"]) == (20, 0)
    assert told[-1]["tokens"] == json.loads((made / "manifest.json").read_text())["tokens"]
    assert told[0]["seconds_left"] > 0
    assert all(told[0][f"{what}_per_second"] > 0 for what in ("documents", "text_bytes", "tokens"))


# A disk that fills up.


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def big_texts(folder: Path, megabytes: int) -> None:
    folder.mkdir()
    for i in range(megabytes):
        (folder / f"{i:02d}.txt").write_text("".join(f"{i} {j} is a number\n" for j in range(50_000))[:1_000_000])


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path, small_disk: Path) -> None:
    big_texts(tmp_path / "texts", 4)
    run = make_run(small_disk, str(tmp_path / "texts"))
    with pytest.raises(DataError, match=r"needs about \d+\.\d MB, and the disk of .* has \d\.\d MB free") as told:
        work(run, 500_000, tmp_path / "log")
    assert "texts (all)" in str(told.value)
    assert shards_of(small_disk) == {}


def test_a_disk_that_fills_up_is_told_and_nothing_half_written_counts(tmp_path: Path, small_disk: Path) -> None:
    name = f"many_of_{tmp_path.name}"  # of a function nobody knows how much it will give
    (tmp_path / f"{name}.py").write_text(
        "def rows():\n    for i in range(40):\n        yield dict(text=f'{i} is a number, ' * 6_000)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        run, log = make_run(small_disk, f"{name}:rows"), tmp_path / "log"
        with pytest.raises(DataError, match="the disk is full"):
            work(run, 400_000, log)
        finished = shards_of(small_disk)
        assert finished
        assert not list((small_disk / "stores").glob("windows-*/manifest.json"))
        with pytest.raises(DataError, match="the disk is full"):
            work(run, 400_000, log)
        assert finished.items() <= shards_of(small_disk).items()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        made = work(run, 400_000, log)
        assert contents(made) == contents(work(make_run(tmp_path / "whole", f"{name}:rows"), 10**9, log))


# The command.


def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """(exit code, output, errors) of the `bigtrain` command, in this process."""
    monkeypatch.setattr("sys.argv", ["bigtrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_verify_names_the_file_of_a_flipped_byte(tmp_path: Path, source: str, monkeypatch, capsys) -> None:
    config = tmp_path / "run.yaml"
    values = yaml.safe_load(to_yaml(make_run(tmp_path / "out", source, "sft")))
    config.write_text(yaml.safe_dump(values))
    code, output, errors = command(monkeypatch, capsys, "prepare", config, "--processes", 1, "--verify")
    assert (code, errors) == (0, "")
    assert "every checksum is right" in output
    (store,) = (path for path in (tmp_path / "out" / "stores").glob("packed-*") if path.is_dir())
    files = sorted(store.iterdir())
    assert {file.name for file in files} == {
        *("packed.bin", "checksums.bin", "documents.bin", "manifest.json", "tokens.bin", "loss_mask.bin")
    }
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        code, _, errors = command(monkeypatch, capsys, "prepare", config, "--processes", 1, "--verify")
        assert code == 2, file
        assert str(file) in errors
        assert len(errors.splitlines()) == 1
        file.write_bytes(whole)
    assert command(monkeypatch, capsys, "prepare", config, "--processes", 1, "--verify")[0] == 0
