"""Flat ranges become boxes; boxes written by any layout are read back by any other."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.state import flat_range_boxes

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(shapes, st.data())
def test_parts_cover_the_range_in_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    tensor = torch.arange(numel).reshape(shape)
    flat = []
    for part in flat_range_boxes(shape, start, stop):
        box = tensor[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.lengths, strict=True))]
        assert part.start == len(flat)
        flat += box.reshape(-1).tolist()
    assert flat == list(range(start, stop))


@given(shapes, st.data())
def test_few_parts(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    assert len(list(flat_range_boxes(shape, start, stop))) <= max(1, 2 * len(shape) - 1)
