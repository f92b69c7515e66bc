"""Paths, numbers and patterns of a run's file mean what a person means by them, or are refused with what was meant."""

import pwd

import pytest
import yaml

from bigtrain.config import RunConfig, differences, load, load_config, to_yaml
from bigtrain.config.load import source
from bigtrain.config.texts import MEANINGS
from bigtrain.errors import ConfigError
from bigtrain.run_folder import RunFolder
from tests.support import bigtrain
from tests.unit.test_config import GOOD, sections

EVALUATED = GOOD.replace("steps: 10\n", "steps: 10\n    evaluate: {data: [{source: stdlib}]}\n")
PATHS = (  # every path of the schema, as an override
    "output",
    "model.from_pretrained",
    "model.from_run",
    "tokenizer.from_pretrained",
    "stages.pretrain.data.0.source",
    "stages.pretrain.evaluate.data.0.source",
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that loads GOOD with overrides; HOME and $DATA are this folder's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "da$ta"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    file = tmp_path / "run.yaml"

    def loaded(*overrides, text=EVALUATED):
        changed = {override.partition("=")[0] for override in overrides}
        values = yaml.safe_load(text)
        if changed & {"model.from_pretrained", "model.from_run"}:
            values["model"] = {}
        if "model.from_run" in changed:
            del values["tokenizer"]
        if "tokenizer.from_pretrained" in changed:
            values["tokenizer"] = {}
        file.write_text(yaml.safe_dump(values, sort_keys=False) if changed & set(PATHS) else text)
        return load_config(file, overrides)

    return loaded


def value(run, key):
    """Of a dotted key."""
    for part in key.split("."):
        named = isinstance(run, list) and {getattr(item, "name", None): item for item in run}
        run = (named.get(part) or run[int(part)]) if named else getattr(run, part)
    return run


def test_every_path_of_the_schema_is_tried():
    found = {f"{name}.{key}" for name, section in sections().items() for key, info in section.model_fields.items()
             if any("expanded" in repr(part) for part in (info.annotation, *info.metadata))}  # fmt: skip
    model = {"ModelConfig.from_pretrained", "ModelConfig.from_run", "TokenizerConfig.from_pretrained"}
    assert found == {"RunConfig.output", *model, "SourceConfig.source", "StageConfig.epochs_of"}  # which names a source


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("~/x", "{home}/x"),
        ("~", "{home}"),
        ("$HOME/x", "{home}/x"),
        ("${HOME}x/$DATA", "{home}x/{data}"),
        ("a$$HOME/$5/b$", "a$HOME/$5/b$"),
        ("a~/~", "a~/~"),
        ("~root/x", pwd.getpwnam("root").pw_dir + "/x"),
    ],
)
def test_a_path_means_the_same_everywhere(config, tmp_path, key, text, means):
    means = means.replace("{home}", str(tmp_path / "home")).replace("{data}", str(tmp_path / "da$ta"))
    run = config(f'{key}="{text}"')
    assert value(run, key) == means
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$ABSENT/x", "the environment variable ABSENT is not set; set it"),
        ("a/${ABSENT}", "the environment variable ABSENT is not set; set it"),
        ("$EMPTY/x", "the environment variable EMPTY is empty; set it"),
        ("${HOME", "after `${` come a variable's name and `}`"),
        ("~nobody-here/x", "there is no user nobody-here on this machine"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_by_name(config, key, text, message):
    with pytest.raises(ConfigError) as refused:
        config(f'{key}="{text}"')
    assert str(refused.value).startswith(f"command line: {key}: {message}")


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("s3://$ABSENT/~/x", "s3://$ABSENT/~/x"),
        ("https://host/a?$filter=${x}", "https://host/a?$filter=${x}"),
        ("zip://*.jsonl::~/a.zip", "zip://*.jsonl::{home}/a.zip"),
        ("zip://$5::$DATA/a.zip", "zip://$5::{data}/a.zip"),
        ("my.module:rows", "my.module:rows"),
    ],
)
def test_urls_stay_as_they_are_but_for_the_path_in_a_chain(config, tmp_path, text, means):
    run = config(f'stages.pretrain.data.0.source="{text}"')
    means = means.replace("{home}", str(tmp_path / "home")).replace("{data}", str(tmp_path / "da$ta"))
    assert run.stages[0].data[0].source == means
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_config(tmp_path / "resolved.yaml") == run


def test_a_run_is_the_same_whichever_way_its_paths_are_written(config, tmp_path):
    ways = [
        config(*(f'{key}="{way}"' for key in PATHS if key != "model.from_run"))
        for way in ("~/x", "$HOME/x", f"{tmp_path}/home/x")
    ]
    assert ways[0] == ways[1] == ways[2]
    assert differences(ways[0], ways[1], "mathematics") == []
    assert {str(RunFolder(run.folder).path) for run in ways} == {f"{tmp_path}/home/x/test"}


def test_a_source_of_the_command_line_is_one_of_the_file(config, tmp_path):
    assert source("~/x", "--data").source == f"{tmp_path}/home/x"
    with pytest.raises(ConfigError, match=r"--data \$ABSENT/x: the environment variable ABSENT is not set"):
        source("$ABSENT/x", "--data")


def test_the_dry_run_shows_what_a_path_became(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    shown = bigtrain("run", tmp_path / "run.yaml", "output=$SCRATCH/~", "--dry-run",
                     variables={"SCRATCH": str(tmp_path)})  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert f"{tmp_path}/~" in shown.stdout
    assert "$SCRATCH" not in shown.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 010", "steps: YAML reads 010 as 8, with base 8; write 10 if that number is meant, or '010' in quotes"),
        ("steps: 0_17", "steps: YAML reads 0_17 as 15, with base 8; write 17 if"),
        ("steps: 09", "steps: 09 begins with a 0; write 9 if"),
        ("steps: 00", "steps: 00 begins with a 0; write 0 if"),
        ("steps: 1:30", "steps: YAML reads 1:30 as 90, with base 60; write 90 if"),
        ("steps: 1:30:00", "steps: YAML reads 1:30:00 as 5400, with base 60"),
        ("held_out: 0:30.5", "held_out: YAML reads 0:30.5 as 30.5, with base 60"),
        ("steps: 0o17", "got 0o17; write 15."),
        ("steps: 1,000", "got '1,000'; write 1000."),
        ("steps: 1:99", "got '1:99'."),
        ("steps: 10k", "got 10k."),
        ("steps: 1e400", "steps: input should be a valid integer, got .inf."),
        ("steps: 99999999999999999999", "steps: is too large a number"),
        ("prompts: [yes]", "got true (YAML reads yes, no, on and off as true and false); put it in quotes."),
        ("prompts: [010]", "prompts.0: YAML reads 010 as 8"),
        ("task: off", "got false (YAML reads yes, no, on and off as"),
        ("clean: {redact: [phone], phone_region: NO}", "phone_region: input should be a valid string, got false (YAML"),
        ("clean: {redact: [phone], phone_region: us}", "us is no country: write two capital letters (ISO 3166)"),
        ("name: -a", "-a may hold only letters, digits, '-' and '_', and begins with a letter or digit."),
    ],
)  # fmt: skip
def test_what_a_person_means_otherwise_than_yaml_is_refused_in_files_and_overrides(config, text, message):
    key, _, given = text.partition(": ")
    values = yaml.safe_load(GOOD)
    values["stages"] = [{k: v for k, v in values["stages"][0].items() if k != key}]
    file = yaml.safe_dump(values, sort_keys=False) + f"  {text}\n"  # its last lines are the stage's
    for text_of_file, overrides in (file, ()), (GOOD, (f"stages.pretrain.{key}={given}",)):
        with pytest.raises(ConfigError) as refused:
            config(*overrides, text=text_of_file)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("time_limit=1:30", "time_limit: YAML reads 1:30 as 90, with base 60"),
        ("time_limit='1:30'", "'1:30' is no time: write days, hours, minutes and seconds, like 11h30m, 2d or 90s."),
        ("time_limit=11 hours", '"11 hours" is no time: write'),
        ("time_limit=90", "time_limit: input should be a valid string, got 90; put it in quotes."),
        ("time_limit=0h", "time_limit: 0h is no time at all"),
        ("time_limit=" + "9" * 400 + "d", "is no time: write"),
        ("name=a/b", "a/b may hold only letters, digits, '.', '-' and '_', and begins with a letter or digit."),
        ("output=~", "output: input should be a valid string, got null: nothing is written after the key, or `~`"),
        ("model={from_config: {model_type: llama, vocab_size: 0300}}", "vocab_size: YAML reads 0300 as 192"),
    ],
)
def test_the_meaning_of_a_pattern_is_told(config, override, message):
    with pytest.raises(ConfigError) as refused:
        config(override, text=GOOD)
    assert message in str(refused.value)
    assert not any(sign in str(refused.value) for sign in ("^", "[A-Z", "\\"))


def test_every_pattern_has_a_meaning():
    patterns = {part.pattern for section in sections().values() for info in section.model_fields.values()
                for part in info.metadata if getattr(part, "pattern", None)}  # fmt: skip
    assert patterns == set(MEANINGS)


def test_numbers_as_people_write_them(config):
    run = config("stages.pretrain.steps=1_000", "seed=0x1F", "stages.pretrain.held_out=0", "name='010'", text=GOOD)
    assert (run.stages[0].steps, run.seed, run.name) == (1000, 31, "010")
    assert isinstance(run, RunConfig)


def test_names_that_look_like_other_things_stay_text(config, tmp_path):
    run = config("name='1-30'", "stages.pretrain.prompts=['010', '1:30', 'no', '~']", text=GOOD)
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load(tmp_path / "resolved.yaml").run == run
