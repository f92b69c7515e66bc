"""The parts of a step add up to it, each moment in one of them; a token's arithmetic is what the model multiplies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bigtrain.bench import PARTS, split
from bigtrain.models.flops import arithmetic, peak_flops


def test_communication_is_what_no_computation_hides():
    found = split(
        [
            ("step", 0, 100),
            ("data", 0, 10),
            ("forward", 20, 40),
            ("backward", 40, 80),
            ("optimizer", 85, 95),
            ("computation", 20, 70),
            ("communication", 60, 75),  # hidden until 70
            ("communication", 65, 82),
            ("communication", 98, 130),  # goes on after the step
            ("", 0, 100),
        ]
    )
    assert found == {"data": 10, "forward": 20, "backward": 30, "communication": 14, "optimizer": 10, "other": 16}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "data", "forward", "backward", "optimizer", "computation", "communication"]),
            st.integers(0, 99),
            st.integers(0, 99),
        )
    ),
    st.lists(st.integers(0, 99), min_size=2, max_size=6, unique=True),
)
def test_parts_add_up_to_the_steps(ranges, borders):
    borders = sorted(borders)
    steps = [("step", begin, end) for begin, end in zip(borders[::2], borders[1::2], strict=False)]
    found = split([*steps, *((kind, min(a, b), max(a, b)) for kind, a, b in ranges)])
    assert set(found) == set(PARTS)
    assert sum(found.values()) == sum(end - begin for _, begin, end in steps)


SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [True, False])
def test_arithmetic_of_a_llama(tied):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=8, tie_word_embeddings=tied))
    layer = 24 * 32 * 2 + 24 * 16 * 2 + 3 * 24 * 40 + 2 * 24
    found = arithmetic(model, 10)
    assert found is not None
    assert found.parameters == 3 * layer + 24 + 50 * 24  # the head, once, whether or not it is the embedding too
    assert found.flops_per_token == 6 * found.parameters + 12 * 3 * 32 * 10


def test_no_figure_where_a_token_does_not_meet_all_parameters():
    assert arithmetic(MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2)), 10) is None


def test_peaks_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
