"""bigtrain as a package: the wheel, and the same from Python as from the command line."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bigtrain.observability.stream import read_metrics
from tests.support import small_config

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from bigtrain import load_config, run
print(run(load_config(sys.argv[1], ["stages.pretrain.steps=3"])))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The built wheel, unpacked where nothing of the checkout is."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, cwd=folder)
    [wheel] = folder.glob("bigtrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        names = archive.namelist()
    return folder / "site", names


def test_the_wheel_has_types_licence_and_the_command_and_nothing_else(installed):
    site, names = installed
    assert "bigtrain/py.typed" in names
    templates = {"command.sh", "slurm.sbatch", "kubernetes.yaml"}
    assert {f"bigtrain/launching/templates/{name}.tmpl" for name in templates} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bigtrain"}
    [entry_points] = site.glob("*.dist-info/entry_points.txt")
    assert "bigtrain = bigtrain.cli:main" in entry_points.read_text()


def test_run_from_python_with_the_wheel_alone(installed, tmp_path):
    site, _ = installed
    config = small_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import bigtrain; print(bigtrain.__file__)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, config], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert program.returncode == 0, program.stderr
    assert program.stdout.splitlines()[-1] == str(tmp_path / "runs" / "small")
    steps = [r for r in read_metrics(tmp_path / "runs" / "small") if r["kind"] == "step" and r["stage"] == "pretrain"]
    assert len(steps) == 3


def test_wrong_input_raises_config_error(tmp_path):
    from bigtrain import load_config
    from bigtrain.errors import ConfigError

    with pytest.raises(ConfigError, match="did you mean `steps`"):
        load_config(small_config(tmp_path), ["stages.pretrain.stepz=3"])
