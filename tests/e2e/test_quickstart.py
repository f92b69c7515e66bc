"""The quickstart as it is shipped."""

from pathlib import Path

import pytest

from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.soak
def test_the_held_out_loss_falls_as_the_readme_says(tmp_path):
    process = bigtrain("run", CONFIG, f"output={tmp_path}")
    assert process.returncode == 0, process.stderr
    rows = [row for row in read_metrics(tmp_path / "quickstart") if row["kind"] == "evaluation"]
    pretrain = [row["loss"] for row in rows if row["stage"] == "pretrain"]
    finetune = [row["loss"] for row in rows if row["stage"] == "finetune"]
    assert pretrain[-1] <= 0.65 * pretrain[0]
    assert finetune[-1] <= 0.95 * finetune[0]
    assert "answer " in process.stdout
