"""Initial weights are transformers' own distributions, drawn from (seed, module name)."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bigtrain.errors import CheckpointError
from bigtrain.models.causal_lm import empty_model
from bigtrain.models.weights import ModelWeights, RandomWeights

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": SMALL | {"tie_word_embeddings": True},
    "qwen2": SMALL,
    "gemma3_text": SMALL | {"head_dim": 16},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 211,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "phi3": SMALL,
    "qwen3_moe": SMALL | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32},
}


def meta_model(family):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    return config, empty_model(config, attention="sdpa", activation_checkpointing="none", meta=True)


def read(reader, name, parameter):
    return reader.read(name, "weight", (0,) * parameter.dim(), tuple(parameter.shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_distribution_as_transformers(family):
    config, model = meta_model(family)
    torch.manual_seed(0)
    theirs = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    reader = RandomWeights(model, seed=0)
    assert set(theirs) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        ours = read(reader, name, parameter)
        spread = theirs[name].std(correction=0)
        error = 6 / parameter.numel() ** 0.5
        assert (ours.mean() - theirs[name].mean()).abs() <= error * spread + 1e-9, name
        assert (ours.std(correction=0) / spread - 1).abs() <= error if spread > 0 else ours.std() == 0, name


def test_each_module_has_its_own_draw_whatever_the_order():
    _, model = meta_model("llama")
    names = dict(model.named_parameters())
    forwards = RandomWeights(model, seed=0)
    drawn = {name: read(forwards, name, p) for name, p in names.items()}
    backwards = RandomWeights(model, seed=0)
    for name, parameter in reversed(names.items()):
        assert torch.equal(read(backwards, name, parameter), drawn[name])
    matrices = [t for t in drawn.values() if t.std() > 0]
    assert len({t.flatten()[0].item() for t in matrices}) == len(matrices)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(read(RandomWeights(model, seed=1), embedding, names[embedding]), drawn[embedding])


def test_a_box_is_the_part_of_the_whole_and_the_model_stays_on_meta():
    _, model = meta_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    reader = RandomWeights(model, seed=0)
    whole = reader.read(name, "weight", (0, 0), (128, 64))
    assert torch.equal(reader.read(name, "weight", (3, 10), (7, 20)), whole[3:10, 10:30])
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(CheckpointError, match="does not fit"):
        reader.read(name, "weight", (120, 0), (9, 64))


def test_drawing_leaves_the_global_generator_alone():
    _, model = meta_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    RandomWeights(model, seed=0).read("model.norm.weight", "weight", (0,), (64,))
    assert torch.equal(torch.rand(3), expected)


def test_a_parameter_that_nobody_initialises_is_refused():
    _, model = meta_model("llama")
    model.model.extra = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(CheckpointError, match=r"model\.extra: LlamaForCausalLM does not say how"):
        RandomWeights(model, seed=0).read("model.extra", "weight", (0,), (3,))


def test_reads_a_model_in_memory():
    config, _ = meta_model("llama")
    model = AutoModelForCausalLM.from_config(config)
    reader = ModelWeights(model)
    assert torch.equal(reader.read("model.norm.weight", "weight", (8,), (4,)), model.model.norm.weight[8:12])
    with pytest.raises(CheckpointError, match="no such weight"):
        reader.read("model.nothing", "weight", (0,), (1,))
