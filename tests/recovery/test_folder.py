"""The run's folder when the disk does not do what is asked: a sentence and a way on, nothing trained for nothing."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bigtrain import run
from bigtrain.config import load_config
from bigtrain.config.load import load
from bigtrain.disk import clean
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.resilience import requests
from bigtrain.resilience.requests import Requests
from bigtrain.run_folder import RunFolder
from tests.support import small_config


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "bigtrain-test", where], capture_output=True)
    if mounting.returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("how", ["read-only", "full"])
def test_a_folder_that_cannot_be_begun(tmp_path, disk, how):
    config = load_config(small_config(tmp_path), [f"output={disk}/runs"])
    if how == "full":
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
    else:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    folder = RunFolder(config.folder)
    reason = {"read-only": "Read-only file system", "full": "No space left on device"}[how]
    with pytest.raises(ConfigError, match=rf"the run's folder .*small cannot be written: {reason}.*set `output` to"):
        folder.begin(config, None, world_size=1)
    folder.leave()
    if how == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert folder.begin(config, None, world_size=1) == 1
    folder.leave()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (f"name={'n' * 300}", "name: 300 characters are too long for the name of a folder; at most 200"),
        (
            f"stages.finetune.name={'s' * 201}",
            "name: 201 characters are too long for the name of a",
        ),
        (f"output=/tmp/{'o' * 300}", "output: .* cannot be used as a folder: File name too long; choose another"),
        ("output=/dev/null/runs", "output: .*cannot be used as a folder: Not a directory; choose another"),
    ],
)
def test_a_name_that_no_disk_takes(tmp_path, override, told):
    with pytest.raises(ConfigError, match=told):
        load(small_config(tmp_path), [override], here=True)


@pytest.mark.parametrize("how", ["gone", "replaced"])
def test_a_folder_that_is_lost_while_it_trains_ends_the_run(tmp_path, monkeypatch, how):
    """With no save due before the end."""
    monkeypatch.setattr(requests, "LOST_POLLS", 1)
    path = small_config(tmp_path, steps=1_000_000)
    config = load_config(path, ["parallel.processes=1", "stages.pretrain.evaluate.sequences=2"])
    folder = RunFolder(config.folder)

    def lose():
        rows = folder.path / "metrics.jsonl"
        while not rows.is_file() or b'"kind": "step"' not in rows.read_bytes():
            time.sleep(0.01)
        other = RunFolder(tmp_path / "other")
        other.begin(config, None, world_size=1)
        folder.path.rename(tmp_path / "elsewhere")
        if how == "replaced":
            other.path.rename(folder.path)

    thread = threading.Thread(target=lose)
    thread.start()
    told = {"gone": "was removed", "replaced": "has been replaced by another run"}[how]
    with pytest.raises(CheckpointError, match=rf"small {told} while this run trained: .*Put the folder back"):
        run(config)
    thread.join()
    assert folder.path.exists() == (how == "replaced")
    if how == "replaced":
        assert "ended" not in folder.metadata()["attempts"][-1]  # it is another's


def test_a_look_at_the_folder_that_fails_once_is_no_loss(tmp_path, monkeypatch):
    config = load_config(small_config(tmp_path))
    folder = RunFolder(config.folder)
    folder.begin(config, None, world_size=1)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    asked = Requests(folder.save_request, check_there=folder.check_there)
    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.read_bytes", stale)
        asked._look()
        assert not asked.stop
    folder.path.rename(tmp_path / "gone")
    asked._look()
    with pytest.raises(CheckpointError, match="was removed"):
        assert asked.stop
    folder.leave()


HOLD = """
import sys
from bigtrain.disk import scratch
with scratch() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_temporary_folders_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    jobs = [subprocess.Popen([sys.executable, "-c", HOLD], **pipes) for _ in range(2)]
    killed, living = (job.stdout.readline().strip() for job in jobs)
    (tmp_path / "bigtrain-without-lock").mkdir()  # of somebody else
    jobs[0].kill()
    jobs[0].communicate()
    code = "from bigtrain.disk import scratch\nwith scratch('x-') as folder: print(folder.name)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bigtrain-x-")
    assert not Path(killed).exists()
    assert sorted(map(str, tmp_path.iterdir())) == sorted([living, str(tmp_path / "bigtrain-without-lock")])
    jobs[1].communicate("")
    assert [path.name for path in tmp_path.iterdir()] == ["bigtrain-without-lock"]


def test_what_killed_processes_left_beside_finished_folders_goes(tmp_path):
    host, gone = os.uname().nodename, 2**22 + 1  # no process has such a number
    for name in (f"a.removed-{host}-{gone}", f"a.removed-{host}-{os.getpid()}", f"a.removed-other-{gone}", "b.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.json.partial").touch()
    (tmp_path / "c.partial").mkdir()
    lock = f"filelock.FileLock({str(tmp_path / 'c.lock')!r})"
    code = f"import filelock\nwith {lock}: print(1, flush=True); input()"
    job = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    job.stdout.readline()
    clean(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert left == {f"a.removed-{host}-{os.getpid()}", f"a.removed-other-{gone}", "c.partial", "run.json.partial"}
    job.communicate("\n")
    clean(tmp_path)
    assert not (tmp_path / "c.partial").exists()
