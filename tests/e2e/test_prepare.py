"""`bigtrain prepare` on the quickstart as it is shipped."""

import json
from pathlib import Path

import pytest

from tests.support import bigtrain

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.soak
def test_the_quickstarts_data(tmp_path):
    """Two processes make it; a second time everything is there; the samples are almost full."""
    made = bigtrain("prepare", CONFIG, f"output={tmp_path}", "--processes", 2)
    assert (made.returncode, made.stderr) == (0, "")
    manifests = {path: json.loads(path.read_text()) for path in tmp_path.glob("stores/*/manifest.json")}
    fills = [manifest["fill"] for manifest in manifests.values() if manifest.get("layout") == "packed"]
    assert len(fills) == 2
    assert min(fills) >= 0.95
    for fill in fills:
        assert f"{fill:.1%} full" in made.stdout
    times = {path: path.stat().st_mtime_ns for path in manifests}
    again = bigtrain("prepare", CONFIG, f"output={tmp_path}", "--verify")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.count("every checksum is right") == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("stores/*/manifest.json")} == times
