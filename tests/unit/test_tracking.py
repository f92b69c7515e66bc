"""A tracker that cannot start is found before anything does: what is missing, and what to do."""

import netrc

import pytest

from bigtrain.config import load
from bigtrain.config.tracking import wrong_with_tracker
from bigtrain.errors import ConfigError
from tests.support import small_config


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A user without any login, in a folder of his own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def test_without_a_login_the_run_is_refused_with_what_to_do(tmp_path):
    path = small_config(tmp_path, trackers=["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match=r"trackers\.1: wandb has no login here; `wandb login`.* WANDB_MODE=offline"):
        load(path, here=True)
    load(path)  # a dry run shows the rest
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "x" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_MODE", "dryrun")],
)
def test_the_advice_works_by_the_environment(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    load(small_config(tmp_path, trackers=["wandb"]), here=True)


def test_a_login_by_wandbs_own_files_is_found(nobody, monkeypatch):
    assert wrong_with_tracker("wandb") is not None
    (nobody / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "x" * 40 + "\n")
    assert netrc.netrc(str(nobody / ".netrc")).hosts
    assert wrong_with_tracker("wandb") is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert wrong_with_tracker("wandb") is not None  # it is of another server
    (nobody / ".netrc").write_text("machine wandb.example.com\n  login user\n  password " + "x" * 40 + "\n")
    assert wrong_with_tracker("wandb") is None
    (nobody / ".netrc").write_text("not a netrc file\n")
    assert wrong_with_tracker("wandb") is not None
    settings = nobody.parent / "wandb" / "settings"  # as `wandb offline` writes it
    settings.parent.mkdir()
    settings.write_text("[default]\nmode = offline\n")
    assert wrong_with_tracker("wandb") is None
    settings.write_text("damaged\n")
    assert wrong_with_tracker("wandb") is not None


def test_other_trackers_need_no_login():
    for name in ("tensorboard", "mlflow", "trackio"):
        assert wrong_with_tracker(name) is None
    assert "pip install 'bigtrain[trackers]'" in wrong_with_tracker("aim")
