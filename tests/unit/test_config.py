"""The run's file is read strictly, and every mistake is answered with its key and line."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigtrain.config import differences, load, load_config, to_yaml
from bigtrain.config.core import Choice, Section, mark_of
from bigtrain.config.files import Loader, literal
from bigtrain.config.schema import RunConfig
from bigtrain.errors import ConfigError

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
  - name: finetune
    task: sft
    from: pretrain
    data: [{source: stdlib-functions}]
    sequence_length: 128
    global_batch_size: 8
    epochs: 1
    optimizer: {lr: 1e-4}
"""


@pytest.fixture
def config(tmp_path):
    def write(text=GOOD, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return write


def test_reads_values_and_overrides(config):
    run = config(GOOD, "stages.finetune.optimizer.lr=5e-5", "parallel.engine=zero3", "seed=7")
    assert run.stages[0].optimizer.lr == 3e-4
    assert run.stages[1].optimizer.lr == 5e-5
    assert run.stages[1].from_stage == "pretrain"
    assert (run.parallel.engine, run.seed) == ("zero3", 7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{lr: 3e-4}",
            "{lrr: 3e-4}",
            "run.yaml:11: stages.pretrain.optimizer.lrr: unknown key; did you mean `lr`?",
        ),
        (
            "name: test",
            "name: test\nprecison: bf16",
            "run.yaml:2: precison: unknown key; did you mean `precision`?",
        ),
        (
            "{lr: 3e-4}",
            "{lr: 3e-4}\n    min_ratio: 0.1",
            "run.yaml:12: stages.pretrain.min_ratio: unknown key; it belongs below `stages.NAME.schedule`.",
        ),
        (
            "name: test",
            "name: test\nmicro_batch_size: 1",
            "micro_batch_size: unknown key; it belongs below `parallel` or `stages.NAME.parallel`.",
        ),
        ("steps: 10", "steps: '10'", "run.yaml:10: stages.pretrain.steps: input should be a valid integer"),
        ("lr: 3e-4", "lr: -1", "stages.pretrain.optimizer.lr: input should be greater than 0, got -1"),
        (
            "task: sft",
            "task: stf",
            "run.yaml:13: stages.finetune.task.name: there is no task stf; did you mean `sft`?",
        ),
        (
            "name: finetune",
            "name: first-weights",
            "run.yaml:12: stages.first-weights.name: `first-weights` is the name of something else in a run's folder",
        ),
        ("    steps: 10\n", "", "stages.pretrain: give one of steps, tokens and epochs; found none"),
        ("from: pretrain", "from: pretrian", "stages.finetune.from: pretrian is no earlier stage"),
        (
            "sequence_length: 256",
            "sequence_length: 512",
            "run.yaml:8: stages.pretrain.sequence_length: 512 is longer",
        ),
        ("{train: {vocab_size: 4096}}", "{}", "run.yaml:3: tokenizer: give either train or from_pretrained"),
        ("name: test", "name: test\nname: again", "run.yaml:2: name is given twice"),
        ("name: test", "name: [", "not valid YAML"),
        (
            "{source: stdlib}",
            "{source: stdlib, weight: 0}",
            "stages.pretrain.data.0.weight: input should be greater",
        ),
        ("name: test", "name: test\nparallel: {engine: zero4}", "zero4 is not one of"),
        (
            "name: test",
            "name: test\nparallel: {replicate: 2}",
            "parallel.replicate: needs engine: fsdp",
        ),
    ],
)
def test_names_key_line_and_remedy(config, old, new, message):
    with pytest.raises(ConfigError) as error:
        config(GOOD.replace(old, new, 1))
    assert message in str(error.value)


def test_wrong_overrides(config):
    for override, message in [
        ("stages.pretrian.steps=1", "there is no pretrian here; did you mean `pretrain`?"),
        (
            "stages.pretrain.stepz=1",
            "command line: stages.pretrain.stepz: unknown key; did you mean `steps`?",
        ),
        ("stages.pretrain.steps", "expected KEY=VALUE"),
    ]:
        with pytest.raises(ConfigError) as error:
            config(GOOD, override)
        assert message in str(error.value)


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "right.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"wrong\.yaml: there is no such file.*right\.yaml"):
        load_config(tmp_path / "wrong.yaml")


def test_resolved_yaml_reads_to_the_same_run(config, tmp_path):
    run = config()
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(tmp_path / "resolved.yaml") == run


def test_origins(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    loaded = load(tmp_path / "run.yaml", ["seed=3"])
    assert loaded.origin(("seed",)) == "command line"
    assert loaded.origin(("stages", 0, "steps")).endswith("run.yaml:10")
    assert loaded.origin(("precision",)) == "default"


def test_differences_follow_the_marks(config):
    old, new = config(), config(GOOD, "stages.pretrain.optimizer.lr=1", "parallel.engine=fsdp")
    assert differences(old, new, "mathematics") == [("stages.pretrain.optimizer.lr", 3e-4, 1.0)]
    assert differences(old, new, "execution") == [("parallel.engine", "ddp", "fsdp")]


def sections(section=RunConfig, seen=None):
    seen = {} if seen is None else seen
    seen[section.__name__] = section
    for info in section.model_fields.values():
        for candidate in (info.annotation, *getattr(info.annotation, "__args__", ())):
            chosen = isinstance(candidate, type) and issubclass(candidate, Choice)
            for below in candidate.ours().values() if chosen else [candidate]:
                if isinstance(below, type) and issubclass(below, Section) and below.__name__ not in seen:
                    sections(below, seen)
    return seen


def test_every_field_is_documented_and_marked():
    found = sections()
    assert {"RunConfig", "StageConfig", "AdamW", "SGD", "Cosine", "ParallelConfig", "SourceConfig"} <= set(found)
    for section in found.values():
        for name, info in section.model_fields.items():
            assert info.description and len(info.description) > 10, f"{section.__name__}.{name}"
            assert mark_of(info) in ("mathematics", "execution", "reporting")


def test_reading_imports_nothing_heavy(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    code = (
        "import sys; from bigtrain.config import load_config; load_config(sys.argv[1]);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], check=True)


TWO = "[{source: stdlib-functions, weight: 3}, {source: ~/more.jsonl, weight: 1}]"


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (TWO, ["epochs=2"], "epochs: weighted sources have no common epoch; name one of them as `epochs_of`"),
        (TWO, ["epochs_of=stdlib", "epochs=2"], "epochs_of: no source of the stage is stdlib; known here: "),
        (TWO, ["epochs_of=stdlib-functions", "epochs=null", "steps=3"], "epochs_of: says what `epochs` counts"),
        ("[{source: stdlib-functions}]", ["epochs_of=stdlib-functions"], "epochs_of: without weights an epoch is one"),
        (
            "[{source: a/b, split: c, weight: 1}, {source: a/b, split: d, weight: 1}]",
            ["epochs_of=a/b"],
            "epochs_of: 2 sources have this name",
        ),
    ],
)
def test_the_epochs_of_weighted_sources_are_those_of_one(config, data, changes, message):
    text = GOOD.replace("[{source: stdlib-functions}]", data)
    good = config(GOOD.replace("[{source: stdlib-functions}]", TWO), "stages.finetune.epochs_of=~/more.jsonl")
    assert good.stages[1].epochs_of == good.stages[1].data[1].source
    with pytest.raises(ConfigError) as error:
        config(text, *(f"stages.finetune.{change}" for change in changes))
    assert f"stages.finetune.{message}" in str(error.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=6,
)


@given(value=VALUES)
@example(
    [
        "cosine",
        "two words",
        "1e5",
        "10",
        "true",
        "~",
        "",
        "a, b",
        "a: b",
        "#",
        "it's",
        "\n",
        "\\",
        "[",
        1e-05,
        3.0,
        float("-inf"),
    ]
)
@example([1e-05, 3.0, float("-inf")])
@settings(max_examples=100, deadline=None)
def test_a_value_in_a_message_is_what_a_file_would_say(value):
    text = literal(value)
    assert text.count("\n") == 0
    assert yaml.load(f"[{text}]", Loader) == [value]


def test_a_value_in_a_message_is_in_quotes_only_where_it_must_be():
    values = ["cosine", "<|im_end|>", "a/b.jsonl", "two words", "1e5", "null", "", 1e-05, True, None, {"a": ["b", 2.0]}]
    assert [literal(value) for value in values] == [
        *("cosine", "<|im_end|>", "a/b.jsonl", '"two words"', "'1e5'", "'null'", '""', "1e-05", "true", "null"),
        "{a: [b, 2.0]}",
    ]
