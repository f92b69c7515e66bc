"""What a finished run is for: its held-out figures again, evaluation on other texts, answers."""

import ast
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigtrain.config import load_config
from bigtrain.config.schema import SourceConfig
from bigtrain.data.cleaning.texts import row_text
from bigtrain.data.sources import documents, is_held_out
from bigtrain.errors import CheckpointError, ConfigError, DataError
from bigtrain.inference.evaluate import evaluate
from bigtrain.inference.export import export
from bigtrain.inference.generate import encode_prompt, generate
from bigtrain.inference.load import load_model
from bigtrain.observability.stream import read_metrics
from bigtrain.tasks.sft import Sft
from bigtrain.testing import Ranks
from tests.support import MODEL, bigtrain, small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of two stages."""
    folder = tmp_path_factory.mktemp("use")
    parallel = {"engine": "fsdp", "processes": 2, "micro_batch_size": 2}
    process = bigtrain("run", small_config(folder, steps=8, every=4, parallel=parallel))
    assert process.returncode == 0, process.stderr
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def opened(run):
    return load_model(run / "pretrain")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """{stage: (model, tokenizer)} as transformers alone opens them."""
    folder = tmp_path_factory.mktemp("exports")
    result = {}
    for stage in ("pretrain", "finetune"):
        where = export(run, stage, to=folder / stage)
        result[stage] = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where), where
    return result


# --- what can be named ---


def test_what_a_name_stands_for(run):
    assert load_model(run).what == f"{run}, stage finetune, step 8"
    assert load_model(run / "pretrain").what == f"{run}, stage pretrain, step 8"
    checkpoint = load_model(run / "pretrain" / "checkpoints" / "step-00000004")
    assert (checkpoint.step, checkpoint.stage.name) == (4, "pretrain")
    assert not checkpoint.model.training
    assert not any(p.requires_grad for p in checkpoint.model.parameters())


def test_a_run_that_was_moved_away_from_its_stores_still_opens(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved, original = load_model("elsewhere/pretrain"), load_model(run / "pretrain")
    assert torch.equal(moved.model.lm_head.weight, original.model.lm_head.weight)
    assert moved.tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_names_that_lead_nowhere(run, tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder; did you mean `small`"):
        load_model(run.parent / "smal")
    with pytest.raises(ConfigError, match="has no stage finetun; did you mean `finetune`"):
        load_model(run / "finetun")
    with pytest.raises(ConfigError, match="neither a run"):
        load_model(tmp_path)
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(ConfigError, match="lies in no run"):
        load_model(tmp_path / "step-00000004")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(run / "config.yaml", fresh)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(fresh)
    with pytest.raises(CheckpointError, match="stage pretrain has no checkpoint yet"):
        load_model(fresh / "pretrain")


# --- evaluate ---


@pytest.mark.parametrize(("stage", "step"), [("pretrain", 4), ("pretrain", 8), ("finetune", 4), ("finetune", 8)])
def test_evaluation_gives_the_runs_own_figures(run, stage, step):
    key = ("evaluation", stage, step)
    row = next(r for r in read_metrics(run) if (r["kind"], r["stage"], r["step"]) == key)
    result = evaluate(run / stage / "checkpoints" / f"step-{step:08d}")
    assert result.loss == pytest.approx(row["loss"], rel=1e-6)
    assert result.metrics["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
    assert (result.metrics["accuracy"], result.metrics["targets"]) == (row["accuracy"], row["targets"])
    assert f"stage {stage}, step {step}" in result.what


def test_evaluation_on_a_text(run, exported, tmp_path):
    """The same for the run and its export, and what one gets by hand."""
    text = tmp_path / "text.txt"
    text.write_text("".join(ast.__doc__ or "") + (tmp_path.as_posix() + "\n") * 20)
    model, tokenizer, folder = exported["pretrain"]
    data = [SourceConfig(source=str(text))]
    results = [evaluate(where, data, sequence_length=32) for where in (run / "pretrain", folder)]
    assert results[0].loss == results[1].loss
    ids = torch.tensor(
        [
            tokenizer.bos_token_id,
            *tokenizer(text.read_text(), add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
    )
    windows = (len(ids) - 1) // 32
    with torch.no_grad():
        logits = model(ids[: windows * 32].view(windows, 32)).logits.flatten(0, 1)
    targets = ids[1 : windows * 32 + 1]
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    assert results[0].metrics["targets"] == windows * 32
    assert results[0].loss == pytest.approx(loss, rel=1e-5)
    assert results[0].metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert results[0].metrics["accuracy"] == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    few = evaluate(folder, data, sequence_length=32, sequences=2)
    assert few.metrics["targets"] == 64
    assert str(text) in few.what


def test_evaluation_that_cannot_be(exported, run, tmp_path):
    folder = exported["pretrain"][2]
    with pytest.raises(ConfigError, match=r"is no run.*give data"):
        evaluate(folder)
    with pytest.raises(ConfigError, match="1000 is more than the 128 positions"):
        evaluate(folder, [SourceConfig(source="stdlib")], sequence_length=1000)
    with pytest.raises(DataError, match=r"nothing\.txt"):
        evaluate(run, [SourceConfig(source=str(tmp_path / "nothing.txt"))])


def listed(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("sequences", [400, 3])
def test_each_held_out_document_is_listed_with_its_loss(run, tmp_path, stage, sequences):
    """Their losses make up the evaluation's; each stands in the order of the sources, and once."""
    whole = evaluate(run / stage, sequences=sequences)
    again = evaluate(run / stage, sequences=sequences, documents=tmp_path / "d.jsonl")
    assert (again.metrics["targets"], again.metrics["accuracy"]) == (
        whole.metrics["targets"],
        pytest.approx(whole.metrics["accuracy"]),
    )
    assert again.loss == pytest.approx(whole.loss, rel=1e-6)
    rows = listed(tmp_path / "d.jsonl")
    assert sum(row["targets"] for row in rows) == whole.metrics["targets"]
    assert sum(row["loss"] * row["targets"] for row in rows) / whole.metrics["targets"] == pytest.approx(
        whole.loss, rel=1e-6
    )
    config = load_config(run / "config.yaml").stages[["pretrain", "finetune"].index(stage)]
    [source] = config.data
    held_out = [r for r in documents(source, config.task.columns) if is_held_out(r["key"], config.held_out)]
    places = [row["where"] for row in held_out]
    found = [row["where"] for row in rows]
    assert found == [where for where in places if where in set(found)] and len(set(found)) == len(found) >= (
        2 if sequences == 400 else 1
    )
    assert {row["source"] for row in rows} == {source.source}
    text = {row["where"]: row_text(row) for row in held_out}
    assert all(text[row["where"]].startswith(row["text"]) and row["text"] for row in rows)
    if stage == "finetune" and sequences == 400:  # whole documents that read nothing but themselves
        assert found == [r["where"] for r in held_out]
        opened = load_model(run / stage)
        [[(ids, mask, *_)]] = Sft().encode([held_out[0]], opened.tokenizer)
        inputs = torch.tensor([ids[:129]])
        targets = inputs[0, 1:].masked_fill(~torch.tensor(mask[1:129]), -100)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(opened.model(inputs[:, :-1]).logits[0], targets)
        assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_documents_of_given_sources_are_listed_too(run, tmp_path):
    """Equal ones each by itself, by the command as well."""
    texts = ["the same text " * 9, "another " * 30, "the same text " * 9]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("a third one " * 20)
    data, file = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], tmp_path / "d.jsonl"
    told = bigtrain("eval", run / "pretrain", "--data", data[0], "--data", data[1], "--documents", file)
    assert told.returncode == 0, told.stderr
    rows = listed(file)
    assert [row["where"] for row in rows] == [f"{data[0]}:{i}" for i in (1, 2, 3)] + data[1:]
    assert rows[0]["text"] == rows[2]["text"] == texts[0][:200]
    loss = sum(row["loss"] * row["targets"] for row in rows) / sum(row["targets"] for row in rows)
    assert f"loss {loss:.6f}" in told.stdout and f"each document: {file}" in told.stdout
    with pytest.raises(ConfigError, match=r"documents: .*/gone/d\.jsonl cannot be written: No such file or directory"):
        evaluate(run, documents=tmp_path / "gone" / "d.jsonl")
    assert not list(tmp_path.glob("*.partial"))


def test_ranks_list_the_documents_together(run, tmp_path):
    one = evaluate(run / "finetune", documents=tmp_path / "one.jsonl")
    with Ranks(2) as ranks:
        results = ranks(evaluate, run / "finetune", documents=tmp_path / "two.jsonl")
    assert [result.metrics["targets"] for result in results] == [one.metrics["targets"]] * 2
    for mine, theirs in zip(listed(tmp_path / "one.jsonl"), listed(tmp_path / "two.jsonl"), strict=True):
        assert mine | {"loss": 0} == theirs | {"loss": 0}
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


# --- generate ---


def test_greedy_is_transformers_own(opened, exported):
    model, tokenizer, _ = exported["pretrain"]
    inputs = tokenizer("import os\n", return_tensors="pt")
    expected = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=30
    )
    said = tokenizer.decode(expected[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert generate(opened, "import os\n", max_new_tokens=30, temperature=0.0) == said
    assert said


def test_a_draw_is_from_the_whole_nucleus(opened, exported):
    model, tokenizer, _ = exported["pretrain"]
    inputs = tokenizer("def f", return_tensors="pt")
    torch.manual_seed(3)
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 30}
    expected = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **settings)
    said = tokenizer.decode(expected[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert generate(opened, "def f", max_new_tokens=30, temperature=1.5, top_p=0.9, seed=3) == said


def test_a_draw_repeats_with_its_seed_and_leaves_the_generator_alone(opened):
    state = torch.get_rng_state()
    first, again, other = (generate(opened, "def f", max_new_tokens=20, temperature=1.0, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)
    narrow = generate(opened, "def f", max_new_tokens=20, temperature=1.0, top_p=1e-6, seed=5)
    assert narrow == generate(opened, "def f", max_new_tokens=20, temperature=0.0)


def test_pieces_come_as_they_are_made(opened):
    pieces = []
    answer = generate(opened, "def f", max_new_tokens=40, temperature=1.0, show=pieces.append)
    assert "".join(pieces) == answer
    assert len(pieces) > 1


def test_a_finetuned_model_is_asked_through_its_chat_template(run, opened, exported):
    finetuned = load_model(run)
    tokenizer = finetuned.tokenizer
    assert tokenizer.chat_template
    message = [{"role": "user", "content": "def f(x):"}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    plain = [tokenizer.bos_token_id, *tokenizer("def f(x):", add_special_tokens=False).input_ids]
    assert asked != plain
    assert encode_prompt(finetuned, "def f(x):") == asked
    assert encode_prompt(finetuned, "def f(x):", chat=False) == plain
    assert encode_prompt(opened, "def f(x):") == plain
    assert encode_prompt(opened, "def f(x):", chat=True) == asked
    model, tokenizer, _ = exported["finetune"]
    expected = model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=20)[0, len(asked) :]
    said = tokenizer.decode(expected, skip_special_tokens=True)
    assert generate(finetuned, "def f(x):", max_new_tokens=20, temperature=0.0) == said


def test_a_prompt_that_cannot_be_answered(run, opened):
    limit = MODEL["max_position_embeddings"]
    room = generate(opened, "a " * 40, max_new_tokens=10_000, temperature=0.0)
    prompt = encode_prompt(opened, "a " * 40)
    assert len(prompt) + len(opened.tokenizer(room, add_special_tokens=False).input_ids) <= limit
    with pytest.raises(ConfigError, match=f"tokens, and .* has {limit} positions"):
        generate(opened, "a b c " * 100)
    bare = load_model(run)
    bare.tokenizer.chat_template = None
    assert encode_prompt(bare, "x")[0] == bare.tokenizer.bos_token_id
    with pytest.raises(ConfigError, match="has no chat template"):
        generate(bare, "x", chat=True)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            generate(opened, "x", **wrong)


def test_the_card_tells_the_lineage_and_the_held_out_loss(run, exported):
    card = (exported["finetune"][2] / "README.md").read_text()
    last = [r for r in read_metrics(run) if r["kind"] == "evaluation" and r["stage"] == "finetune"][-1]
    assert f"held-out after step 8: loss {last['loss']:.4f}, perplexity" in card
    assert card.index("stage `pretrain`: pretrain on") < card.index("stage `finetune`: sft on")
    assert json.loads((exported["finetune"][2] / "config.json").read_text())["model_type"] == "llama"
