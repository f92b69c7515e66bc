"""What any engine trained and saved opens with transformers alone: the same tensors, the same logits."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import PrivateAttr
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bigtrain.checkpoint import Retention, save
from bigtrain.checkpoint.format import write_manifest
from bigtrain.config import load_config, to_yaml
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.inference.evaluate import evaluate
from bigtrain.inference.export import MARK, export, write_folder
from bigtrain.inference.load import LoadedModel, load_model
from bigtrain.models.architecture import empty_model, model_config
from bigtrain.models.weights import RandomWeights
from bigtrain.optim.adamw import AdamW
from bigtrain.parallel import build_engine
from bigtrain.parallel.dims import ParallelDims
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.testing import Ranks
from tests.parity import cases
from tests.support import MODEL, small_config

CASES = {  # name of the run: layout, tied, precision
    "ddp": ("ddp", True, "fp32"),
    "fsdp-untied": ("fsdp", False, "fp32"),
    "zero1": ("zero1", True, "fp32"),
    "zero2-untied": ("zero2", False, "fp32"),
    "zero3": ("zero3", True, "fp32"),
    "zero3-untied": ("zero3", False, "fp32"),
    "fsdp-bf16": ("fsdp", True, "bf16"),
}
STEP = 2

# Opens every export under a folder and leaves its logits there: what a user without bigtrain does.
PLAIN = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import load_file, save_file

runs = Path(sys.argv[1])
for inputs in sorted(runs.glob("*/ids.safetensors")):
    folder = inputs.parent / "pretrain" / "export"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("def f(x):").input_ids, skip_special_tokens=True) == "def f(x):"
    with torch.no_grad():
        logits = model(**load_file(inputs), use_cache=False).logits
    save_file({"logits": logits}, inputs.parent / "logits.safetensors")
    print(folder, model.dtype, model.lm_head.weight is model.model.embed_tokens.weight)
assert "bigtrain" not in sys.modules
"""


class Watched(Pretrain):
    """Keeps the logits of the last forward outside training."""

    _logits = PrivateAttr()

    def sums(self, logits, batch, training):
        if not training:
            self._logits = logits.detach().unflatten(0, batch["targets"].shape).clone()
        return super().sums(logits, batch, training)


def train_and_save(folder, layout):
    """Two steps of the run in `folder`; returns (all weights, this rank's inputs, the engine's logits of them)."""
    run = load_config(Path(folder) / "config.yaml")
    task = Watched()
    config = model_config(run.model, open_tokenizer(run))
    build = partial(empty_model, config, attention="sdpa", activation_checkpointing="none")
    engine = build_engine(
        layout,
        build,
        task,
        dims=ParallelDims.of(layout, dist.get_rank(), dist.get_world_size()),
        precision=run.precision,
        compile=False,
        micro_batch_size=2,
        optimizer=AdamW(lr=1e-2, eps=1e-4),
        seed=0,
        device=torch.device("cpu"),
    )
    engine.load(RandomWeights(build(meta=True), seed=0), {"updates": 0})
    for step in range(STEP):
        engine.step(cases.share(step, rows=4), 1e-2)
    save(Path(folder) / "pretrain" / "checkpoints", STEP, engine.boxes(), engine.progress(), Retention(keep=1))
    batch = cases.share(STEP, rows=4)
    engine.evaluate([batch])
    weights = {name: tensor for (name, slot), tensor in cases.collect(engine).items() if slot == "weight"}
    engine.close()
    return weights, {key: batch.tensors[key] for key in ("input_ids", "position_ids")}, task._logits


def evaluate_here(where):
    assert dist.get_world_size() == 2
    return evaluate(where)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ranks):
    """{run: (its folder, live weights, live logits)}, all exported and opened by a plain process."""
    folder = tmp_path_factory.mktemp("export")
    config = load_config(small_config(folder))
    found = {}
    for name, (layout, tied, precision) in CASES.items():
        home = folder / "runs" / name
        home.mkdir(parents=True)
        model = config.model.model_copy(update={"from_config": MODEL | {"tie_word_embeddings": tied}})
        run = config.model_copy(update={"name": name, "model": model, "precision": precision})
        (home / "config.yaml").write_text(to_yaml(run))
        open_tokenizer(run).save_pretrained(home / "tokenizer")
        weights, inputs, logits = ranks(train_and_save, str(home), layout)[0]
        save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, home / "ids.safetensors")
        assert export(home) == home / "pretrain" / "export"
        found[name] = (home, weights, logits)
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder / "runs")], capture_output=True, text=True, cwd=folder
    )
    assert plain.returncode == 0, plain.stderr
    return found, plain.stdout


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_are_the_live_ones_to_the_bit(trained, name):
    home, weights, _ = trained[0][name]
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    exported = load_file(home / "pretrain" / "export" / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert ("lm_head.weight" in exported) == (not CASES[name][1])
    for key, live in weights.items():
        assert exported[key].dtype == dtype
        assert torch.equal(exported[key], live.to(dtype)), key


@pytest.mark.parametrize("name", CASES)
def test_a_plain_process_gets_the_live_logits(trained, name):
    home, _, live = trained[0][name]
    opened = load_file(home / "logits.safetensors")["logits"]
    assert opened.dtype == live.dtype
    torch.testing.assert_close(opened, live, rtol=0, atol=1e-6)
    with torch.no_grad():
        ours = load_model(home).model(**load_file(home / "ids.safetensors"), use_cache=False).logits
    torch.testing.assert_close(ours, live, rtol=0, atol=1e-6)
    dtype = "bfloat16" if CASES[name][2] == "bf16" else "float32"
    assert f"{home / 'pretrain' / 'export'} torch.{dtype} {CASES[name][1]}\n" in trained[1]


def test_what_else_lies_in_the_folder(trained):
    home, _, _ = trained[0]["zero3"]
    folder = home / "pretrain" / "export"
    tokenizer = load_model(home).tokenizer
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert generation.bos_token_id == tokenizer.bos_token_id
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template
    card = (folder / "README.md").read_text()
    assert MARK in card
    assert "step 2" in card
    assert "asyncio/*.py" in card
    assert not list(folder.parent.glob(".*"))


def copied(trained, tmp_path, name="zero3"):
    """A run that may be damaged, with its old export, and the manifest of its checkpoint."""
    home = tmp_path / "runs" / name
    shutil.copytree(trained[0][name][0], home)
    (tmp_path / "runs" / "stores").symlink_to(trained[0][name][0].parent / "stores")
    return home, home / "pretrain" / "checkpoints" / f"step-{STEP:08d}" / "manifest.json"


def edit(manifest, change):
    content = json.loads(manifest.read_text())
    del content["checksum"]
    change(content["state"])
    write_manifest(manifest.parent, content)


DAMAGES = {
    "removed": (lambda state: state.pop("model.norm.weight"), "missing: model.norm.weight"),
    "without a part": (
        lambda state: state["model.embed_tokens.weight"]["weight"]["boxes"].pop(),
        r"model.embed_tokens.weight \(weight\): its boxes have \d+ elements",
    ),
    "of size zero": (
        lambda state: state["model.norm.weight"]["weight"].update(shape=[0]),
        "without elements: model.norm.weight",
    ),
    "of another model": (
        lambda state: state.update(other=state["model.norm.weight"]),
        "unknown to the model: other",
    ),
    "larger": (
        lambda state: state["model.embed_tokens.weight"]["weight"].update(shape=[500, 32]),
        r"of another shape: model.embed_tokens.weight \(500, 32\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_old_export_stays(trained, tmp_path, damage):
    home, manifest = copied(trained, tmp_path)
    change, message = DAMAGES[damage]
    edit(manifest, change)
    before = (home / "pretrain" / "export" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        export(home)
    with pytest.raises(CheckpointError, match=message):
        export(home, to=tmp_path / "elsewhere")
    assert (home / "pretrain" / "export" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in (home / "pretrain").iterdir()) == ["checkpoints", "export"]
    assert not [p for p in tmp_path.iterdir() if "elsewhere" in p.name]


def test_a_model_whose_parameters_lie_elsewhere_is_refused(trained, tmp_path):
    """As ZeRO-3 leaves them between forwards: with no elements."""
    opened = load_model(trained[0]["ddp"][0])
    opened.model.model.norm.weight.data = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight would be saved with no elements"):
        write_folder(opened, tmp_path / "export", MARK)
    opened.model.model.norm = opened.model.model.norm.to("meta")
    with pytest.raises(CheckpointError, match=r"no values for model\.norm\.weight"):
        write_folder(opened, tmp_path / "export", MARK)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_was_not_written_is_noticed(trained, tmp_path):
    opened = load_model(trained[0]["ddp"][0])
    opened.model._keys_to_ignore_on_save = ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        write_folder(opened, tmp_path / "export", MARK)
    assert not list(tmp_path.iterdir())


def in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file, {"format": "pt"})
    return folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files}


def without_a_shard(folder):
    index, content = in_shards(folder)
    index.write_text(json.dumps(content))
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_a_wrong_index(folder):
    index, content = in_shards(folder)
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    content["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))


def rewritten(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def halved(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


NORM, GREEDY = "model.norm.weight", {"do_sample": False, "temperature": 0.5}
WRITTEN_WRONG = {  # what happens to the files before they are looked at, and what is said
    "a cut file": (halved("model.safetensors"), r"model\.safetensors is no whole safetensors file: it ends"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"15 more were not saved"),
    "a missing tensor": (rewritten(lambda tensors: tensors.pop(NORM)), r"model\.norm\.weight were not saved"),
    "another shape": (rewritten(lambda tensors: tensors.update({NORM: torch.ones(7)})), r"model\.norm\.weight"),
    "another dtype": (rewritten(lambda tensors: tensors.update({NORM: tensors[NORM].half()})), r"model\.norm\.weight"),
    "a missing shard": (without_a_shard, r"has no model-00002-of-00002\.safetensors"),
    "a wrong index": (with_a_wrong_index, r"model\.(norm|embed_tokens)\.weight were not saved"),
    "a cut config": (halved("config.json"), "does not open again: .*config"),
    "a cut tokenizer": (halved("tokenizer.json"), "does not open again: tokenizer"),
    "settings that are refused": (
        lambda folder: (folder / "generation_config.json").write_text(json.dumps(GREEDY)),
        "does not open again: .*temperature",
    ),
}


@pytest.mark.parametrize("case", WRITTEN_WRONG)
def test_what_was_not_written_well_gets_no_name(trained, tmp_path, monkeypatch, case):
    opened = load_model(trained[0]["ddp"][0])
    damage, message = WRITTEN_WRONG[case]
    save = opened.tokenizer.save_pretrained  # the last that is written
    monkeypatch.setattr(opened.tokenizer, "save_pretrained", lambda folder: (save(folder), damage(folder)))
    with pytest.raises(CheckpointError, match=rf"/export is not written: .*{message}") as error:
        write_folder(opened, tmp_path / "export", MARK)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_older_export_is_replaced_and_nothing_else_is(trained, tmp_path):
    home, _ = copied(trained, tmp_path)
    folder = home / "pretrain" / "export"
    (folder / "stale").write_text("")
    (home / "pretrain" / ".export.partial").mkdir()  # left by an export that was killed
    assert export(home, "pretrain", dtype="bf16") == folder
    assert not (folder / "stale").exists()
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert sorted(p.name for p in (home / "pretrain").iterdir()) == ["checkpoints", "export"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something that is no export"):
        export(home, to=mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="did you mean `fp32`"):
        export(home, dtype="fp31")
    with pytest.raises(ConfigError, match="already"):
        export(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
def test_families_that_transformers_renames_on_writing(trained, tmp_path, family):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
    experts |= {"num_experts_per_tok": 2}
    values = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else sizes | experts
    config = AutoConfig.for_model(family, vocab_size=400, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = load_model(trained[0]["ddp"][0]).tokenizer
    folder = write_folder(LoadedModel(model, tokenizer, family, torch.device("cpu")), tmp_path / "export", MARK)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_evaluation_on_two_ranks_is_that_on_one(trained, ranks):
    home = trained[0]["zero3"][0]
    alone = evaluate(home)
    for together in ranks(evaluate_here, str(home)):
        assert together.loss == pytest.approx(alone.loss, rel=1e-6)
        assert all(together.metrics[name] == alone.metrics[name] for name in ("targets", "accuracy"))
