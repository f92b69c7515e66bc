"""Whatever is wrong with a run's file is answered with one message that names the key, and nothing is written."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml

from bigtrain.config import load
from bigtrain.config.files import Dumper, Loader
from bigtrain.errors import ConfigError
from tests.unit.mutations import TEXTS, VALUES, indented_lines

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
MUTATIONS = 5  # of each kind, for each recipe


def recipe_data(folder):
    """Write the files that the recipes' comments ask the user for."""
    rows = {
        "data/pretrain/a.jsonl": {"text": "Some text."},
        "data/conversations.jsonl": {"messages": [{"role": "user", "content": "?"}]},
        "data/instructions/a.jsonl": {"prompt": "?", "completion": "!"},
        "data/texts/a.txt": "Some text.",
    }
    for name, row in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(row) + "\n")


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    recipe_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text, *overrides):
    """What `bigtrain run` says about the file; it must refuse it."""
    file = Path("run.yaml")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load(file, overrides, here=True)
    return str(error.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_mutation_is_refused_with_its_key(workplace, recipe):
    load(recipe, here=True)
    before, rng, tried = files_below(workplace), random.Random(recipe.stem), 0
    for mutate in VALUES * MUTATIONS:
        values = yaml.load(recipe.read_text(), Loader)
        word = mutate(values, rng)
        if word is None:
            continue
        text = yaml.dump(values, Dumper=Dumper, sort_keys=False)
        message = refusal(text)
        assert message.startswith("run.yaml"), (mutate.__name__, message)
        assert word in message, (mutate.__name__, word, message)
        tried += 1
    for mutate in TEXTS * MUTATIONS:
        lines = recipe.read_text().splitlines()
        word = mutate(lines, *rng.choice(indented_lines(lines)))
        message = refusal("\n".join(lines))
        assert re.match(r"run\.yaml:\d+: ", message), (mutate.__name__, message)
        assert word in message, (mutate.__name__, word, message)
        tried += 1
    assert tried >= 90
    Path("run.yaml").unlink()
    after = files_below(workplace)
    del before[workplace / "data"], after[workplace / "data"]
    assert after == before


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        "quickstart",
        "smollm2-finetune",
        "llama-1b-zero3-8gpu",
        "llama-1b-fsdp-8gpu",
        "llama-8b-zero3-64gpu",
        "llama-8b-fsdp-64gpu",
        "continue-and-finetune",
    }


GOOD = """\
name: test
model: {from_config: {model_type: llama, max_position_embeddings: 256}}
tokenizer: {train: {vocab_size: 4096}}
stages:
  - name: pretrain
    task: pretrain
    data: [{source: stdlib}]
    sequence_length: 256
    global_batch_size: 32
    steps: 10
    optimizer: {lr: 3e-4}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "steps: '10'", "run.yaml:10: stages.pretrain.steps: input should be a valid integer, got '10'; "
         "write it without quotes."),
        ("steps: 10", "tokens: 2e9", "got 2000000000.0; write 2000000000."),
        ("name: test", "name: 5", "run.yaml:1: name: input should be a valid string, got 5; put it in quotes."),
        ("name: test", "name: no", "got false (YAML reads yes, no, on and off as true and false); put it in quotes."),
        ("steps: 10", "steps: 10\n    export:",
         "should be a valid boolean, got null: nothing is written after the key, or `~` or `null`; give a value or "
         "remove the key."),
        ("optimizer: {lr: 3e-4}", "optimizer: 3e-4", "optimizer: expected keys and values below it, got 0.0003."),
        ("name: test", "name: test\ntrackers: wandb", "trackers: input should be a valid list, got wandb; "
         "write [wandb]."),
        ("lr: 3e-4", "lr: .inf", "run.yaml:11: stages.pretrain.optimizer.lr: must be a finite number, got .inf."),
        ("name: test", "name: test\nparallel: {processes: two}", "parallel.processes: input should be a valid integer, "
         "got two; or: two is not one of auto."),
        ("max_position_embeddings: 256", "max_position_embeddings: -1", "run.yaml:2: "
         "model.from_config.max_position_embeddings: must be a whole number of at least 1, got -1."),
        ("optimizer: {lr: 3e-4}", "optimizer: {lr: 3e-4}\n    schedule: {warmup_steps: 11}",
         "longer than the whole stage"),
        ("stdlib", "~/text", f"there is no file or folder {Path.home()}/text"),
        ("source: stdlib", "source: data/text", "run.yaml:7: stages.pretrain.data.0.source: there is no file or folder "
         "data/text"),
        ("source: stdlib", "source: data/text", "If the dataset data/text of the Hub is meant, say which split"),
        ("source: stdlib", "source: data/texts, split: 'train[:10%]'", "data.0.split: write a split, like `train`, or "
         "rows of it, like `train[:1000]`, got 'train[:10%]'. A percentage would need the number of rows first."),
        ("source: stdlib", "source: data/texts, split: 'train[5:5]'", "data.0.split: train[5:5] holds no rows."),
        ("source: stdlib", "source: data/texts, split: test", "data.0.split: data/texts is one split, `train`; there "
         "is no test."),
        ("source: stdlib", "source: data/texts, revision: main, split: train", "data.0.revision: is for datasets of "
         "the Hub, and data/texts exists on this disk"),
        ("source: stdlib", "source: stdlib, config: en", "data.0.config: is for datasets of the Hub, and stdlib is "
         "none; remove config."),
        ("source: stdlib", "source: data/thesis.pdf", ".pdf files are no text; convert them"),
        ("source: stdlib", "source: 'data/*.zip'", "For what is in it write `zip://*::data/*.zip`."),
        ("source: stdlib", "source: htps://host/a.txt", "fsspec knows no protocol htps; did you mean `https`?"),
        ("source: stdlib", "source: empty", "the folder empty holds no files."),
        ("source: stdlib", "source: stdlib, on_error: ignore", "on_error: ignore is not one of"),
        ("source: stdlib", "source: stdlib, max_characters: 0", "max_characters: "),
        ("name: test", "name: taken", "run.yaml:1: name: runs/taken is not empty and holds no run"),
        ("name: test", "name: test\nattention: flash\nparallel: {device: cpu}", "attention: flash needs a GPU"),
        ("name: test", "name: test\nattention: flash\nprecision: fp32", "attention: flash has no fp32"),
        ("name: test", "name: test\nattention: flash", "flash needs the package flash-attn"),
        ("name: test", "name: test\nparallel: {engine: zero3, compile: true}", "parallel.compile: zero3 gathers"),
        ("name: test", "name: test\noutput: data/texts/a.txt", "output: data/texts/a.txt is a file; name a folder."),
    ],
)  # fmt: skip
def test_names_key_line_and_remedy(workplace, old, new, message):
    (workplace / "runs" / "taken").mkdir(parents=True)
    (workplace / "runs" / "taken" / "thesis.doc").write_text("mine")
    (workplace / "data" / "thesis.pdf").write_bytes(b"%PDF")
    (workplace / "empty").mkdir()
    assert message in refusal(GOOD.replace(old, new, 1))


def test_a_misspelt_required_key_is_told_once(workplace):
    message = refusal(GOOD.replace("optimizer:", "optimiser:"))
    assert message == "run.yaml:11: stages.pretrain.optimiser: unknown key; did you mean `optimizer`?"


def test_an_unknown_key_does_not_hide_another_missing_one(workplace):
    message = refusal(GOOD.replace("    optimizer: {lr: 3e-4}\n", "    colour: red\n"))
    assert "colour: unknown key" in message
    assert "optimizer: this key is required" in message


def test_a_checkpoint_folder_is_read_before_it_is_loaded(workplace):
    tuning = GOOD.replace("from_config: {model_type: llama, max_position_embeddings: 256}", "from_pretrained: ./model")
    tuning = tuning.replace("tokenizer: {train: {vocab_size: 4096}}\n", "")
    folder = workplace / "model"
    folder.mkdir()
    assert "run.yaml:2: model.from_pretrained: the folder ./model holds no config.json." in refusal(tuning)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(tuning)
    (folder / "config.json").write_text('{"max_position_embeddings": 128}')
    expected = (
        "run.yaml:7: stages.pretrain.sequence_length: 256 is longer than max_position_embeddings (128) of ./model."
    )
    assert refusal(tuning) == expected
    (folder / "config.json").write_text('{"max_position_embeddings": 256}')
    load("run.yaml", here=True)


def test_what_is_not_here_matters_only_where_the_run_starts(workplace):
    Path("run.yaml").write_text(GOOD.replace("stdlib", "elsewhere/*.txt"))
    assert load("run.yaml").run.stages[0].data[0].source == "elsewhere/*.txt"


@pytest.mark.parametrize(
    "source", ["stdlib", "data/texts", "data/texts/a.txt", "data/**/*.jsonl", "my.module:rows", "memory://a"]
)
def test_sources_that_may_be_there(workplace, source):
    Path("run.yaml").write_text(GOOD.replace("{source: stdlib}", f'{{source: "{source}"}}'))
    load("run.yaml", here=True)


def test_a_hub_dataset_is_named_by_its_split(workplace):
    Path("run.yaml").write_text(
        GOOD.replace("{source: stdlib}", "{source: owner/name, split: 'train[:9]', revision: v1}")
    )
    load("run.yaml", here=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys and values (like `name: my-run`) at the top of the file; the file is empty."),
        ("# nothing\n", "the file is empty"),
        ("- name: test\n", "found a list"),
        ("just words", "found the single value \"just words\""),
        ("name: test\n\tseed: 1\n", "indent with spaces, not with tabs"),
        ("name: [" * 3000, "nested too deeply"),
        ("model: " + "{a: " * 40 + "1" + "}" * 40, "run.yaml:1: model.a.a.a: keys are nested too deeply"),
        ("name: &a [*a]\n", "an anchor contains itself"),
        ("name: &a {b: *a}\n", "an anchor contains itself"),
        ("a: &a {<<: *a}\n", "run.yaml:1: a: unknown key"),
        ("a: &a [1, 1]\n" + "".join(f"{x}: &{x} [{', '.join(['*' + chr(ord(x) - 1)] * 9)}]\n" for x in "bcdefghi"),
         "more than 100,000 values"),
        ("name: *nobody\n", "run.yaml:1: not valid YAML: found undefined alias 'nobody'"),
        ("<<: 5\nname: test\n", "run.yaml:1: not valid YAML: expected a mapping"),
        (b"name: caf\xe9\n", "run.yaml:1: is not UTF-8 text; save the file as UTF-8."),
        (b"seed: 1\nname: \x00\n", "run.yaml:2: not valid YAML: the character #x00."),
        ("name: a\n---\nname: b\n", "not valid YAML: but found another document"),
        ("name: !!python/object:os.system x\n", "not valid YAML: could not determine a constructor for the tag"),
        ("seed: !!int abc\n", "run.yaml:1: seed: abc cannot be read as int."),
        ("seed: !!bool abc\n", "run.yaml:1: seed: abc cannot be read as bool."),
        ("seed: !!timestamp abc\n", "run.yaml:1: seed: abc cannot be read as timestamp."),
        ("seed: " + "9" * 5000, "run.yaml:1: seed: '9999999999999999999999999999999999999999' cannot be read as int."),
        ("1: test\n", "run.yaml:1: 1: a key must be text; put it in quotes."),
        ("yes: test\n", "True: a key must be text"),
        ("[a, b]: test\n", "a key must be text"),
        ("name: 2024-13-45\nseed: x\n", "run.yaml:2: seed: input should be a valid integer, got x"),
    ],
)  # fmt: skip
def test_files_that_are_no_run(workplace, text, message):
    assert message in refusal(text)


def test_a_folder_is_no_file(workplace):
    with pytest.raises(ConfigError, match=r"data: is a folder; give the run's file"):
        load("data")
    with pytest.raises(ConfigError, match=r"nowhere/run.yaml: there is no such file"):
        load("nowhere/run.yaml")


def test_anchors_and_merge_keys_work(workplace):
    second = GOOD[GOOD.index("  - name:") :].replace("name: pretrain", "name: second")
    text = GOOD.replace("{lr: 3e-4}", "&optimizer {lr: 3e-4, eps: 1e-6}")
    text += second.replace("{lr: 3e-4}", "{<<: *optimizer, lr: 1e-4}")
    Path("run.yaml").write_text(text)
    first, second = load("run.yaml").run.stages
    assert (first.optimizer.lr, second.optimizer.lr, second.optimizer.eps) == (3e-4, 1e-4, 1e-6)
    assert "lr is given twice" in refusal(text.replace("lr: 1e-4", "lr: 1e-4, lr: 1e-5"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pretrain.steps='5'", "command line: stages.pretrain.steps: input should be a valid integer"),
        ("stages.pretrain.optimizer={lr: 1, lr: 2}", "command line: stages.pretrain.optimizer.lr is given twice."),
        ("seed={", "command line: seed: not valid YAML"),
        (
            "seed=",
            "command line: seed: input should be a valid integer, got null: nothing is written after the key, or",
        ),
        ("stages.²=1", "there is no ² here"),
        ("stages=5", "command line: stages: input should be a valid list, got 5"),
        ("parallel={engine: zero4}", "command line: parallel.engine: zero4 is not one of"),
    ],
)
def test_wrong_overrides(workplace, override, message):
    assert message in refusal(GOOD, override)
