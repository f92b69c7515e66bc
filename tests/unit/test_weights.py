"""Initial weights are transformers' own: its distributions, drawn from (seed, module name), or what it would load."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bigtrain.errors import CheckpointError
from bigtrain.models.architecture import empty_model, persistent_buffers
from bigtrain.models.weights import RandomWeights, pretrained_weights

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


PRETRAINED = {
    "llama": FAMILIES["llama"],
    "llama-untied": SMALL | {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": SMALL | {"head_dim": 16},
    "gemma3_text": FAMILIES["gemma3_text"],
    "gpt2": FAMILIES["gpt2"],
    "phi3": FAMILIES["phi3"],
}


def save_pretrained(folder, family, values, dtype=torch.float32, headless=False, **options):
    """A folder with random weights; `headless`: as the model without its output head saves it."""
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type", family), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    (model.base_model if headless else model).save_pretrained(folder, **options)
    return folder


def open_pretrained(folder, **changes):
    """(reader, why it has not read the folder's own files, the model it is for)"""
    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    empty = empty_model(config, attention="sdpa", activation_checkpointing="none", meta=True)
    reasons = []
    written = folder / "written"
    reader = pretrained_weights(str(folder), empty, 0, written, reasons.append)
    assert written.exists() == bool(reasons)
    return reader, *(reasons or [None]), empty


def assert_same_as_transformers(folder, reader, empty):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for slot, tensors, expected in (
        ("weight", empty.named_parameters(), dict(theirs.named_parameters())),
        ("buffer", persistent_buffers(empty), dict(theirs.named_buffers())),
    ):
        for name, tensor in tensors:
            whole = reader.read(name, slot, (0,) * tensor.dim(), tuple(tensor.shape))
            assert torch.equal(whole, expected[name]), name
            assert whole.dtype == expected[name].dtype
            if tensor.dim() > 1:
                begin = (tensor.shape[0] // 2, 2, *(0 for _ in tensor.shape[2:]))
                part = reader.read(name, slot, begin, (tensor.shape[0] - begin[0], 3, *tensor.shape[2:]))
                assert torch.equal(part, expected[name][begin[0] :, 2:5]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", PRETRAINED)
def test_pretrained_files_hold_what_transformers_loads(tmp_path, family, shards, dtype):
    largest = {} if shards == 1 else {"max_shard_size": "100KB"}
    folder = save_pretrained(tmp_path, family, PRETRAINED[family], dtype, **largest)
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (shards == 1)
    reader, reason, empty = open_pretrained(folder)
    assert reason is None
    assert_same_as_transformers(folder, reader, empty)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_files_of_a_model_without_its_head_will_do_where_the_head_is_tied(tmp_path, family):
    folder = save_pretrained(tmp_path, family, PRETRAINED[family], headless=True)
    reader, reason, empty = open_pretrained(folder)
    assert reason is None
    assert_same_as_transformers(folder, reader, empty)


def test_what_an_architecture_has_dropped_does_not_matter(tmp_path):
    folder = save_pretrained(tmp_path, "llama", PRETRAINED["llama"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reader, reason, empty = open_pretrained(folder)
    assert reason is None
    assert_same_as_transformers(folder, reader, empty)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_what_transformers_converts_is_read_whole(tmp_path, family):
    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
    folder = save_pretrained(tmp_path, family, SMALL | experts)
    reader, reason, empty = open_pretrained(folder)
    assert f"for {family}" in reason
    assert "transformers converts model.layers.0." in reason
    assert_same_as_transformers(folder, reader, empty)


def test_what_does_not_match_is_read_whole(tmp_path):
    """The reason is told."""

    def reason(name, change=None, **config):
        folder = save_pretrained(tmp_path / name, "llama", PRETRAINED["llama"], safe_serialization=True)
        tensors = load_file(folder / "model.safetensors")
        if change:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return open_pretrained(folder, **config)[1]

    assert "no use for: extra" in reason("unknown", lambda tensors: tensors.update(extra=torch.ones(2)))
    assert "has shape (211, 64) there and (220, 64)" in reason("grown", vocab_size=220)
    assert "no model.safetensors" in reason_of_an_old_file(tmp_path / "old")


def reason_of_an_old_file(folder):
    save_pretrained(folder, "llama", PRETRAINED["llama"])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    reader, reason, empty = open_pretrained(folder)
    assert_same_as_transformers(folder, reader, empty)
    return reason


def test_files_that_are_cut_short_are_refused(tmp_path):
    folder = save_pretrained(tmp_path, "llama", PRETRAINED["llama"])
    reader, _, _ = open_pretrained(folder)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="no such weight"):
        reader.read("model.nothing", "weight", (0,), (1,))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: it ends"):
        reader.read("model.norm.weight", "weight", (0,), (64,))
