"""Values of `from_config` that transformers or torch refuses when a model is built, initialised or run are refused
before anything is written, by key; what is published in a config.json is accepted."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bigtrain.config import load, load_config
from bigtrain.config.schema import ModelConfig
from bigtrain.data.tokenizer import num_ids
from bigtrain.errors import ConfigError
from bigtrain.launching.dry_run import model_size
from bigtrain.models.architecture import model_config
from bigtrain.models.families import FAMILIES
from bigtrain.models.trial import try_architecture
from bigtrain.pipeline.build import open_tokenizer
from tests import tiny
from tests.support import MODEL, final_state
from tests.unit.test_isolation import small_values

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
MOE = MODEL | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def tried(values, **options):
    return try_architecture(ModelConfig(from_config=values), 320, attention="sdpa", needs_document_mask=True, **options)


WRONG = [  # the model, the value, more words of the message
    (MODEL, {"attention_dropout": 1.5}, "between 0 and 1"),
    (MODEL, {"attention_dropout": -0.1}, "between 0 and 1"),
    (MODEL, {"initializer_range": -0.02}, "-0.02"),
    (MODEL, {"initializer_range": 1e39}, "1e"),
    (MODEL, {"pad_token_id": 999}, "999 is no id of the vocabulary, 0 to 319"),
    (MODEL, {"pad_token_id": -1}, "-1 is no id"),
    (MODEL, {"eos_token_id": [2, 5000]}, "5000 is no id"),
    (MODEL, {"hidden_act": "swish9000"}, "swish9000"),
    (MODEL, {"dtype": "float31"}, "float31"),
    (MODEL, {"torch_dtype": "int8"}, "no floating-point type"),
    (MODEL, {"num_key_value_heads": 3}, "3"),
    (MODEL, {"num_attention_heads": 5}, "5"),
    (MODEL, {"head_dim": 7}, "even"),
    (MODEL, {"hidden_size": -64}, "negative"),
    (MODEL, {"rms_norm_eps": -1.0}, "at least 0"),
    (MODEL, {"rms_norm_eps": "small"}, "expected float"),
    (MODEL, {"rope_theta": -5.0}, "not finite"),
    (MODEL, {"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "magic"),
    (MODEL, {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    (GPT2, {"resid_pdrop": 1.5}, "between 0 and 1"),
    (GPT2, {"embd_pdrop": -1.0}, "between 0 and 1"),
    (GPT2, {"n_head": 5}, "divisible"),
    (GPT2, {"n_embd": -64}, "negative"),
    (GPT2, {"n_layer": 0}, "no layers"),
    (GPT2, {"activation_function": "bar"}, "bar"),
    (MOE, {"num_experts": 4, "num_experts_per_tok": 9}, "range"),
    (MOE, {"moe_intermediate_size": -1}, "negative"),
    (MODEL, {"hiden_size": 64}, "did you mean `hidden_size`"),
    (MODEL, {"mlp_type": "default"}, "has no such key"),
]


@pytest.mark.parametrize(("model", "value", "message"), WRONG, ids=[f"{m['model_type']}-{v}" for m, v, _ in WRONG])
def test_a_value_that_cannot_be_trained_with_is_refused_by_its_key(model, value, message):
    with pytest.raises(ConfigError) as refused:
        tried(model | value)
    text = str(refused.value)
    assert text.startswith(f"model.from_config.{next(iter(value))}:"), text
    assert message in text
    assert "\n" not in text


def test_too_few_positions_are_refused_whatever_the_key_is_called():
    with pytest.raises(ConfigError, match="64 positions, and a stage has sequences of 65"):
        tried(GPT2 | {"n_positions": 64}, longest=65)
    tried(GPT2 | {"n_positions": 64}, longest=64)


PUBLISHED = [
    MODEL | {"rope_theta": 500000.0, "rope_scaling": YARN, "torch_dtype": "bfloat16", "pretraining_tp": 1},
    MODEL
    | {"architectures": ["LlamaForCausalLM"], "transformers_version": "4.42.3", "is_llama_config": True}
    | {"rope_scaling": None, "rope_theta": 1e5, "use_cache": True, "transformers.js_config": {}},
    MODEL | {"model_type": "phi3", "partial_rotary_factor": 0.5, "auto_map": {"AutoConfig": "x.Y"}, "resid_pdrop": 0.0},
    {key: value for key, value in MODEL.items() if key != "num_key_value_heads"}
    | {"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000},
    MODEL | {"model_type": "gemma3_text", "rope_local_base_freq": 10000, "rope_theta": 1e6, "head_dim": 8},
    GPT2 | {"n_ctx": 64, "n_positions": 64, "task_specific_params": {"text-generation": {"do_sample": True}}},
]


@pytest.mark.parametrize("values", PUBLISHED, ids=lambda values: values["model_type"])
def test_published_keys_are_accepted(values):
    tried(values)


def test_published_keys_mean_what_transformers_reads_in_them():
    before = json.dumps(YARN)
    config = tried(MODEL | {"rope_theta": 500.0, "rope_scaling": YARN}).config
    assert json.dumps(YARN) == before
    assert config.rope_parameters["rope_theta"] == 500.0
    assert config.rope_parameters["factor"] == 4.0


KINDS = {  # of each way of building attention, experts, positions and layers one family; the others are soak
    "apertus",
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granitemoe",
    "llama",
    "mixtral",
    "phi3",
    "qwen3_moe",
}
HAVE_DOCUMENT_MASK = {name for name, family in FAMILIES.items() if family.document_mask}
OTHERS = [pytest.param(family, marks=pytest.mark.soak) for family in sorted(HAVE_DOCUMENT_MASK - KINDS)]


@pytest.mark.parametrize("family", [*sorted(KINDS & HAVE_DOCUMENT_MASK), *OTHERS])
def test_what_can_be_trained_is_not_refused(family):
    values = small_values(family) | {"model_type": family}
    attention = "eager" if family == "gemma2" else "sdpa"  # it has no other
    try_architecture(ModelConfig(from_config=values), 61, attention=attention, needs_document_mask=True)


def test_run_and_dry_run_refuse_before_anything_is_written(tmp_path):
    config = tiny.config(tmp_path)
    wrong = "model.from_config.attention_dropout=1.5"
    with pytest.raises(ConfigError, match=r"model\.from_config\.attention_dropout"):
        tiny.train(config, wrong)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match=r"model\.from_config\.attention_dropout"):
        model_size(load(config, [wrong]).run)


def test_a_deep_model_is_tried_as_fast_as_a_flat_one(monkeypatch):
    """Of each kind of layers one is run."""
    import transformers.models.llama.modeling_llama as llama

    runs = []
    forward = llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    tried(MODEL | {"num_hidden_layers": 40})
    assert len(runs) == 1


def with_gaps(folder):
    """A tokenizer of six tokens whose largest id is 900."""
    backend = Tokenizer(models.WordLevel({"the": 0, "fox": 3, "<unk>": 7, "quick": 400}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["<end>"] = 900
    content["added_tokens"][0]["id"] = 900
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_an_embedding_covers_the_largest_id_of_a_tokenizer_with_gaps(tmp_path):
    tokenizer = with_gaps(tmp_path / "gaps")
    assert len(tokenizer) < 10
    assert num_ids(tokenizer) == 901
    config = tiny.config(tmp_path, export=True)
    overrides = [f"tokenizer={{from_pretrained: {tmp_path / 'gaps'}}}"]
    run = load_config(config, overrides)
    assert model_config(run.model, open_tokenizer(run)).vocab_size == 901
    assert model_size(run).embedding == 901 * MODEL["hidden_size"]
    folder = tiny.train(config, *overrides)
    assert final_state(folder, "p")[1]["model.embed_tokens.weight", "weight"].shape[0] == 901
    assert AutoModelForCausalLM.from_pretrained(folder / "p" / "export").config.vocab_size == 901
    with pytest.raises(ConfigError, match="largest id is 900, and the model's embedding has only 500 rows"):
        tiny.train(config, *overrides, "model.from_config.vocab_size=500", "name=small")
