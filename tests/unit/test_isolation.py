"""Documents packed into one row do not read each other, in the loss and in the gradient."""

import itertools

import pytest
import torch
from transformers import AutoConfig

from bigtrain.config.schema import ModelConfig
from bigtrain.data.batches import Batch
from bigtrain.data.types import IGNORE
from bigtrain.errors import ConfigError
from bigtrain.models.architecture import empty_model
from bigtrain.models.families import FAMILIES as TABLE
from bigtrain.models.trial import try_architecture
from bigtrain.parallel.micro_batches import CU_SEQLENS, micro_batches
from bigtrain.parallel.task_module import TaskModule
from bigtrain.tasks.pretrain import Pretrain

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
# What else a small model of a family needs; no dropout, or a packed row would differ from its documents by chance.
MORE = {
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
WHERE_KNOWN = {
    "head_dim": 8,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
FAMILIES = sorted(name for name, family in TABLE.items() if family.document_mask)
WITH_FLEX = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2"]  # each takes seconds to compile
BORDER, LENGTH = 11, 24


def small_values(family):
    """Of a small configuration with layers of every kind that the family has."""
    default = AutoConfig.for_model(family).to_dict()
    values = {key: value for key, value in (SMALL | WHERE_KNOWN).items() if key in default}
    if kinds := sorted(set(default.get("layer_types") or ())):
        values["layer_types"] = (kinds * 2)[:2]
    return values | MORE.get(family, {})


def small(family):
    return AutoConfig.for_model(family, **small_values(family))


def module(family, attention, checkpointing):
    try:
        model = empty_model(small(family), attention=attention, activation_checkpointing=checkpointing)
    except ValueError as error:
        assert "does not support" in str(error)
        pytest.skip(f"transformers has no {attention} attention for {family}, and refuses it")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return TaskModule(model, Pretrain(), torch.device("cpu"))


def first_supported(family):
    return module(family, "eager" if family == "gemma2" else "sdpa", "none")


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
    embedding = task_module.model.get_input_embeddings().weight
    rows = batch["input_ids"][0, BORDER:].unique()  # of the embedding: only those that the second document uses
    gradients = {
        name: p.grad[rows] if p is embedding else p.grad
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


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *itertools.product(FAMILIES, ["sdpa", "eager"]),
        *(pytest.param(family, "flex", marks=pytest.mark.soak) for family in WITH_FLEX),
    ],
)
@torch.no_grad()
def test_packed_logits_are_those_of_the_document_alone(family, attention):
    task_module = module(family, attention, "none").eval()
    batch = row(first_document=1)
    packed = task_module.model(**task_module.task.inputs(batch)).logits[:, BORDER:]
    alone = task_module.model(input_ids=batch["input_ids"][:, BORDER:], use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attentions_single_row_is_the_same(family):
    """All rows of a micro-batch laid end to end and told apart by their documents' borders, here not read by it."""
    task_module = first_supported(family)
    tensors = {key: torch.cat([row(1)[key], row(2)[key]]) for key in row(1)}
    (micro,) = micro_batches(Batch(tensors, 2, 0), 2, 1)
    (with_cu_seqlens,) = micro_batches(Batch(tensors, 2, 0), 2, 1, cu_seqlens=True)
    assert with_cu_seqlens[CU_SEQLENS].tolist() == [0, BORDER, LENGTH, LENGTH + BORDER, 2 * LENGTH]
    assert with_cu_seqlens[CU_SEQLENS].dtype == torch.int32
    expected, got = task_module(micro), task_module(with_cu_seqlens)
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
        (micro,) = micro_batches(Batch(row(first), 1, 0), 1, 1, cu_seqlens=attention == "flash")
        losses.append(loss_and_gradient(task_module, {key: tensor.cuda() for key, tensor in micro.items()})[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_look_would_see_a_leak():
    """Without restarting positions the first document does change the second: the check above can fail."""
    task_module = first_supported("llama")
    first, second = row(1), row(2)
    for batch in (first, second):
        batch["position_ids"] = torch.arange(LENGTH)[None]
    assert abs(task_module(first)["loss"] - task_module(second)["loss"]) > 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, "mamba is not shown to keep the documents of a sequence apart"),
        ({"model_type": "rwkv"}, "rwkv is not shown"),
        ({"model_type": "qwen3_next"}, "qwen3_next is not shown.*linear_attention"),
        ({"model_type": "lfm2"}, "lfm2 is not shown.*conv"),
        ({"model_type": "gpt_oss"}, "gpt_oss is not shown.*none of those"),  # its masks do not look at positions
        ({"model_type": "falcon"}, "falcon is not shown.*none of those"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"], "num_hidden_layers": 1}, "kind linear_attention"),
    ],
)
def test_families_that_are_not_proven_are_refused(values, message):
    with pytest.raises(ConfigError, match=f"{message}(.|\n)*cross_document_attention: true"):
        try_architecture(ModelConfig(from_config=values), 61, attention="sdpa", needs_document_mask=True)


@pytest.mark.parametrize("family", ["falcon", "rwkv"])
def test_they_may_be_used_where_cross_document_attention(family):
    attention = "eager" if family == "rwkv" else "sdpa"
    values = {"model_type": family, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "rwkv":
        del values["num_attention_heads"]
    assert (
        try_architecture(ModelConfig(from_config=values), 61, attention=attention, needs_document_mask=False)
        is not None
    )
