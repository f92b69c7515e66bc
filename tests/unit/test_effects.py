"""Options without effect are refused, unusual values told, warm-ups fit their stages, and dropout's draws are named."""

import json
from types import SimpleNamespace

import pytest
import torch

from bigtrain.config import load_config, to_yaml
from bigtrain.config.checks import unusual
from bigtrain.data.prepare import StageData
from bigtrain.distributed.world import World
from bigtrain.errors import ConfigError
from bigtrain.models.architecture import dropouts
from bigtrain.observability.stream import Stream
from bigtrain.pipeline.build import StageBuilder
from bigtrain.pipeline.history import History
from bigtrain.pipeline.preflight import check_schedules
from bigtrain.run_folder import RunFolder
from tests.support import Rows, bigtrain
from tests.unit.test_config import GOOD


@pytest.fixture
def config(tmp_path):
    """A function that loads GOOD (a stage pretrain of 10 steps, a stage finetune of one epoch) with overrides."""
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    return lambda *overrides: load_config(file, overrides)


P, F = "stages.pretrain.", "stages.finetune."
NO_LIMITS = "{duplicate_lines: null, duplicate_line_characters: null, duplicate_paragraphs: null, "
NO_LIMITS += "duplicate_paragraph_characters: null, top_ngrams: null, duplicate_ngrams: null}"
WITHOUT_EFFECT = [  # what is given, the key that has no effect, and what makes it have one
    ((P + "schedule.name=constant", P + "schedule.min_ratio=0.5"), P + "schedule.min_ratio",
     P + "schedule.name=linear"),
    ((P + "schedule={name: warmup_stable_decay, decay_steps: 2, decay_ratio: 0.5}",), P + "schedule.decay_ratio",
     P + "schedule.decay_steps=null"),
    ((P + "optimizer={name: sgd, lr: 0.1, momentum: 0, nesterov: true}",), P + "optimizer.nesterov",
     P + "optimizer.momentum=0.9"),
    ((P + "schedule.warmup_steps=2", P + "schedule.warmup_ratio=0.1"), P + "schedule.warmup_ratio",
     P + "schedule.warmup_steps=null"),
    ((P + "checkpoint.keep_weights_only=true",), P + "checkpoint.keep_weights_only",
     P + "checkpoint={every: 1, keep_every: 2, keep_weights_only: true}"),
    ((P + "checkpoint.keep_every=5",), P + "checkpoint.keep_every", P + "checkpoint.every=5"),
    ((F + "task.long_conversations=drop", F + "task.max_cut_answers=0.5"), F + "task.max_cut_answers",
     F + "task.long_conversations=split"),
    ((P + f"clean={{repetition: {NO_LIMITS}}}",), P + "clean.repetition", P + "clean.repetition.duplicate_lines=0.3"),
    ((P + "export=false", P + "prompts=[a]"), P + "prompts", P + "export=true"),
    ((P + "data=[{source: stdlib, weight: 2}]",), P + "data.0.weight",
     P + "data=[{source: stdlib, weight: 2}, {source: a, weight: 1}]"),
    (("deterministic=true", "parallel.device=cpu"), "deterministic", "parallel.device=auto"),
    (("profile={steps: [11, 12]}", F + "epochs=null", F + "steps=3"), "profile.steps", P + "steps=11"),
    (("profile={steps: [11, 12]}", F + "epochs=null", F + "tokens=1024"), "profile.steps", F + "tokens=11264"),
    *(((f"parallel.{key}={top}", *(f"{stage}parallel.{key}={own}" for stage in (P, F))), f"parallel.{key}",
       F + f"parallel.{key}=null")
      for key, top, own in (("engine", "zero1", "fsdp"), ("micro_batch_size", 4, 2), ("compile", "true", "false"),
                            ("activation_checkpointing", "full", "none"))),
]  # fmt: skip
REFUSED_BY_OTHER_RULES = [  # the rest of the kind
    ((P + "held_out=0.1",), P + "held_out"),
    ((P + "evaluate={}",), P + "evaluate"),
    ((P + "held_out=0.1", P + "evaluate={data: [{source: a}]}"), P + "held_out"),
    (("parallel.replicate=2", "parallel.engine=zero2"), "parallel.replicate"),
    ((P + "parallel.replicate=2",), P + "parallel.replicate"),
    (("parallel.compile=true", "parallel.engine=zero3"), "parallel.compile"),
    ((P + "clean={phone_region: US, repair: true}",), P + "clean.phone_region"),
    ((P + "clean={leakage: {}}",), P + "clean.leakage"),
    ((P + "clean={}",), P + "clean"),
    ((F + "clean={boilerplate: {}}",), F + "clean.boilerplate"),
    ((P + "evaluate={data: [{source: a, weight: 1}]}",), P + "evaluate.data"),
]


@pytest.mark.parametrize(("given", "key", "remedy"), WITHOUT_EFFECT, ids=lambda value: str(value)[-30:])
def test_an_option_without_effect_is_refused_until_it_has_one(config, given, key, remedy):
    with pytest.raises(ConfigError) as refused:
        config(*given)
    assert str(refused.value).startswith(f"command line: {key}: ")
    assert str(refused.value).count("\n") == 0
    config(*given, remedy)


@pytest.mark.parametrize(("given", "key"), REFUSED_BY_OTHER_RULES, ids=lambda value: str(value)[-30:])
def test_the_rest_of_the_kind_is_refused_by_its_own_rule(config, given, key):
    with pytest.raises(ConfigError) as refused:
        config(*given)
    assert f": {key}: " in str(refused.value)


def test_a_default_is_never_refused(config, tmp_path):
    run = config(P + "schedule.name=constant", P + "schedule.warmup_steps=2", P + "export=false")
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))  # which has every key
    assert load_config(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize("length", ["steps=9", f"tokens={9 * 32 * 256}", f"tokens={9 * 32 * 256 - 1}"])
def test_a_warmup_is_no_longer_than_its_stage_however_long_that_is(config, length):
    other = () if length.startswith("steps") else (P + "steps=null",)
    config(P + length, *other, P + "schedule.warmup_steps=9")
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps: 10 is longer than the whole stage \(9 steps\)"):
        config(P + length, *other, P + "schedule.warmup_steps=10")


def test_a_warmup_is_held_against_epochs_once_the_data_has_told_their_length(config):
    run = config(F + "schedule.warmup_steps=10")

    def data(samples):
        """Of stores that hold so many samples, in batches of 8."""
        return {stage.name: StageData([SimpleNamespace(samples=samples)], [], None, None) for stage in run.stages}

    check_schedules(run.stages, data(73))
    with pytest.raises(ConfigError, match=r"stages.finetune.schedule.warmup_steps: 10 is longer .* \(9 steps\)"):
        check_schedules(run.stages, data(72))


TRAINED = "{source: a, split: 'train[10:20]'}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((P + "optimizer.lr=3",), "stages.pretrain.optimizer.lr: 3 is unusual; the usual range is 1e-5 to 1e-2."),
        ((P + "optimizer.lr=1e-12",), "optimizer.lr: 1e-12 is unusual"),
        ((P + "optimizer.weight_decay=10",), "optimizer.weight_decay: 10 is unusual; the usual range is 0 to 0.3."),
        ((P + "optimizer.betas=[0.95, 0.9]",), "optimizer.betas: [0.95, 0.9] look swapped; the usual are [0.9, 0.95]"),
        ((P + "optimizer.eps=1",), "optimizer.eps: 1 is unusual"),
        ((P + "optimizer.max_grad_norm=1e9",), "optimizer.max_grad_norm: 1e+09 is unusual"),
        ((P + "optimizer.ema=0.1",), "optimizer.ema: 0.1 is unusual"),
        (("parallel.micro_batch_size=64",), "global_batch_size: 32 is less than micro_batch_size (64)"),
        ((P + "evaluate={data: [{source: stdlib}]}",), "evaluate.data: stdlib is trained on too, in stage pretrain"),
        ((F + "evaluate={data: [{source: stdlib}]}",), "stages.finetune.evaluate.data: stdlib is trained on too"),
        ((P + f"data=[{TRAINED}]", P + "evaluate={data: [{source: a, split: 'train[19:30]'}]}"), "a is trained on too"),
        ((P + f"data=[{TRAINED}]", P + "evaluate={data: [{source: a}]}"), "a is trained on too"),
    ],
)  # fmt: skip
def test_an_unusual_value_is_told_and_not_refused(config, overrides, told):
    found = unusual(config(*overrides))
    assert found
    assert all(told in text for text in found[:1])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (P + "optimizer={lr: 1e-2, betas: [0.9, 0.9], weight_decay: 0, eps: 1e-4, max_grad_norm: null, ema: 0.999}",),
        (P + f"data=[{TRAINED}]", P + "evaluate={data: [{source: a, split: 'train[20:30]'}]}"),
        (P + f"data=[{TRAINED}]", P + "evaluate={data: [{source: a, split: 'train[:10]'}]}"),
        (P + "data=[{source: o/a, split: train}]", P + "evaluate={data: [{source: o/a, split: test}]}"),
        (P + "evaluate={data: [{source: other}]}",),
        (P + "global_batch_size=2",),  # with the default of micro_batch_size
    ],
)
def test_usual_values_are_passed_over(config, overrides):
    assert unusual(config(*overrides)) == []


def test_the_dry_run_tells_what_is_unusual(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    model = "model={from_config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 256}}"
    shown = bigtrain("run", tmp_path / "run.yaml", model, P + "optimizer.lr=3", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "warning: stages.pretrain.optimizer.lr: 3 is unusual; the usual range is 1e-5 to 1e-2." in shown.stdout
    assert "  resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1; its draws" in shown.stdout


def told_of_dropout(tmp_path, run, size, probabilities, resumed):
    events = Rows()
    world = World(0, size, 0, torch.device("cpu"))
    history = History(run.stages, world, RunFolder(tmp_path / "run"), Stream([events]))
    history.tell_of_dropout(StageBuilder.of(run, run.stages[0], None, world), probabilities, resumed)
    return [event["text"] for event in events]


def test_a_resume_that_changes_dropouts_draws_says_so(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"stages": {}, "attempts": []}))
    rate, run = {"attention_dropout": 0.1}, config()
    always = "attention_dropout 0.1: its draws depend on the number of processes, the engine and the micro-batch"
    assert told_of_dropout(tmp_path, run, 2, {}, False) == []
    assert told_of_dropout(tmp_path, run, 2, rate, False) == [always]
    assert told_of_dropout(tmp_path, run, 2, rate, True) == [always]
    other = config("parallel.engine=fsdp", "parallel.micro_batch_size=4")
    assert told_of_dropout(tmp_path, other, 3, rate, True) == [
        "attention_dropout 0.1: other draws from here on than without the change (number of processes 2 -> 3, engine "
        "ddp -> fsdp, micro-batch 8 -> 4)"
    ]
    assert told_of_dropout(tmp_path, other, 3, rate, True) == [always]


def test_every_key_of_dropout_is_known():
    from transformers import GPT2Config, LlamaConfig, PhiConfig

    assert dropouts(LlamaConfig()) == {}
    assert dropouts(LlamaConfig(attention_dropout=0.2)) == {"attention_dropout": 0.2}
    assert {"attn_pdrop", "embd_pdrop", "resid_pdrop"} <= dropouts(GPT2Config()).keys()
    assert dropouts(PhiConfig(resid_pdrop=0.3, attention_dropout=0.0)) == {"resid_pdrop": 0.3}
