"""A checkpoint of Hugging Face's Trainer or of DeepSpeed is continued: its weights, moments and step, bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from bigtrain.checkpoint import Checkpoint
from bigtrain.cli import app
from bigtrain.data.batches import Batch
from bigtrain.errors import BigtrainError
from bigtrain.models.architecture import empty_model
from bigtrain.optim.adamw import AdamW
from bigtrain.parallel import build_engine
from bigtrain.parallel.dims import ParallelDims
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.testing import Ranks
from tests.support import MODEL, bigtrain, small_config

VOCABULARY = 400
STEPS = 5  # that the other program has done
LR, EPS, BETAS, DECAY = 3e-3, 1e-4, (0.9, 0.95), 0.1
CONFIG = LlamaConfig(**{k: v for k, v in MODEL.items() if k != "model_type"}, vocab_size=VOCABULARY)


def tokens(seed, rows=5):
    return torch.randint(0, VOCABULARY, (rows, 64), generator=torch.Generator().manual_seed(seed))


def fresh_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG)


def train_with_trainer(folder):
    """`STEPS` steps by transformers' own Trainer; returns its checkpoint."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=DECAY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, rows=20)]
    Trainer(fresh_model(), arguments, train_dataset=rows).train()
    return folder / f"checkpoint-{STEPS}"


def train_with_deepspeed(folder, stage):
    """The same by DeepSpeed, by each of its ranks. Parameters are those of a module around the model."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    model = fresh_model()
    around = torch.nn.ModuleDict({"module": model})
    around.forward = lambda ids: model(input_ids=ids, labels=ids).loss
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(around.parameters(), lr=LR, eps=EPS, betas=BETAS, weight_decay=DECAY)
    engine, *_ = deepspeed.initialize(model=around, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        engine.backward(engine(tokens(step, rows=2)[dist.get_rank()][None]))
        engine.step()
    read = {
        "weight": deepspeed.utils.safe_get_full_fp32_param,
        "exp_avg": lambda p: deepspeed.utils.safe_get_full_optimizer_state(p, "exp_avg"),
        "exp_avg_sq": lambda p: deepspeed.utils.safe_get_full_optimizer_state(p, "exp_avg_sq"),
    }
    masters = {
        name.removeprefix("module."): {slot: get(parameter).clone() for slot, get in read.items()}
        for name, parameter in around.named_parameters()
    }
    engine.save_checkpoint(str(folder))
    engine.destroy()
    return masters


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return train_with_trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def zeros(tmp_path_factory):
    """stage -> (folder of the checkpoint as its ranks wrote it, its state)."""
    made = {}
    with Ranks(2) as ranks:
        for stage in (2, 3):
            folder = tmp_path_factory.mktemp(f"zero{stage}")
            made[stage] = folder, ranks(train_with_deepspeed, folder, stage)[0]
    return made


def one_stage(folder, **changes):
    """A run's file of one stage, in one process, with the numbers that the other programs had."""
    path = small_config(folder, steps=STEPS + 2)
    config = yaml.safe_load(path.read_text())
    stage = config["stages"][0] | {"schedule": {"name": "constant"}, **changes.pop("stage", {})}
    stage["optimizer"] = {"lr": LR, "eps": EPS, "betas": list(BETAS), "weight_decay": DECAY, "max_grad_norm": None}
    config["model"]["from_config"] = MODEL | {"vocab_size": VOCABULARY} | changes.pop("model", {})
    config["parallel"] = {"engine": "ddp", "processes": 1, "device": "cpu"}
    path.write_text(yaml.safe_dump(config | {"stages": [stage], **changes}, sort_keys=False))
    return path


def imported(checkpoint):
    """name -> slot -> tensor of a bigtrain checkpoint."""
    reader = Checkpoint(checkpoint)
    shapes = {name: tuple(p.shape) for name, p in fresh_model().named_parameters()}
    reader.check_fit(fresh_model())
    assert all(reader.slots_of(name) == ["exp_avg", "exp_avg_sq", "weight"] for name in shapes)
    state = {
        n: {s: reader.read(n, s, (0,) * len(shape), shape) for s in reader.slots_of(n)} for n, shape in shapes.items()
    }
    reader.close()
    return state


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, slots in expected.items():
        for slot, tensor in slots.items():
            assert torch.equal(found[name][slot], tensor), (name, slot)


def engine_step(checkpoint, batch):
    """(loss, parameters) after one step by bigtrain's engine from a checkpoint, on one rank."""
    engine = build_engine(
        "ddp",
        lambda meta: empty_model(CONFIG, attention="sdpa", activation_checkpointing="none", meta=meta),
        Pretrain(),
        dims=ParallelDims(rank=0, replicate=1),
        precision="fp32",
        compile=False,
        micro_batch_size=5,
        optimizer=AdamW(lr=LR, eps=EPS, betas=list(BETAS), weight_decay=DECAY, max_grad_norm=None),
        seed=0,
        device=torch.device("cpu"),
    )
    reader = Checkpoint(checkpoint)
    engine.load(reader, reader.progress)
    outcome = engine.step(batch, LR)
    weights = {box.name: box.tensor.clone() for box in engine.boxes() if box.slot == "weight"}
    engine.close()
    return outcome.loss.item(), weights


def plain_step(model, optimizer, batch):
    """The same by torch alone."""
    logits = model(input_ids=batch.tensors["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.tensors["targets"].flatten())
    loss.backward()
    optimizer.step()
    return loss.item(), {name: parameter.detach() for name, parameter in model.named_parameters()}


def plain_optimizer(model):
    """AdamW with the Trainer's groups, for a Llama."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY}]
    groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=LR, eps=EPS, betas=BETAS)


def a_batch():
    ids = tokens(99)
    targets = torch.cat([ids[:, 1:], torch.full((5, 1), -100)], 1)
    return Batch({"input_ids": ids, "targets": targets, "position_ids": torch.arange(64).expand(5, 64)}, 5, STEPS)


def assert_steps_alike(checkpoint, model, optimizer):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loss, weights = engine_step(checkpoint, a_batch())
    finally:
        dist.destroy_process_group()
    expected_loss, expected = plain_step(model, optimizer, a_batch())
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


def take(config, folder, *options):
    """`bigtrain import` in this process: (exit code, what it says)."""
    result = CliRunner().invoke(app, ["import", str(config), str(folder), *options])
    if isinstance(result.exception, BigtrainError):
        return result.exception.exit_code, str(result.exception)
    if result.exception is not None:
        raise result.exception
    return result.exit_code, result.output


def below(folder):
    return sorted(folder.rglob("*"))


def test_a_trainers_checkpoint_is_continued(trainers, tmp_path):
    config = one_stage(tmp_path)
    run = tmp_path / "runs" / "small"
    done = bigtrain("import", config, trainers)
    assert done.returncode == 0, done.stderr
    assert f"after step {STEPS}: weights and Adam's moments of 20 parameters" in done.stdout
    assert f"Not carried over: from step {STEPS + 1} on the order of samples" in done.stdout
    checkpoint = run / "pretrain" / "checkpoints" / f"step-{STEPS:08d}"

    model = AutoModelForCausalLM.from_pretrained(trainers, dtype=torch.float32)
    optimizer = plain_optimizer(model)
    optimizer.load_state_dict(torch.load(trainers / "optimizer.pt", weights_only=True))
    moments = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    weights = load_file(trainers / "model.safetensors")
    slots = ("exp_avg", "exp_avg_sq")
    assert_same(
        imported(checkpoint), {n: {"weight": w} | {s: moments[n][s] for s in slots} for n, w in weights.items()}
    )
    assert Checkpoint(checkpoint).progress == {"updates": STEPS}
    assert_steps_alike(checkpoint, model, optimizer)

    finished = bigtrain("run", config)
    assert finished.returncode == 0, finished.stderr
    assert f"from {trainers} · 5 x 64 tokens a step, {STEPS + 2} steps, resumed at step {STEPS}" in finished.stdout
    assert f"from {trainers}, task pretrain" in finished.stdout  # the summary
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [STEPS + 1, STEPS + 2]
    metadata = json.loads((run / "run.json").read_text())
    assert metadata["attempts"][0]["imported"] == metadata["stages"]["pretrain"]["from"] == str(trainers)
    assert metadata["stages"]["pretrain"]["finished"]
    assert Checkpoint(run / "pretrain" / "checkpoints" / f"step-{STEPS + 2:08d}").progress == {"updates": STEPS + 2}

    before = below(run)
    code, told = take(config, trainers)
    assert code == 2
    assert "stage pretrain of" in told
    assert "has begun already" in told
    assert below(run) == before


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_a_deepspeed_checkpoint_is_continued(zeros, tmp_path, stage):
    folder, expected = zeros[stage]
    config = one_stage(tmp_path)
    code, told = take(config, folder)
    assert code == 2
    assert not (tmp_path / "runs").exists()
    command = told.split("`")[1].split()  # the conversion that the refusal gives
    assert command[:3] == ["python", "-m", "deepspeed.checkpoint.ds_to_universal"]
    converted = subprocess.run(
        [sys.executable, *command[1:]], capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert converted.returncode == 0, converted.stderr

    code, told = take(config, folder)  # its latest_universal
    assert code == 0, told
    assert f"a universal checkpoint of DeepSpeed after step {STEPS}" in told
    checkpoint = tmp_path / "runs" / "small" / "pretrain" / "checkpoints" / f"step-{STEPS:08d}"
    assert_same(imported(checkpoint), expected)
    assert Checkpoint(checkpoint).progress == {"updates": STEPS}

    model = fresh_model()
    optimizer = plain_optimizer(model)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(expected[name]["weight"])
        moments = {slot: expected[name][slot].clone() for slot in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(STEPS)), **moments}
    assert_steps_alike(checkpoint, model, optimizer)


def test_half_precision_and_shards_become_whole_fp32_weights(trainers, tmp_path):
    copy = shutil.copytree(trainers, tmp_path / "checkpoint-5")
    (copy / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(trainers, dtype=torch.bfloat16)
    model.save_pretrained(copy, max_shard_size="30KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    code, told = take(one_stage(tmp_path), copy)
    assert code == 0, told
    state = imported(tmp_path / "runs" / "small" / "pretrain" / "checkpoints" / f"step-{STEPS:08d}")
    assert_same(state, {name: {"weight": p.detach().float()} for name, p in model.named_parameters()})


def test_an_import_that_is_gone_is_not_replaced_by_random_weights(trainers, tmp_path):
    config = one_stage(tmp_path)
    assert take(config, trainers)[0] == 0
    shutil.rmtree(tmp_path / "runs" / "small" / "pretrain" / "checkpoints")
    refused = bigtrain("run", config)
    assert refused.returncode == 1
    assert f"stage pretrain goes on from {trainers}, but" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert take(config, trainers)[0] == 0


def without(name):
    return lambda folder: (folder / name).unlink()


def rewrite_optimizer(change):
    def apply(folder):
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        change(saved)
        torch.save(saved, folder / "optimizer.pt")

    return apply


def swap_groups(saved):
    saved["param_groups"].reverse()


def swap_two(saved):
    numbers = saved["param_groups"][0]["params"]
    numbers[0], numbers[1] = numbers[1], numbers[0]


def forget_a_moment(saved):
    for slots in saved["state"].values():
        del slots["exp_avg_sq"]


def put_code(saved):
    saved["hook"] = print


WRONG = {
    "no optimizer": (2, without("optimizer.pt"), {}, "model.from_pretrained: "),
    "no checkpoint": (2, without("model.safetensors"), {}, "is neither a checkpoint of a Hugging Face Trainer"),
    "no state": (2, without("trainer_state.json"), {}, "has no trainer_state.json"),
    "a torn state": (1, lambda f: (f / "trainer_state.json").write_text("{"), {}, "at which step it was written"),
    "a torn optimizer": (1, lambda f: (f / "optimizer.pt").write_bytes(b"no"), {}, "optimizer.pt cannot be read"),
    "code in it": (1, rewrite_optimizer(put_code), {}, "cannot be read as tensors alone"),
    "groups swapped": (1, rewrite_optimizer(swap_groups), {}, "has groups of [5, 15] parameters"),
    "order changed": (1, rewrite_optimizer(swap_two), {}, "(exp_avg) does not fit the model of its run; of another"),
    "another optimizer": (1, rewrite_optimizer(forget_a_moment), {}, "keeps exp_avg, step of model.embed_tokens"),
    "other shapes": (1, None, {"model": {"intermediate_size": 96}}, "of another shape: model.layers.0.mlp.down_proj"),
    "untied": (1, None, {"model": {"tie_word_embeddings": False}}, "missing: lm_head.weight"),
    "other heads": (1, None, {"model": {"rms_norm_eps": 1e-3}}, "rms_norm_eps: 1e-06 there, 0.001 here"),
    "too short": (2, None, {"stage": {"steps": STEPS}}, f"has done {STEPS} steps, and the stage has {STEPS}"),
}


def test_a_stage_that_is_not_there_is_refused(trainers, tmp_path):
    code, told = take(one_stage(tmp_path), trainers, "--stage", "nothing")
    assert code == 2
    assert "--stage nothing: there is no such stage" in told


def test_a_checkpoint_may_be_the_model_that_the_file_names(trainers, tmp_path):
    config = one_stage(tmp_path, attention="eager")
    values = yaml.safe_load(config.read_text()) | {"model": {"from_pretrained": str(trainers)}}
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    assert take(config, trainers)[0] == 0


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_continued_is_refused_in_a_sentence(trainers, tmp_path, case):
    code, spoil, changes, said = WRONG[case]
    copy = shutil.copytree(trainers, tmp_path / "checkpoint-5")
    if spoil is not None:
        spoil(copy)
    config = one_stage(tmp_path, **changes)
    before = below(tmp_path)
    found, told = take(config, copy)
    assert (found, said in told) == (code, True), told
    assert below(tmp_path) == before


def test_a_universal_checkpoint_of_another_model_is_refused(tmp_path):
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        for file, value in {"fp32": torch.ones(3), "exp_avg": torch.ones(3)}.items():
            path = tmp_path / "global_step7_universal" / "zero" / name / f"{file}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"param": value}, path)
    config = one_stage(tmp_path, stage={"steps": 20})
    code, told = take(config, tmp_path / "global_step7_universal")
    assert code == 1
    assert "missing: model.layers.0.input_layernorm.weight" in told
    assert "of another shape: model.embed_tokens.weight (3,) for (400, 32)" in told
    assert not (tmp_path / "runs").exists()
