"""What ops decompose into while a region is lowered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from looping import Call, aten_graph

from mst_fx.capture.decompositions import decompositions

P = 0.3


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda x: torch.native_dropout(x, P, True)[0], 1.0),
        (lambda x: torch.native_dropout(x, P, True)[1].double(), 1 - P),
        (lambda x: torch.native_dropout(x, P, False)[0], 1.0),
        (lambda x: F.dropout(x, P), 1.0),
        (lambda x: F.dropout(x, 1.0), 0.0),
        (lambda x: torch.bernoulli(x, 0.25), 0.25),
        (torch.rand_like, 0.5),
    ],
)
def test_every_op_that_is_opened(draw, mean):
    x = torch.ones(300, 100, dtype=torch.float64)
    module = aten_graph(Call(draw, [x]), decompositions(), functional=True)
    drawn = [n.target for n in module.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    assert set(drawn) <= {torch.ops.aten.randint.low}
    torch.manual_seed(6)
    assert float(module(x).mean()) == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_dot_products_are_rounded_once(dtype):
    """As in the products that they stand for, only the sum is rounded."""
    torch.manual_seed(0)
    x, y = (torch.randint(-9, 9, (3, 1, 64)).to(dtype) / (1 if dtype == torch.int64 else 7) for _ in range(2))
    x, y = x.to(dtype), y.to(dtype)
    module = aten_graph(Call(lambda x, y: torch.bmm(x, y.transpose(1, 2)), [x, y]), decompositions())
    assert torch.ops.aten.bmm.default not in {node.target for node in module.graph.nodes}
    exact = (x.double() * y.double()).sum(-1, keepdim=True).to(dtype)
    torch.testing.assert_close(
        module(x, y), exact, rtol=0 if dtype != torch.float32 else 1e-5, atol=0 if dtype != torch.float32 else 1e-5
    )


def test_numbers_in_masked_writes_are_made_where_they_are_read():
    """Autograd, and libraries, write `x[mask] = 0`: no constant tensor is in the graph."""

    def written(x):
        y = x.clone()
        y[x > 0] = 0.5
        return y

    x = torch.randn(4, 3)
    module = aten_graph(Call(written, [x]), decompositions(), functional=True)
    assert not [node for node in module.graph.nodes if node.op == "get_attr"]
    torch.testing.assert_close(module(x), written(x))


def test_an_entry_of_a_row_that_is_repeated_is_picked_from_that_row():
    """Weights of classes: what is picked is as small as the labels."""
    weight, labels = torch.randn(5), torch.randint(0, 5, (3, 1))
    function = lambda w, i: torch.gather(w.expand(3, 5), 1, i)  # noqa: E731
    module = aten_graph(Call(function, [weight, labels]), decompositions())
    assert torch.ops.aten.embedding.default in {node.target for node in module.graph.nodes}
    torch.testing.assert_close(module(weight, labels), function(weight, labels))
