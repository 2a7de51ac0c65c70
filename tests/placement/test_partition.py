"""Which dim of the stream becomes the axis, and what runs before the loop."""

import pytest
import torch
from looping import Call, aten_graph, placeholders, values

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.partition import partition
from mst_fx.placement.placement import Split


def axis_of(function, *shapes):
    module = aten_graph(Call(function, [values(*shape) for shape in shapes]))
    return partition(module, placeholders(module)[0]).axis


def mlp(x, up, down):
    return (x @ up).tanh() @ down


def channels_first(x, up, down):
    return down @ (up @ x).tanh()


@pytest.mark.parametrize(
    ("function", "shapes", "axis"),
    [
        (mlp, [(2, 5, 8), (8, 16), (16, 8)], Split(1)),
        (mlp, [(5, 8), (8, 16), (16, 8)], Split(0)),
        (mlp, [(6, 5, 8), (8, 16), (16, 8)], Split(0)),
        (channels_first, [(1, 8, 5), (16, 8), (8, 16)], Split(2)),
        (channels_first, [(3, 8, 5), (16, 8), (8, 16)], Split(2)),
        (channels_first, [(6, 8, 5), (16, 8), (8, 16)], Split(0)),
        (lambda x: x.tanh().square().sum(), [(3, 64)], Split(0)),  # which dim holds features, nobody says: the last one
        (lambda x, w: (x.sum(0) @ w).tanh(), [(9, 5, 3), (3, 100)], Split(1)),  # along the first, nothing is made apart
    ],
)
def test_the_longest_dim_that_saves_is_the_axis(function, shapes, axis):
    assert axis_of(function, *shapes) == axis


def test_one_row_has_nothing_to_split():
    with pytest.raises(Refusal) as refused:
        axis_of(mlp, (1, 8), (8, 16), (16, 8))
    assert refused.value.reason is Reason.SHAPE


def test_features_alone_cannot_be_split():
    with pytest.raises(Refusal) as refused:
        axis_of(lambda x, w: torch.cumsum(x, 0) @ w, (4, 8), (8, 16))
    assert "cumsum" in refused.value.text


def test_a_seed_is_drawn_before_the_loop():
    x = torch.ones(6, 5, dtype=torch.float64)
    module = aten_graph(Call(lambda x: x + torch.randint(0, 9, ()), [x]))
    stages = partition(module, placeholders(module)[0])
    assert [node.target for node in stages.prologue] == [torch.ops.aten.randint.low]
