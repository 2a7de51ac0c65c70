"""Values made from a shape: whole by themselves, made in parts for a user that needs parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, placed, values
from strategies import broadcasts, chunk_by_chunk, shapes

from mst_fx.placement.placement import WHOLE, Split

aten = torch.ops.aten

# op(x, sizes): a value of these sizes
FILLS = (
    lambda x, sizes: aten.full.default(sizes, 2.0, dtype=x.dtype),
    lambda x, sizes: aten.zeros.default(sizes, dtype=x.dtype),
    lambda x, sizes: aten.ones.default(sizes),
    lambda x, sizes: aten.new_zeros.default(x, sizes),
    lambda x, sizes: aten.new_ones.default(x, sizes, dtype=torch.float32),
    lambda x, sizes: aten.new_full.default(x, sizes, 3.0),
    lambda x, sizes: aten.zeros_like.default(aten.new_empty.default(x, sizes)),
    lambda x, sizes: aten.ones_like.default(aten.empty.memory_format(sizes, dtype=x.dtype)),
)
# op(n): a value of n positions
COUNTS = (
    aten.arange.default,
    lambda n: aten.arange.start(1, n + 1),
    lambda n: aten.arange.start_step(0, 2 * n, 2),
)


@st.composite
def calls(draw):
    shape = draw(shapes())
    sizes = draw(broadcasts(shape))
    made, count = draw(st.sampled_from(FILLS)), draw(st.sampled_from(COUNTS))
    inside = draw(
        st.sampled_from(
            [
                lambda x: x + made(x, sizes),
                lambda x: x * made(x, [*sizes, 1]).squeeze(-1).exp(),
                lambda x: x * made(x, sizes).expand(shape),
                lambda x: aten.cat.default([x, made(x, shape)], -1),
                lambda x: aten.maximum.default(x, aten.scalar_tensor.default(0.5, dtype=x.dtype)),
                lambda x: x + count(shape[-1]),
                lambda x: (x + made(x, sizes), made(x, sizes)),
            ]
        )
    )
    return Call(inside, [values(*shape)])


@given(st.data())
def test_chunk_by_chunk(data):
    chunk_by_chunk(data, data.draw(calls()))


@pytest.mark.parametrize("make", FILLS)
def test_a_fill_is_whole_by_itself(make):
    assert placed(Call(lambda x: [x + 1, make(x, [4])], [values(4)]), Split(0)) == [Split(0), WHOLE]


@pytest.mark.parametrize("make", FILLS)
@pytest.mark.parametrize(("sizes", "split"), [([4, 3], Split(0, outer=2)), ([3], Split(1)), ([1, 3], Split(1))])
def test_a_fill_is_made_in_parts(make, sizes, split):
    call = Call(lambda x: [x + part for part in [make(x, sizes)]] + [make(x, sizes) * x], [values(4, 3)])
    assert placed(call, split) == [split, split]


@pytest.mark.parametrize("make", COUNTS)
def test_positions_along_another_dim_are_whole(make):
    assert placed(Call(lambda x: x + make(3), [values(4, 3)]), Split(0)) == [Split(0)]


@pytest.mark.parametrize("make", COUNTS)
def test_positions_along_the_axis_are_made_before_the_loop(make):
    call = Call(lambda x: x + make(3), [values(4, 3)])
    assert placed(call, Split(1)) == [Split(1)]
    assert placed(Call(lambda x: x.view(12) + make(12), [values(4, 3)]), Split(1)) == [Split(0, outer=4)]
