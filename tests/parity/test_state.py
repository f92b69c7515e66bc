"""The state moves between engines and world sizes, and training goes on as if nothing had happened."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from bigtrain.checkpoint import Checkpoint, Retention, complete, save
from bigtrain.models.architecture import empty_model
from bigtrain.models.weights import pretrained_weights
from tests.parity import cases

TOUR = [("zero3", 3), ("fsdp", 2), ("ddp", 1), ("zero2", 2), ("fsdp", 4), ("ddp", 3), ("zero1", 3), ("zero3", 2)]
STEPS = 2  # on each layout


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.soak)])
def test_the_state_goes_from_engine_to_engine(pools, tmp_path, precision):
    total = STEPS * len(TOUR)
    uninterrupted, _, _ = pools(1)(cases.trained, "ddp", total, micro=1, precision=precision)[0]
    losses, before = [], None
    for i, (layout, size) in enumerate(TOUR):
        answers = pools(size)(cases.segment, layout, tmp_path, i * STEPS, STEPS, precision=precision)
        loaded, here, _, after = answers[0]
        if before is not None:
            assert set(loaded) == set(before)
            assert {slot for _, slot in loaded} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
            for key, tensor in before.items():
                assert torch.equal(loaded[key], tensor), key
        losses += here
        before = after
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    assert losses == pytest.approx(uninterrupted, rel=tolerance)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        *((layout, "fp32") for layout in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        *((layout, "bf16") for layout in ("fsdp", "zero2")),
        *(pytest.param(layout, "bf16", marks=pytest.mark.soak) for layout in ("ddp", "zero1", "zero3")),
    ],
)
def test_resuming_on_the_same_layout_is_exact(pools, tmp_path, layout, precision):
    """Losses, gradient norms and the final state are equal to the last bit."""
    losses, norms, state = pools(2)(cases.trained, layout, 6, micro=1, precision=precision)[0]
    _, first, first_norms, _ = pools(2)(cases.segment, layout, tmp_path, 0, 3, precision=precision)[0]
    _, second, second_norms, resumed = pools(2)(cases.segment, layout, tmp_path, 3, 3, precision=precision)[0]
    assert first + second == losses
    assert first_norms + second_norms == norms
    for key, tensor in state.items():
        assert torch.equal(resumed[key], tensor), key


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_moving_average_is_that_of_the_weights(pools, tmp_path, layout):
    """Also over a resume: each segment begins from the one before."""
    states = [pools(2)(cases.segment, layout, tmp_path, step, 1)[0][3] for step in range(3)]
    for name in {name for name, _ in states[0]}:
        expected = states[0][name, "weight"]
        for state in states:
            expected = torch.lerp(expected, state[name, "weight"], 1 - cases.OPTIMIZER.ema)
            assert torch.allclose(state[name, "ema"], expected, rtol=1e-6, atol=1e-7)


def test_no_rank_holds_the_whole_state(pools, tmp_path):
    """Of a sharded layout each rank writes its share: no file of the checkpoint is much larger than another."""
    pools(3)(cases.segment, "zero3", tmp_path, 0, 1)
    sizes = [file.stat().st_size for file in tmp_path.glob("step-*/weights-*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_all_ranks_know_what_is_not_finite(pools, layout):
    one, other = pools(2)(cases.not_finite, layout)
    assert one == other
    fine, poisoned, exploded = one
    assert fine == []
    assert len(poisoned) == 1
    assert poisoned[0].startswith("exp_avg_sq of ")
    assert len({name.rpartition(" of ")[2] for name in exploded}) > 15


BUFFER = "model.layers.1.mlp.gate.e_score_correction_bias"
GLM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": cases.VOCABULARY,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "initializer_range": 0.3,
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture(scope="module")
def buffered(tmp_path_factory):
    """A pretrained mixture of experts whose router has a buffer; (its folder, that buffer, its loss with it and with
    zeros in its place)."""
    folder = tmp_path_factory.mktemp("buffered")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **GLM)).eval()
    batch = cases.global_batch(0)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    buffer, losses = dict(model.named_buffers())[BUFFER], []
    for values in (torch.zeros(4), torch.tensor([2.0, -1.0, 0.0, 1.0])):
        buffer.copy_(values)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        losses.append(functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum"))
    model.save_pretrained(folder)
    return folder, buffer, losses[1].item(), losses[0].item()


def read_and_written(layout, source, folder):
    """(the buffers of the state, the loss) with the pretrained weights, and with those of a checkpoint of them."""
    config = AutoConfig.from_pretrained(source)
    build_model = partial(empty_model, config, attention="sdpa", activation_checkpointing="none")
    reader = pretrained_weights(str(source), build_model(meta=True), 0, folder / "written", lambda _: None)
    answers = []
    for _ in range(2):
        engine = cases.make(layout, build_model=build_model, reader=reader)
        loss = engine.evaluate([cases.share(0)])["loss"].item()
        state = cases.collect(engine)
        answers.append(({name: tensor for (name, slot), tensor in state.items() if slot == "buffer"}, loss))
        save(folder, 1, engine.boxes(), engine.progress(), Retention(keep=1))
        engine.close()
        dist.barrier()  # rank 0 completes the checkpoint
        reader = Checkpoint(complete(folder)[-1])
    return answers


@pytest.mark.parametrize(("layout", "size"), [("ddp", 1), ("fsdp", 2), ("zero2", 2), ("zero3", 2)])
def test_buffers_come_from_pretrained_files_and_go_through_checkpoints(pools, tmp_path, buffered, layout, size):
    """The model computes with them on every rank."""
    folder, buffer, expected, without = buffered
    assert abs(expected / without - 1) > 1e-4
    for answers in pools(size)(read_and_written, layout, folder, tmp_path):
        for buffers, loss in answers:
            assert buffers.keys() == {BUFFER}
            assert torch.equal(buffers[BUFFER], buffer)
            assert loss == pytest.approx(expected, rel=1e-5)
