"""A run and its export give the same ids and numbers, stop where the model was trained to stop, and can be written
whatever the base model's settings say."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bigtrain.config import load, load_config
from bigtrain.config.schema import SourceConfig
from bigtrain.inference.evaluate import evaluate
from bigtrain.inference.export import export
from bigtrain.inference.generate import _streamer, _text, encode_prompt, generate
from bigtrain.inference.generation import left_out
from bigtrain.inference.load import load_model
from bigtrain.launching.dry_run import dry_run
from tests import tiny

CHAT = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "the quick brown fox"}]
ANSWER = "\nthe quick brown fox"  # the template asks for one without the line break


def left_out_of(run):
    return left_out(run.model, run.stages)


def finetuned(folder, base, **changes):
    """A run that has learned one answer by heart from a base model."""
    rows = "".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(40))
    config = tiny.config(
        folder, task="sft", sequence_length=96, steps=60, optimizer={"lr": 1e-2}, export=True, **changes
    )
    (folder / "chats.jsonl").write_text(rows)
    data = f"stages.p.data=[{{source: {folder / 'chats.jsonl'}}}]"
    return tiny.train(config, f"model={{from_pretrained: {base}}}", "tokenizer=null", data)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(run, its export) of a base whose end token is not the one that ends a turn, and whose tokenizer puts its end
    behind each text."""
    folder = tmp_path_factory.mktemp("taught")
    base = tiny.pretrained(folder / "base", {"eos_token_id": 0}, eos_token="<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(base)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", backend.token_to_id("<|im_end|>"))]
    )
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base)("the fox")["input_ids"][-1] == 2
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "max_new_tokens": 2048}))
    run = finetuned(folder, base, prompts=["what is it", "the fox " * 200])
    return run, run / "p" / "export"


def test_the_trained_end_of_turn_stops_every_program(taught):
    run, exported = taught
    tokenizer = AutoTokenizer.from_pretrained(exported)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(exported).eos_token_id == [0, end]
    ids = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(exported).generate(**ids, do_sample=False, max_new_tokens=40)
    answer = plain[0, ids["input_ids"].shape[1] :].tolist()
    assert answer.index(end) == len(answer) - 1
    for where in (run, exported):
        assert generate(load_model(where), "what is it", temperature=0.0, max_new_tokens=40) == ANSWER


def test_a_run_and_its_export_get_the_same_ids_and_numbers(taught):
    run, exported = map(load_model, taught)
    for chat in (None, False, True):
        assert encode_prompt(run, "the fox", chat) == encode_prompt(exported, "the fox", chat)
    assert 2 not in encode_prompt(run, "the fox", chat=False)
    ours, theirs = (
        evaluate(where, [SourceConfig(source=str(taught[0].parents[1] / "data.jsonl"))]) for where in taught
    )
    assert ours.metrics == theirs.metrics


def test_a_tokenizer_that_ends_each_text_does_not_end_a_prompt(taught):
    base = load_model(taught[0].parents[1] / "base")
    assert encode_prompt(base, "the fox") == encode_prompt(base, "the fox<|im_end|>")[:-1]


def test_a_begin_token_that_the_tokenizer_does_not_put_itself_begins_both_prompts(tmp_path):
    base = tiny.pretrained(tmp_path / "base", bos_token="<|im_start|>")
    config = tiny.config(tmp_path, steps=1, export=True)
    run = tiny.train(config, f"model={{from_pretrained: {base}}}", "tokenizer=null")
    ours, theirs = (encode_prompt(load_model(where), "the fox") for where in (run, run / "p" / "export"))
    assert ours == theirs
    assert ours[0] == 1
    assert encode_prompt(load_model(base), "the fox") == ours[1:]


@pytest.mark.parametrize("whole", [True, False])
def test_a_streamed_answer_shows_whole_characters(whole):
    """Most of them span several tokens; the last one of an answer that is cut is left out."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer("天气很好🎉 naïve 好", add_special_tokens=False)["input_ids"][: None if whole else -1]
    assert sum("\ufffd" in tokenizer.decode([token]) for token in ids) > 15
    pieces = []
    streamer = _streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == _text(tokenizer, ids) == "天气很好🎉 naïve " + "好" * whole
    assert len(pieces) > 8


def test_a_prompt_that_cannot_be_answered_ends_no_run(taught):
    first, second = json.loads((taught[0] / "run.json").read_text())["stages"]["p"]["answers"]
    assert first["answer"] == ANSWER
    assert "has 128 positions" in second["answer"]


def test_an_export_names_no_place_of_this_machine(taught):
    run, exported = taught
    texts = {file.name: file.read_text() for file in exported.iterdir() if file.suffix != ".safetensors"}
    assert str(run.parents[1]) not in "".join(texts.values())
    assert "first weights: `base`" in texts["README.md"]
    assert "sft on `chats.jsonl`" in texts["README.md"]


SETTINGS = {  # of a base model: generation_config.json, more of config.json, what is said of it
    "sampling beside greedy": (
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2},
        {},
        ["temperature (0.9) is left out", "top_p (0.6) is left out"],
    ),
    "many answers of a greedy one": ({"num_return_sequences": 3}, {}, ["num_return_sequences"]),
    "beams' settings without beams": ({"length_penalty": 0.5, "early_stopping": True}, {}, ["length_penalty"]),
    "an unknown cache": ({"cache_implementation": "magic"}, {}, ["generation_config.json"]),
    "no JSON": ("{", {}, ["generation_config.json"]),
    "empty": ("", {}, ["generation_config.json is empty"]),
    "settings in config.json": (None, {"repetition_penalty": 1.2, "num_beams": 2}, []),
    "scores": ({"output_scores": True}, {}, ["output_scores"]),
    "all is well": ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 2]}, {}, []),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    base = tiny.pretrained(folder / "base")
    config = tiny.config(folder, steps=1)
    return base, tiny.train(config, f"model={{from_pretrained: {base}}}", "tokenizer=null")


@pytest.mark.parametrize("case", SETTINGS)
def test_whatever_the_base_models_settings_say_the_export_is_written(trained, tmp_path, capsys, case):
    base, run = trained
    settings, config, said = SETTINGS[case]
    kept = tmp_path / "kept"
    shutil.copytree(base, kept)
    try:
        if settings is not None:
            text = settings if isinstance(settings, str) else json.dumps(settings)
            (base / "generation_config.json").write_text(text)
        else:
            (base / "generation_config.json").unlink()
        values = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(values | config))
        before = left_out_of(load_config(run / "config.yaml", ["stages.p.export=true"]))
        assert capsys.readouterr().err == ""
        folder = export(run, to=tmp_path / "export")
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    told = capsys.readouterr().err
    assert all(part in told for part in said), told
    assert bool(told) == bool(said) == bool(before)
    assert all(part in before[0] for part in said)
    assert load_file(folder / "model.safetensors")
    reopened = GenerationConfig.from_pretrained(folder)
    for key, value in (config or {}).items():
        assert getattr(reopened, key) == value
    if case == "all is well":
        assert reopened.temperature == 0.6
    assert generate(load_model(folder), "the", max_new_tokens=2, temperature=0.0) is not None


def test_what_the_export_will_change_is_told_before_training(trained, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(trained[0], base)
    greedy = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}
    (base / "generation_config.json").write_text(json.dumps(greedy))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    path = tiny.config(tmp_path, steps=1, export=True)
    overrides = [f"model={{from_pretrained: {base}}}", "tokenizer=null"]
    told = (
        f"the export changes the settings of {base}: temperature (0.9) is left out, as transformers does not save it "
        "beside the rest. top_p (0.6) is left out, as transformers does not save it beside the rest.\n"
    )
    dry_run(load(path, overrides))
    assert f"warning: {told}" in capsys.readouterr().out
    run = tiny.train(path, *overrides)
    output = capsys.readouterr()
    assert GenerationConfig.from_pretrained(run / "p" / "export").pad_token_id == tokenizer.eos_token_id
    assert (output.out + output.err).count(f"warning    {told}") == 1
    again = ["model={from_run: " + str(run / "p") + "}", "tokenizer=null", "name=again"]
    assert "temperature (0.9) is left out" in left_out_of(load_config(path, again))[0]
    assert left_out_of(load_config(path, [*overrides, "stages.p.export=false"])) == []
