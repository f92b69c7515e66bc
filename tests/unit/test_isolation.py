"""Documents packed into one row do not read each other, in the loss and in the gradient."""

import pytest
import torch
from transformers import AutoConfig

from bigtrain.data.batches import IGNORE, Batch
from bigtrain.models.causal_lm import empty_model
from bigtrain.models.weights import RandomWeights
from bigtrain.parallel import contract
from bigtrain.parallel.contract import TaskModule
from bigtrain.tasks.causal_lm import CausalLM

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "mistral": SMALL | {"sliding_window": 8},
    "gemma3_text": SMALL | {"head_dim": 8, "sliding_window": 8},
    "phi3": SMALL,
    "olmo2": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1}
    | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
BORDER, LENGTH = 11, 24


def module(family, attention, checkpointing):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    options = {"attention": attention, "activation_checkpointing": checkpointing}
    model, reader = empty_model(config, **options), RandomWeights(empty_model(config, meta=True, **options), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, "weight", (0,) * parameter.dim(), tuple(parameter.shape)))
    return TaskModule(model, CausalLM())


def row(first_document):
    """Two documents in one row; only the second one is trained on."""
    generator = torch.Generator().manual_seed(first_document)
    fixed = torch.Generator().manual_seed(99)
    tokens = torch.cat(
        [
            torch.randint(3, 61, (1, BORDER), generator=generator),
            torch.randint(3, 61, (1, LENGTH - BORDER), generator=fixed),
        ],
        dim=1,
    )
    targets = torch.randint(3, 61, (1, LENGTH), generator=fixed)
    targets[:, :BORDER] = IGNORE
    positions = torch.cat([torch.arange(BORDER), torch.arange(LENGTH - BORDER)])[None]
    return {"input_ids": tokens, "targets": targets, "position_ids": positions}


def loss_and_gradient(task_module, batch):
    task_module.zero_grad()
    loss = task_module(batch)["loss"]
    loss.backward()
    rows = batch["input_ids"][0, BORDER:].unique()  # of the embedding: only those that the second document uses
    gradients = {
        name: p.grad[rows] if "embed_tokens" in name or "wte" in name else p.grad
        for name, p in task_module.named_parameters()
        if p.grad is not None
    }
    return loss.item(), {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_document_changes_nothing_of_the_second(family, attention, checkpointing):
    task_module = module(family, attention, checkpointing)
    loss, gradient = loss_and_gradient(task_module, row(first_document=1))
    other_loss, other_gradient = loss_and_gradient(task_module, row(first_document=2))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, expected in gradient.items():
        torch.testing.assert_close(other_gradient[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_logits_are_those_of_the_document_alone(family, attention):
    if (family, attention) == ("gpt2", "flex"):
        pytest.skip("transformers has no flex attention for gpt2, and refuses it")
    task_module = module(family, attention, "none").eval()
    batch = row(first_document=1)
    packed = task_module.model(**task_module.task.inputs(batch)).logits[:, BORDER:]
    alone = task_module.model(input_ids=batch["input_ids"][:, BORDER:], use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attentions_single_row_is_the_same(family):
    """All rows of a micro-batch laid end to end and told apart by their documents' borders, here read by sdpa."""
    task_module = module(family, "sdpa", "none")
    tensors = {key: torch.cat([row(1)[key], row(2)[key]]) for key in row(1)}
    (micro,) = contract.micro_batches(Batch(tensors, 2, 0), 2, 1)
    (with_borders,) = contract.micro_batches(Batch(tensors, 2, 0), 2, 1, borders=True)
    assert with_borders[contract.BORDERS].tolist() == [0, BORDER, LENGTH, LENGTH + BORDER, 2 * LENGTH]
    assert with_borders[contract.BORDERS].dtype == torch.int32
    expected, got = task_module(micro), task_module(with_borders)
    assert got["targets"] == expected["targets"]
    assert got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash and flex attention train on GPUs only")
@pytest.mark.parametrize("attention", ["flash", "flex"])
@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_on_a_gpu(family, attention):
    if attention == "flash":
        pytest.importorskip("flash_attn")
    task_module = module(family, attention, "none").to("cuda", torch.bfloat16)
    losses = []
    for first in (1, 2):
        (micro,) = contract.micro_batches(Batch(row(first), 1, 0), 1, 1, borders=attention == "flash")
        losses.append(loss_and_gradient(task_module, {key: tensor.cuda() for key, tensor in micro.items()})[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_look_would_see_a_leak():
    """Without restarting positions the first document does change the second: the check above can fail."""
    task_module = module("llama", "sdpa", "none")
    first, second = row(1), row(2)
    for batch in (first, second):
        batch["position_ids"] = torch.arange(LENGTH)[None]
    assert abs(task_module(first)["loss"] - task_module(second)["loss"]) > 1e-4
