"""Passwords, keys and tokens of a run's file are in no file that bigtrain writes; a run resumes all the same."""

import io
import json
import subprocess
import time

import pytest
import yaml
from fsspec import AbstractFileSystem, register_implementation

from bigtrain.config import load, load_config, shareable, to_yaml
from bigtrain.distributed.consistency import CONFIG, in_common
from bigtrain.errors import ConfigError, DataError, ending_of
from bigtrain.inference import evaluate
from bigtrain.inference.places import RunPlace
from bigtrain.launching import launch as launching
from bigtrain.launching.dry_run import dry_run
from bigtrain.launching.launch import Asked, launch
from bigtrain.observability.events import Preparing
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Stream
from bigtrain.observability.trackers import Tracker
from bigtrain.pipeline.build import open_tokenizer, prepare_stages
from bigtrain.run_folder import RunFolder
from tests.support import small_config

URL = "https://user:{}@host/x.jsonl?part=1&token={}"


def run_of(folder, password="hunter2"):
    return load_config(small_config(folder), [f"stages.pretrain.data=[{{source: '{URL.format(password, password)}'}}]"])


def written(folder):
    """All bytes below a folder."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def trained(config):
    """A run's folder whose first stage has a state to be bound to."""
    folder = RunFolder(config.folder)
    since = time.time()
    folder.begin(config, None, world_size=1)
    source = config.stages[0].data[0].source
    folder.record("pretrain", finished=True, steps=6, data=[{"source": source}], held_out=[{"store": "gone"}])
    folder.end(*ending_of(ConfigError(f"{source}: gone")), since)
    folder.note("failed", f"{source}: gone", rank=3)
    folder.leave()
    return folder


def test_a_runs_folder_holds_no_secrets_and_the_run_resumes(tmp_path):
    config = run_of(tmp_path)
    assert "hunter2" in to_yaml(config)  # what reads the source has it
    folder = trained(config)
    assert b"hunter2" not in written(folder.path)
    assert "https://user:***@host/x.jsonl?part=1&token=***" in (folder.path / "config.yaml").read_text()
    folder.check(config)
    folder.check(run_of(tmp_path, "rotated"))
    assert RunFolder(config.folder).begin(run_of(tmp_path, "rotated"), None, world_size=1) == 2


def test_an_older_file_with_its_secrets_is_compared_without_them(tmp_path):
    folder = trained(run_of(tmp_path))
    (folder.path / "config.yaml").write_text(to_yaml(run_of(tmp_path)))
    folder.check(run_of(tmp_path, "rotated"))


def test_ranks_compare_without_secrets(tmp_path):
    ours, theirs = (in_common(shareable(run_of(tmp_path, *of))) for of in ((), ("rotated",)))
    assert "hunter2" not in ours[CONFIG] and ours == theirs


def test_hyper_parameters_of_trackers_hold_no_secrets(tmp_path):
    stream = Stream(
        [Tracker("tensorboard", "r", run_of(tmp_path).model_dump(by_alias=True, mode="json"), tmp_path / "logs")]
    )
    stream.emit(Preparing(what="tokenizer"))
    stream.close()
    assert b"hunter2" not in written(tmp_path / "logs")
    assert b"https://user:***@host" in written(tmp_path / "logs")


def test_what_is_shown_holds_no_secrets(tmp_path, capsys):
    path = small_config(tmp_path)
    override = f"stages.pretrain.data=[{{source: '{URL.format('hunter2', 'hunter2')}'}}]"
    dry_run(load(path, [override]), defaults=True)
    assert "user:***@host" in capsys.readouterr().out
    for launcher, options in (("torchrun", {}), ("slurm", {}), ("kubernetes", {"image": "i"})):
        launch(Asked(str(path), (override,), launcher, processes=1, **options), print_only=True)
        shown = capsys.readouterr().out
        assert "hunter2" not in shown and "user:***@host" in shown
        assert "# *** stands for a secret" in shown.splitlines()[1]
    if launcher == "kubernetes":
        assert list(yaml.safe_load_all(shown))
    launch(Asked(str(path), (), "torchrun", processes=1), print_only=True)
    assert "stands for a secret" not in capsys.readouterr().out


def test_what_is_started_has_its_secrets(tmp_path, monkeypatch):
    given = {}

    def sbatch(command, **options):
        given.update(options)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(launching, "_check_programs", lambda _: None)
    monkeypatch.setattr(launching.subprocess, "run", sbatch)
    override = f"stages.pretrain.data=[{{source: '{URL.format('hunter2', 'hunter2')}'}}]"
    launch(Asked(str(small_config(tmp_path)), (override,), "slurm", processes=1), print_only=False)
    assert "hunter2" in given["input"] and "***" not in given["input"]


def test_held_out_documents_that_only_a_secret_opens(tmp_path):
    config = run_of(tmp_path)
    folder = trained(config)
    run = load_config(folder.path / "config.yaml")
    place = RunPlace(folder.path, run, run.stages[0], folder.path)
    assert evaluate._recorded(place, run.stages[0]) == []
    with pytest.raises(ConfigError, match=r"keeps no secrets.* --data") as refused:
        evaluate._check_readable(run.stages[0])
    assert "user:***@host" in str(refused.value)


class Vault(AbstractFileSystem):
    """Gives each user `rows`, by any password but `wrong`."""

    protocol = "vault"
    cachable = False
    rows = b""

    def info(self, path, **_):
        if "wrong" in path:
            raise PermissionError(f"vault://{path}: refused")
        return {"name": self._strip_protocol(path), "size": len(self.rows), "type": "file", "ETag": hash(self.rows)}

    def ls(self, path, detail=True, **_):
        return [self.info(path)] if detail else [path]

    def _open(self, path, mode="rb", **_):
        return io.BytesIO(self.rows)


@pytest.fixture
def vault():
    register_implementation("vault", Vault, clobber=True)
    Vault.rows = b"".join(json.dumps({"text": f"number {i} of many rows"}).encode() + b"\n" for i in range(300))


def test_stores_hold_no_secrets_and_outlive_a_rotated_one(tmp_path, vault, capsys):
    """With cleaning, a tokenizer that is trained, and rows that are dropped, each of which names where it stood."""

    def prepared(password, user="user"):
        source = f"vault://{user}:{password}@host/x.jsonl"
        data = f"{{source: '{source}', on_error: skip, max_characters: 22}}"
        clean = "stages.pretrain.clean={exact_duplicates: true, min_characters: 22}"
        config = load_config(small_config(tmp_path), [f"stages.pretrain.data=[{data}]", clean])
        config = config.model_copy(update={"stages": config.stages[:1]})
        tokenizer = open_tokenizer(config)
        data = prepare_stages(
            config.stages, tokenizer, stores=config.stores, seed=config.seed, stream=Stream([Progress()])
        )["pretrain"]
        return {store.folder for store in (*data.train, *data.held_out)}, {path.name for path in stores.iterdir()}

    stores = tmp_path / "runs" / "stores"
    folders, all_of_it = prepared("hunter2")
    assert b"hunter2" not in written(stores) and b"user:***@host" in written(stores)
    assert "hunter2" not in "".join(capsys.readouterr())
    assert prepared("rotated") == (folders, all_of_it)
    with pytest.raises(DataError, match=r"vault://user:\*\*\*@host/x\.jsonl: "):
        prepared("wrong")
    assert prepared("hunter2", user="other")[0].isdisjoint(folders)
    Vault.rows += Vault.rows[-10:]
    assert prepared("hunter2")[0].isdisjoint(folders)
