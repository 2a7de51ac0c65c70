"""What captured values tell: their memory, bytes and sizes, and what kind of tensor they are."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from graphs import captured
from torch.fx import Graph

from mst_fx.core import values
from mst_fx.core.sizes import LONG, long_hint


def program(x, weight):
    flat = x.view(-1)
    turned = flat.unsqueeze(0)
    doubled = flat * 2
    same = x.contiguous()
    halves = x.chunk(2)
    largest = (x @ weight).max(-1)
    return turned, doubled, same, halves, largest


@pytest.fixture(scope="module")
def nodes():
    gm = captured(program, torch.randn(4, 3), torch.randn(3, 5, requires_grad=True))
    return {node.name: node for node in gm.graph.nodes}


def holder(value, key="example_value"):
    """A node with this value."""
    node = Graph().placeholder("x")
    node.meta[key] = value
    return node


def test_views_lie_in_the_memory_of_what_they_read(nodes):
    views = [name for name, node in nodes.items() if node.op != "output" and values.is_view(node)]
    assert views == ["flat", "turned", "same", "chunk", *(f"getitem{number}" for number in ("", "_1", "_2", "_3"))]


def test_memory_is_that_of_all_tensors(nodes):
    assert values.storages_of(nodes["turned"]) == values.storages_of(nodes["l_x_"])
    assert len(values.storages_of(nodes["max_1"])) == 2
    assert len(values.storages_of_all([nodes["turned"], nodes["doubled"], nodes["max_1"], nodes["same"]])) == 4


def test_what_has_no_memory_of_its_own():
    strange = [torch.eye(3).to_sparse(), 3, None]
    torch.vmap(lambda row: strange.append(row * 2) or row)(torch.ones(2, 3))
    assert [values.storages_of(holder(value)) for value in strange] == [set()] * 4
    assert [values.is_transformed(x) for x in strange if isinstance(x, torch.Tensor)] == [False, True]
    assert not values.is_view(holder(3))


def test_gradients_of_one_of_several_values(nodes):
    some = ["l_x_", "l_weight_", "doubled", "max_1"]
    assert [name for name in some if values.has_gradient(nodes[name])] == ["l_weight_", "max_1"]
    assert not values.has_gradient(holder(2.0))


def test_bytes():
    x = torch.empty(3, 5, dtype=torch.bfloat16)
    assert values.bytes_of(x) == 30
    assert values.bytes_made(holder(x, "val")) == 30
    assert values.bytes_made(holder((x, 3, x.double()), "val")) == 150
    assert [values.bytes_made(holder(value, "val")) for value in (7, None)] == [0, 0]
    assert values.bytes_made(holder(x)) == 0  # values of a captured graph are no values of an aten graph


def test_sizes_that_vary():
    marked, unmarked, told = torch.randn(1, 40, dtype=torch.bfloat16), torch.randn(3), []
    torch._dynamo.mark_dynamic(marked, 1)

    def backend(gm, _):
        (node,) = (node for node in gm.graph.nodes if node.name == "l_x_")
        told.append((values.fake_value(node), list(values.sizes_of(gm)), values.marked_sizes(gm)))
        return gm

    torch.compile(lambda x, y, n: (x * n, y * n), backend=backend, dynamic=True)(marked, unmarked, 7)
    ((x, sizes, names),) = told
    length = str(x.shape[1])
    assert (values.bytes_of(x), values.bytes_of(x, long_hint)) == (80, 2 * LONG)
    first, one, again, number, rows, rows_again = map(str, sizes)  # symbols are inputs, too
    assert (first, one, again, rows) == (length, "1", length, rows_again)
    assert len({length, number, rows}) == 3
    assert names == {length}


def test_kinds_of_tensors():
    plain = torch.ones(2)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(2)
    assert [values.is_fake(x) for x in (plain, nested, fake)] == [False, False, True]
    assert [values.is_wrapper(x) for x in (plain, nested, fake)] == [False, True, False]


def test_a_process_without_the_module_has_no_dtensors(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    assert not values.is_sharded(torch.ones(2))
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", SimpleNamespace(DTensor=torch.nn.Parameter))
    given = [torch.nn.Parameter(torch.ones(2)), torch.ones(2), 3]
    assert [values.is_sharded(value) for value in given] == [True, False, False]
