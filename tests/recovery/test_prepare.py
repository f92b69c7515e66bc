"""`bigtrain prepare` that is killed, launcher and all, goes on where it was; two of them at once share the work."""

import json
import os
import time

import yaml

from tests.forked import start_command
from tests.support import MODEL, bigtrain

# 20 rows of 1 MB: the shards end after rows 8, 16 and 20. Reading row `hold` waits for the FIFO `gate`.
MODULE = """
import pathlib
folder = pathlib.Path({folder!r})

def rows():
    for i in range(20):
        if (folder / "hold").exists() and int((folder / "hold").read_text()) == i:
            (folder / "gate").read_text()
        yield dict(key=str(i), text=f"row {{i}} of words and words\\n" * 45_000)
"""


def write_config(folder):
    (folder / "long_rows.py").write_text(MODULE.format(folder=str(folder)))
    os.mkfifo(folder / "gate")
    stage = {
        "name": "pretrain",
        "task": "pretrain",
        "data": [{"source": "long_rows:rows"}],
        "sequence_length": 64,
        "global_batch_size": 4,
        "steps": 1,
        "optimizer": {"lr": 1e-3},
    }
    tokenizer = {"train": {"vocab_size": 300, "sample_bytes": 10_000}}
    config = {"name": "r", "model": {"from_config": MODEL}, "tokenizer": tokenizer, "stages": [stage]}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def command(config, output):
    return ["prepare", config, f"output={output}", "--processes", 2]


def shards(output):
    found = {}
    for manifest in (output / "stores").glob("*.shards/*/manifest.json"):
        if manifest.parent.name.isdecimal():
            stat = (manifest.parent / "tokens.bin").stat()
            found[manifest.parent.name] = (stat.st_ino, stat.st_mtime_ns, json.loads(manifest.read_text())["pid"])
    return found


def checksums(output):
    (manifest,) = (output / "stores").glob("windows-*/manifest.json")
    return json.loads(manifest.read_text())["files"]


def kill_once_it_has(number, config, output, folder):
    """SIGKILL the launcher when that many shards are finished; its processes, which wait at the gate, end with it."""
    process = start_command(*command(config, output), cwd=folder)
    while process.poll() is None and len(shards(output)) < number:
        time.sleep(0.05)
    process.kill()
    assert process.wait() < 0, "it ended before it could be killed"
    process.stdout.read()  # ends when the last of its processes has ended, for they hold the pipe
    found = shards(output)
    assert len(found) == number
    return found


def test_killed_and_started_again(tmp_path):
    config, output = write_config(tmp_path), tmp_path / "killed"
    (tmp_path / "hold").write_text("12")  # in the second block
    first = kill_once_it_has(1, config, output, tmp_path)
    (tmp_path / "hold").write_text("18")  # in the third
    second = kill_once_it_has(2, config, output, tmp_path)
    assert first.items() <= second.items()
    (tmp_path / "hold").unlink()
    finished = bigtrain(*command(config, output), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "20 documents" in finished.stdout
    assert not shards(output)
    whole = bigtrain("prepare", config, f"output={tmp_path / 'whole'}", "--processes", 1, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert checksums(output) == checksums(tmp_path / "whole")


def test_two_commands_at_once(tmp_path):
    """Both read up to the gate, so both have taken a block before any of them can finish."""
    config, output = write_config(tmp_path), tmp_path / "shared"
    (tmp_path / "hold").write_text("18")
    both = [start_command(*command(config, output)[:-2], cwd=tmp_path) for _ in range(2)]
    while all(process.poll() is None for process in both) and len(shards(output)) < 2:
        time.sleep(0.05)
    assert {pid for _, _, pid in shards(output).values()} <= {process.pid for process in both}
    (tmp_path / "hold").unlink()
    while any(process.poll() is None for process in both):  # those that wait at the gate are let through
        try:
            os.close(os.open(tmp_path / "gate", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            time.sleep(0.05)
    for process in both:
        told = process.stdout.read()
        assert process.wait() == 0, told
        assert "20 documents" in told
    assert not shards(output)
