"""Which dim of the stream becomes the axis, and why none does."""

from __future__ import annotations

import pytest
import torch
from looping import Call, aten_graph, placeholders, values
from symbols import varying
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.axis import choose_axis
from mst_fx.placement.placement import Split
from mst_fx.placement.propagate import Unequal


def chosen(function, *shapes):
    module = aten_graph(Call(function, [values(*shape) for shape in shapes]))
    return choose_axis(module.graph, placeholders(module)[0])


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
        (mlp, [(5, 5, 8), (8, 16), (16, 8)], Split(0)),
        (channels_first, [(1, 8, 5), (16, 8), (8, 16)], Split(2)),
        (channels_first, [(3, 8, 5), (16, 8), (8, 16)], Split(2)),
        (channels_first, [(6, 8, 5), (16, 8), (8, 16)], Split(0)),
        (lambda x: x.tanh().square().sum(), [(3, 64)], Split(0)),  # which dim holds features, nobody says: the last one
        (lambda x, w: (x.sum(0) @ w).tanh(), [(9, 5, 3), (3, 100)], Split(1)),  # along the first, nothing is made apart
    ],
)
def test_the_longest_dim_that_saves_is_the_axis(function, shapes, axis):
    assert chosen(function, *shapes).axis == axis


def test_a_dim_that_a_view_spreads_is_split_by_its_longest_factor():
    def by_heads(x, up):
        return (x @ up).view(2, 7, 16).softmax(-1)

    found = chosen(by_heads, (14, 8), (8, 16))
    assert (found.axis, found.length) == (Split(0, outer=2), 7)


def test_what_is_avoided_are_the_bytes_of_split_values():
    found = chosen(mlp, (1, 5, 8), (8, 16), (16, 8))
    made = 5 * (16 + 16 + 8)  # elements of two products and of an elementwise op: views make nothing
    assert (found.axis, found.length) == (Split(1), 5)
    assert found.avoided == pytest.approx(8 * made * (1 - 1 / 5))


def refusal(function, *shapes):
    with pytest.raises(Refusal) as refused:
        chosen(function, *shapes)
    return refused.value


def test_one_row_has_nothing_to_split():
    assert refusal(mlp, (1, 8), (8, 16), (16, 8)).reason is Reason.SHAPE
    assert refusal(lambda x: x + 1, (1, 1)).text == "a stream of shape [1, 1] has no dim to split"


def test_features_alone_cannot_be_split():
    assert "cumsum" in refusal(lambda x, w: torch.cumsum(x, 0) @ w, (4, 8), (8, 16)).text
    found = refusal(lambda x, w: x.flip(0).exp(), (4, 8), (8, 16))  # the last dim could be split, but has no product
    assert "flip" in found.text


def test_the_reason_is_that_of_the_longest_dim():
    def mixed(x):
        return x.flip(0).cumsum(1).exp()

    for shape, op in (((7, 3, 2), "flip"), ((3, 7, 2), "cumsum")):
        found = refusal(mixed, shape)
        assert (found.reason, op in found.text) == (Reason.AXIS_MIXED, True)


def of_sizes(function, *shapes):
    """The choice where sizes vary: those in quotes, each for itself."""
    shape_env = ShapeEnv()
    fake_mode, dispatcher = FakeTensorMode(shape_env=shape_env), enable_python_dispatcher()
    with fake_mode, dispatcher, shape_env.suppress_guards(), torch.no_grad():
        sizes = [[varying(shape_env, int(n)) if isinstance(n, str) else n for n in shape] for shape in shapes]
        operands = [torch.zeros(own, dtype=torch.int64 if i == 2 else torch.float64) for i, own in enumerate(sizes)]
        module = make_fx(lambda *inputs: function(*inputs))(*operands)
    choice = choose_axis(module.graph, module.graph.find_nodes(op="placeholder")[0])
    assert not shape_env.guards
    return choice


def product(x, w):
    return (x @ w).tanh()


def test_the_dim_that_varies_is_the_axis_however_short_it_was():
    found = of_sizes(product, (9, "3", 8), (8, 16))
    assert (found.axis, found.length) == (Split(1), 3)


def test_two_dims_that_vary_are_refused():
    with pytest.raises(Refusal, match=r"several dims of .* are only known at run time") as refused:
        of_sizes(product, ("9", "3", 8), (8, 16))
    assert refused.value.reason is Reason.DYNAMIC


def test_a_last_dim_that_varies_tells_why_it_cannot_be_split():
    with pytest.raises(Refusal, match=r"flip.* mixes the split dim"):
        of_sizes(lambda x: x.flip(1), (4, "3"))


def test_sizes_that_have_to_be_made_equal_first_are_told():
    """Labels of a length of their own: it was that of the tokens when the graph was captured."""
    with pytest.raises(Unequal) as unequal:
        of_sizes(lambda x, w, labels: (x @ w) * labels[..., None], (2, "3", 8), (8, 16), (2, "3"))
    assert unequal.value.node.name == "arg2_1"


def test_a_weight_is_not_split_where_products_wait_for_its_sum():
    """Of a weight as the stream: what it makes of whole tokens would add up before the next product."""

    def softmaxed(w, x, v):
        return (x @ w).softmax(-1) @ v

    module = aten_graph(Call(softmaxed, [values(8, 4), values(5, 8), values(4, 3)]))
    weight, *_ = placeholders(module)
    assert choose_axis(module.graph, weight).axis == Split(0)
    with pytest.raises(Refusal) as refusal:
        choose_axis(module.graph, weight, tokens_whole=True)
    assert refusal.value.reason == Reason.AXIS_MIXED
