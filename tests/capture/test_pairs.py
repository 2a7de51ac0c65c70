"""Complex numbers as pairs of real ones: each op computes the same, and what is not known stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mst_fx.capture.lower import traced, tracing
from mst_fx.capture.pairs import ON_PAIRS, on_pairs
from mst_fx.core.aten_ops import ALIASES

aten = torch.ops.aten
real, as_complex = torch.view_as_real, torch.view_as_complex

KNOWN = [
    lambda x, z: real(as_complex(x) * z),
    lambda x, z: real(z[0, 0] * as_complex(x) * 2.0),
    lambda x, z: real(as_complex(x) * x[..., 0]) + real(-as_complex(x)),
    lambda x, z: real(as_complex(x).conj() * z[:, 1:2]),
    lambda x, z: real(as_complex(x).transpose(0, -1).clone()) * real(z.permute(2, -2, 0)),
    lambda x, z: real(as_complex(x)[..., 1].unsqueeze(-1) * z.unsqueeze(-1)[..., 0]),
    lambda x, z: real(as_complex(x).reshape(2, -1).view(6, 4) * z.view(6, 4)),
    lambda x, z: real(as_complex(x)[:1].expand(2, 3, 4) * z[1:].squeeze(0).detach()),
]
UNKNOWN = [
    lambda x, z: real(as_complex(x).exp()),
    lambda x, z: real(as_complex(x) * 1j),
    lambda x, z: as_complex(x) * z,
    lambda x, z: x * z.abs().unsqueeze(-1),
]


def graph_of(program, *inputs):
    def run(*values):
        made = program(*values)
        return made if isinstance(made, list) else [made]

    modes = FakeTensorMode()
    fakes = [modes.from_tensor(x) for x in inputs]
    with tracing(fakes):
        return traced(run, fakes)


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 2, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.complex128)


@pytest.mark.parametrize("number", range(len(KNOWN)))
def test_pairs_compute_the_same(number):
    x, z = inputs()
    run = on_pairs(graph_of(KNOWN[number], x, z))
    torch.testing.assert_close(run(x, z), [KNOWN[number](x, z)])
    calls = [node for node in graph_of(run, x, z).graph.nodes if node.op == "call_function"]
    assert not any(value.is_complex() for node in calls for value in tree_leaves(node.meta["val"]))


def test_each_op_is_met():
    met = {node.target for program in KNOWN for node in graph_of(program, *inputs()).graph.nodes}
    never = {aten._unsafe_view.default, aten.reshape.default, *ALIASES}  # it depends on the version
    assert set(ON_PAIRS) - never <= met


@pytest.mark.parametrize("number", range(len(UNKNOWN)))
def test_what_is_not_known_stays(number):
    assert on_pairs(graph_of(UNKNOWN[number], *inputs())) is None


def test_views_that_conjugate_stay():
    x, z = inputs()
    assert on_pairs(graph_of(KNOWN[0], x, z.conj())) is None
