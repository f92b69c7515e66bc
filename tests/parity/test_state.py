"""The state moves between engines and world sizes, and training goes on as if nothing had happened."""

import pytest
import torch

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
