"""What a pretrained model's files lack is refused in every command, and what they hold too much of is named."""

import json
import os
import re
import shutil

import numpy
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bigtrain.config import load
from bigtrain.config.schema import ModelConfig
from bigtrain.errors import ConfigError
from bigtrain.inference.load import load_model
from bigtrain.launching.dry_run import model_size
from bigtrain.models.architecture import empty_model
from bigtrain.models.trial import try_architecture
from bigtrain.models.weights import pretrained_weights
from tests import tiny
from tests.support import MODEL

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 120000\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of a model with a head of its own; `shards`: the same in four files; `bin`: in an old one."""
    folder = tmp_path_factory.mktemp("base")
    tiny.pretrained(folder / "whole", {"tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_pretrained(folder / "whole")
    for other in ("shards", "bin"):
        shutil.copytree(folder / "whole", folder / other)
        (folder / other / "model.safetensors").unlink()
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    return folder


def without(pattern):
    def change(file):
        is_old = file.suffix == ".bin"
        tensors = torch.load(file) if is_old else load_file(file)
        kept = {name: tensor for name, tensor in tensors.items() if pattern not in name}
        assert len(kept) < len(tensors)
        if is_old:
            torch.save(kept, file)
        else:
            save_file(kept, file, {"format": "pt"})

    return change


def with_tensor(name, *shape):
    return lambda file: save_file(load_file(file) | {name: torch.ones(*shape)}, file, {"format": "pt"})


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def edit(**values):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


def leads_to(elsewhere):
    def change(index):
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = elsewhere
        index.write_text(json.dumps(content))

    return change


def old_index(elsewhere):
    def change(file):
        names = dict.fromkeys(torch.load(file), elsewhere)
        file.rename(file.parents[1] / "x.bin")
        file.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))

    return change


WHOLE, SECOND, OLD = "whole/model.safetensors", "shards/model-00002-of-00004.safetensors", "bin/pytorch_model.bin"
INDEX = "shards/model.safetensors.index.json"
LFS = "is a git-lfs pointer, not the file that it points to; `git lfs pull`"
WRONG = {  # what is done to which file, and what is said of it
    "a layer is missing": (WHOLE, without(".layers.1."), r"lack model\.layers\.1\..* and 4 more, which its config"),
    "the head is missing": (WHOLE, without("lm_head"), r"lack lm_head\.weight"),
    "more layers by the config": ("whole/config.json", edit(num_hidden_layers=3), r"lack model\.layers\.2\."),
    "another width by the config": ("whole/config.json", edit(intermediate_size=96), r"has shape \(.*64.*\) .*96"),
    "another shape": (WHOLE, with_tensor("model.norm.weight", 7), r"norm\.weight has shape \(7,\) .* and \(32,\)"),
    "another vocabulary by the config": ("whole/config.json", edit(vocab_size=400), r"has shape \(298, 32\)"),
    "a pointer": (WHOLE, lambda file: file.write_text(POINTER), LFS),
    "empty": (WHOLE, lambda file: os.truncate(file, 0), "is empty"),
    "cut": (WHOLE, cut, "no whole safetensors file: it ends within|not fully covered"),
    "cut in the header": (WHOLE, lambda file: os.truncate(file, 100), "no whole safetensors file|header"),
    "no weights": (WHOLE, lambda file: file.unlink(), "no weights are in|no file named model.safetensors"),
    "a shard is missing": (SECOND, lambda file: file.unlink(), "00002-of-00004.safetensors"),
    "a shard is a pointer": (SECOND, lambda file: file.write_text(POINTER), LFS),
    "a shard lacks what the index names": (SECOND, without("norm"), r"lack model\..*norm"),
    "an index that is cut": (INDEX, cut, "cannot be opened"),
    "an index that leads elsewhere": (
        INDEX,
        leads_to("../whole/model.safetensors"),
        "names ../whole/model.safetensors, wh",
    ),
    "an index of an absolute path": (
        INDEX,
        leads_to("/etc/hostname"),
        "names /etc/hostname, which is no file of its fol",
    ),
    "an old index that leads elsewhere": (
        OLD,
        old_index("../x.bin"),
        r"names \.\./x\.bin, which is no file of its folder",
    ),
    "an old file lacks a layer": (OLD, without(".layers.1."), r"lack model\.layers\.1\."),
    "an old file is a pointer": (OLD, lambda file: file.write_text(POINTER), LFS),
    "an old file is cut": (OLD, cut, "cannot be opened"),
    "the config is empty": ("whole/config.json", lambda file: os.truncate(file, 0), r"config\.json is empty"),
    "the tokenizer is a pointer": ("whole/tokenizer.json", lambda file: file.write_text(POINTER), LFS),
}


@pytest.fixture
def broken(base, tmp_path):
    def break_(case):
        file, change, message = WRONG[case]
        shutil.copytree(base / file.partition("/")[0], tmp_path / "it")
        change(tmp_path / "it" / file.partition("/")[2])
        return tmp_path / "it", message

    return break_


def weights(folder, tmp_path):
    empty = empty_model(
        AutoConfig.from_pretrained(folder), attention="sdpa", activation_checkpointing="none", meta=True
    )
    return pretrained_weights(str(folder), empty, 0, tmp_path / "written", lambda _: None)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_lacking_is_refused_in_a_sentence(broken, tmp_path, case):
    folder, message = broken(case)
    with pytest.raises(ConfigError, match=message) as opened:  # generate, eval
        load_model(folder)
    assert "\n" not in str(opened.value)
    if case not in ("the config is empty", "the tokenizer is a pointer"):  # it comes so far
        with pytest.raises(ConfigError, match=message):  # run
            weights(folder, tmp_path)
    assert not (tmp_path / "written").exists()
    if case != "the tokenizer is a pointer":
        with pytest.raises(ConfigError, match=f"model.from_pretrained: .*{message}"):  # before run and import
            try_architecture(ModelConfig(from_pretrained=str(folder)), 1, attention="sdpa", needs_document_mask=True)


def test_run_and_dry_run_refuse_before_anything_is_written(broken, tmp_path):
    folder, message = broken("a layer is missing")
    config = tiny.config(tmp_path)
    overrides = [f"model={{from_pretrained: {folder}}}", "tokenizer=null"]
    with pytest.raises(ConfigError, match=message):
        tiny.train(config, *overrides)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match=message):
        model_size(load(config, overrides).run)


def test_what_is_too_much_is_named(base, tmp_path, capfd):
    folder = tmp_path / "it"
    shutil.copytree(base / "whole", folder)
    with_tensor("model.layers.2.mlp.up_proj.weight", 64, 32)(folder / "model.safetensors")
    load_model(folder)
    assert capfd.readouterr().err.count("llama has no use for model.layers.2.mlp.up_proj.weight; left out") == 1


def test_what_transformers_accepts_is_accepted(base, tmp_path):
    """Names without the prefix of the base model; a head that is tied is not there; an old file."""
    renamed = tmp_path / "renamed"
    shutil.copytree(base / "whole", renamed)
    tensors = load_file(renamed / "model.safetensors")
    save_file({re.sub(r"^model\.", "", n): t for n, t in tensors.items()}, renamed / "model.safetensors")
    tied = tiny.pretrained(tmp_path / "tied", {"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    for number, folder in enumerate((renamed, tied, base / "bin", base / "shards")):
        reader = weights(folder, tmp_path / str(number))
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in load_model(folder).model.named_parameters():
            whole = reader.read(name, "weight", (0,) * parameter.dim(), tuple(parameter.shape))
            assert torch.equal(whole, theirs.get_parameter(name))


EXPERTS = MODEL | {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "vocab_size": 298}


@pytest.mark.parametrize(("family", "experts"), [("mixtral", "block_sparse_moe"), ("qwen2_moe", "mlp")])
@pytest.mark.parametrize("lacking", ["experts.2.", "experts.1.{}", "experts", "gate."])
def test_experts_that_transformers_puts_together_are_all_there(tmp_path, family, experts, lacking):
    config = AutoConfig.for_model(family, **{key: value for key, value in EXPERTS.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "it")
    it = ModelConfig(from_pretrained=str(tmp_path / "it"))
    try_architecture(it, 298, attention="sdpa", needs_document_mask=True)
    try_architecture(it, 300, attention="sdpa", needs_document_mask=True, added_tokens=True)
    first = "w1" if family == "mixtral" else "gate_proj"
    without(f"layers.1.{experts}.{lacking.format(first)}")(tmp_path / "it" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.1\.|automatic conversion"):
        weights(tmp_path / "it", tmp_path)
    with pytest.raises(ConfigError, match=r"model\.from_pretrained: .*layers\.1\."):
        try_architecture(it, 298, attention="sdpa", needs_document_mask=True)


def write_gguf(file, without=()):
    """A Llama of one layer."""
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(50)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(50)])
    square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32))
    shapes = square | {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": 32, "ffn_norm": 32}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()} | {"token_embd": (50, 32), "output_norm": 32}
    for name in shapes.keys() - without:
        writer.add_tensor(f"{name}.weight", numpy.ones(shapes[name], dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_what_a_gguf_file_lacks_is_found_by_its_names(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf")
    empty = try_architecture(ModelConfig(from_pretrained=str(whole)), 1, attention="sdpa", needs_document_mask=True)
    assert pretrained_weights(str(whole), empty, 0, tmp_path / "written", lambda _: None)
    lacking = ModelConfig(from_pretrained=str(write_gguf(tmp_path / "lacking.gguf", {"blk.0.attn_k"})))
    with pytest.raises(ConfigError, match=r"lack model\.layers\.0\.self_attn\.k_proj\.weight, which"):
        try_architecture(lacking, 1, attention="sdpa", needs_document_mask=True)
