"""The model of time: flops are counted from the graph, and a loop never costs less than nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictions import Sizes, cross_entropy, experts, gelu, inputs_of, log_probabilities, offer, swiglu

from mst_fx.predict.time import EFFICIENCY, H100, Device, RegionCost, device_of, efficiency

S = Sizes(t=512, d=64, ff=256, v=1024)
MLP, HEAD = 2 * S.t * S.d * S.ff, 2 * S.t * S.d * S.v


@pytest.mark.parametrize(
    ("program", "flops", "recomputed"),
    [
        (swiglu, 3 * MLP, 2 * MLP),  # the down-projection is not needed again
        (gelu, 2 * MLP, MLP),
        (log_probabilities, HEAD, HEAD),
        (cross_entropy, HEAD, 0),  # gradients come in the forward
    ],
)
def test_flops(program, flops, recomputed):
    torch._dynamo.reset()
    cost = offer(program, inputs_of(program, S, torch.float32, "cpu")).cost
    assert (cost.flops, cost.recomputed) == (flops, recomputed)


def test_sums_are_read_and_written_once_where_products_add_to_them():
    """A gradient that is made before it is added is written and read besides."""
    sizes = Sizes(t=512, d=64, ff=256, v=16)
    costs = [offer(fn, inputs_of(fn, sizes, torch.bfloat16, "meta")).cost for fn in (experts, gelu)]
    matrices, products, bias = 3 * sizes.v * sizes.d * sizes.ff, 2 * sizes.d * sizes.ff, sizes.ff
    assert [cost.bytes_summed for cost in costs] == [2 * 4 * matrices, 2 * 4 * (products + bias) + 2 * 2 * bias]


def test_efficiency_is_the_table_and_between_its_rows_in_proportion():
    for rows, share in EFFICIENCY:
        assert efficiency(rows) == share
    assert efficiency(96) == pytest.approx((efficiency(64) + efficiency(128)) / 2)
    assert efficiency(10**6) == 1.0


costs = st.builds(
    RegionCost,
    flops=st.floats(1e6, 1e15),
    recomputed=st.floats(0, 1e15),
    rows=st.floats(0.01, 8),
    bytes_summed=st.integers(0, 2**34),
    half=st.booleans(),
)


@given(costs, st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 2**17), st.booleans())
def test_shorter_chunks_cost_more(cost, short, longer, length, repeated):
    device = Device("cuda", 2**36, 7e11, 4e9)
    chunks = [min(short, length), min(short + longer, length)]
    times = [cost.added_ms(device, chunk, length, repeated=repeated) for chunk in chunks]
    assert times[0] >= times[1] - 1e-9 * times[1]
    assert times[1] >= -1e-9


def test_what_is_repeated_anyway_is_not_counted():
    cost = RegionCost(flops=3e12, recomputed=2e12, rows=1.0, bytes_summed=0, half=True)
    device = Device("cuda", 2**36, 7e11, 4e9)
    once, again = (cost.added_ms(device, 4096, 4096, repeated=repeated) for repeated in (True, False))
    assert once == 0
    assert again == pytest.approx(2e12 / 7e11)


def test_a_cpu_has_memory_and_rates():
    device = device_of(torch.device("cpu"))
    assert device.kind == "cpu"
    assert min(device.memory, device.flops_per_ms, device.bytes_per_ms) > 0


def test_shapes_alone_are_for_a_gpu():
    """That of the machine, where it has one."""
    assert device_of(torch.device("meta")) == (device_of(torch.device("cuda")) if torch.cuda.is_available() else H100)
