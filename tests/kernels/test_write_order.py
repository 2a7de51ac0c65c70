"""Values of one kernel are written one after the other, and products stand behind what does not need them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from looping import Call, aten_graph, values

from mst_fx.kernels.write_order import let_overwrite, products_late, written_after

aten = torch.ops.aten
T, D = 5, 4


def ops(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def interleaved(x, w):
    first = x @ w
    a = x.sin()
    second = a @ w
    b = x.cos()
    return first, second, b * 2, first.exp() @ w


def test_products_wait_for_all_that_does_not_need_them():
    given = [values(T, D), values(D, D)]
    module = aten_graph(Call(interleaved, given))
    expected = module(*given)
    products_late(module)
    module.graph.lint()
    torch.testing.assert_close(module(*given), expected)
    assert ops(module) == [
        aten.sin.default,
        aten.cos.default,
        aten.mul.Tensor,
        aten.mm.default,
        aten.exp.default,  # needs the first product
        aten.mm.default,
        aten.mm.default,
    ]


def test_graphs_that_are_in_order_stay_as_they_are():
    module = aten_graph(Call(lambda x, w: (x.sin() @ w).cos(), [values(T, D), values(D, D)]))
    before = ops(module)
    products_late(module)
    assert ops(module) == before


def test_values_that_read_the_same_are_written_in_turn():
    def program(x, g, a, b):
        gate, up, wide = x @ a, x @ b, g @ a
        silu = F.silu(gate)
        return (silu * up) @ a.t(), (wide * silu) @ b.t(), aten.silu_backward(wide * up, gate) @ a.t()

    given = [values(T, D), values(T, D, seed=1), values(D, 2 * D), values(D, 2 * D, seed=1)]
    module = aten_graph(Call(program, given))
    products_late(module)
    before = ops(module)
    ordered = let_overwrite(module)
    ordered.graph.lint()
    torch.testing.assert_close(ordered(*given), module(*given))
    assert ops(module) == before
    first, second = ordered.graph.find_nodes(op="call_function", target=written_after)
    assert first.args[1].target == aten.silu_backward.default  # the value that reads most
    assert second.args[1] is first
    for mark in (first, second):
        value, previous = mark.args
        assert value < mark > previous
        assert mark.meta["val"] is value.meta["val"]
        assert [user.target for user in mark.users if user is not second] == [aten.mm.default]
        assert list(value.users) == [mark]


def test_a_kernel_of_one_value_stays_as_it_is():
    given = [values(T, D), values(D, D)]
    module = aten_graph(Call(lambda x, w: (x @ w).sin().cos() @ w, given))
    assert ops(let_overwrite(module)) == ops(module)
