"""The loss is made by chunks of tokens for architectures whose logits are their head's alone."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bigtrain.models.families import FAMILIES, plain_head
from bigtrain.parallel import task_module
from bigtrain.tasks.pretrain import Pretrain
from tests.forked import call

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SMALL_WHERE_KNOWN = {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def small(family, **changes):
    known = set(AutoConfig.for_model(family).to_dict())
    values = SMALL | {key: value for key, value in SMALL_WHERE_KNOWN.items() if key in known}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values, **changes)).eval()


@pytest.mark.parametrize("family", sorted(name for name, known in FAMILIES.items() if known.plain_head))
@torch.no_grad()
def test_logits_are_the_heads_alone(family):
    model = small(family)
    for parameter in model.parameters():  # scales and biases too must be other than one and zero
        parameter.normal_(std=0.3)
    ids = torch.randint(3, 61, (2, 12))
    expected = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(plain_head(model)(hidden), expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),
        ("cohere", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma3_text", {"final_logit_softcapping": 30.0}),
    ],
)
def test_capped_and_scaled_logits_are_made_by_the_model(family, changes):
    assert plain_head(small(family, **changes)) is None


def peaks():
    """(MiB that the loss takes at most in chunks, and how much more whole; the relative difference of gradients)."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=2**17, tie_word_embeddings=True)
    module = task_module.TaskModule(AutoModelForCausalLM.from_config(config), Pretrain(), torch.device("cpu"))
    ids = torch.randint(0, 2**17, (1, 1024))
    batch = {"input_ids": ids, "targets": ids, "position_ids": torch.arange(1024)[None]}
    assert task_module.LOGITS_AT_ONCE == 2**26  # half of these logits

    def peak():
        # not getrusage, which begins with what the parent had
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024

    def gradient(at_once):
        task_module.LOGITS_AT_ONCE = at_once
        module.zero_grad()
        module(batch)["loss"].backward()
        return module.model.lm_head.weight.grad.clone()

    Path("/proc/self/clear_refs").write_text("5")
    marks = [peak()]
    chunked = gradient(2**26)
    marks.append(peak())
    whole = gradient(2**40)
    marks.append(peak())
    return marks[1] - marks[0], marks[2] - marks[0], ((chunked - whole).norm() / whole.norm()).item()


def test_a_vocabulary_of_128k_takes_less_memory():
    """1,024 tokens: whole logits are 512 MiB in fp32, several times over in the backward pass."""
    chunked, whole, error = call(peaks)
    assert whole > 1024  # MiB
    assert chunked < 0.7 * whole
    assert error < 1e-5


TOKENS = 512


def head_gradients(family, dtype, chunks, compiled=False, **changes):
    """{name: gradient in fp32} of the parameters of the output head, with the loss made in so many chunks."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | {"vocab_size": 256, "intermediate_size": 64}, **changes)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    module = task_module.TaskModule(model, Pretrain(), torch.device("cpu"))
    if compiled:
        module._token_sums = torch.compile(module._token_sums, fullgraph=True, dynamic=False, backend="aot_eager")
    ids, targets = torch.randint(3, 256, (2, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "targets": targets, "position_ids": torch.arange(TOKENS)[None]}
    with patch.object(task_module, "LOGITS_AT_ONCE", TOKENS * 256 // chunks):
        (module(batch)["loss"] / TOKENS).backward()
    head = [id(parameter) for parameter in plain_head(model).parameters()]
    return {name: p.grad.float() for name, p in model.named_parameters() if id(p) in head}


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [("llama", True, torch.bfloat16), ("phi", False, torch.bfloat16), ("llama", False, torch.float16)],
)
def test_the_error_of_the_heads_gradient_does_not_grow_with_the_chunks(family, tied, dtype):
    """Of its weight and (phi's) its bias. 103 chunks have 5 tokens, the last has 2."""
    right = head_gradients(family, torch.float32, 1, tie_word_embeddings=tied)
    assert len(right) == (2 if family == "phi" else 1)
    cut = [head_gradients(family, dtype, chunks, tie_word_embeddings=tied) for chunks in (1, 8, 64, 103, 512)]
    for name, gradient in right.items():
        whole, *others = (((got[name] - gradient).norm() / gradient.norm()).item() for got in cut)
        assert max(others) < 2 * whole < 0.015


def test_a_head_in_chunks_gives_the_same_gradient_in_fp32():
    right = head_gradients("llama", torch.float32, 1)
    for name, gradient in head_gradients("llama", torch.float32, 64).items():
        assert (gradient - right[name]).norm() < 1e-6 * right[name].norm()


def test_a_compiled_loss_has_the_same_gradient():
    """One graph, whatever compiles it: what C++ makes of it is tests/parity's."""
    plain, compiled = (head_gradients("phi", torch.bfloat16, 8, compiled) for compiled in (False, True))
    for name, gradient in compiled.items():
        assert (gradient - plain[name]).norm() < 5e-3 * plain[name].norm()
