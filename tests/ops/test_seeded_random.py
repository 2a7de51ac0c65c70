"""Random numbers of a seed and a position: as torch's are distributed, and the same in whatever chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from looping import Call, aten_graph, loop_everything, placeholders, run_forward

from mst_fx.capture.decompositions import decompositions
from mst_fx.ops.seeded_random import _mixed, uniform_like
from mst_fx.placement.placement import Split

P = 0.3


def test_numbers_are_uniform():
    torch.manual_seed(0)
    u = uniform_like(torch.empty(1000, 1000))
    assert 0 <= float(u.min()) < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(u.var()) == pytest.approx(1 / 12, rel=1e-2)
    counts = u.histc(256, 0, 1)
    assert 150 < float((counts - counts.mean()).square().sum() / counts.mean()) < 360  # chi-squared, 255 degrees


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 7)])
def test_neighbours_are_independent(shift):
    torch.manual_seed(1)
    u = uniform_like(torch.empty(1000, 1000)) - 0.5
    v = u.roll(shift, (0, 1))
    assert abs(float((u * v).mean() * 12)) < 5e-3
    assert abs(float(((u > 0) == (v > 0)).float().mean()) - 0.5) < 2.5e-3


def test_draws_differ_and_follow_the_seed():
    x = torch.empty(50, 50)
    torch.manual_seed(2)
    first, second = uniform_like(x), uniform_like(x)
    torch.manual_seed(2)
    assert torch.equal(uniform_like(x), first)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.1


def test_positions_past_32_bits_have_numbers_of_their_own():
    torch.manual_seed(3)
    base = torch.empty(1).expand(2**33 // 8, 8)  # no memory of this size is needed
    rows = torch.tensor([0, 2**29])  # 2^32 elements apart

    assert base.numel() > 2**32
    position = rows.unsqueeze(1) * 8 + torch.arange(8)
    low = _mixed(position & 0xFFFFFFFF)
    assert torch.equal(low[0], low[1])
    assert not torch.equal(_mixed(low ^ (position >> 32))[0], _mixed(low ^ (position >> 32))[1])


@pytest.mark.parametrize("split", [Split(0), Split(1), Split(2)])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_numbers_do_not_depend_on_the_chunks(split, chunk):
    x = torch.ones(4, 6, 5, dtype=torch.float64)
    module = aten_graph(Call(lambda x: F.dropout(x, P), [x]), decompositions(), functional=True)
    stages = loop_everything(module, placeholders(module)[0], split)
    env = {}
    for node in module.graph.nodes:  # what runs before the loop runs once for both
        if node in stages.prologue:
            env[node] = node.target(*[env.get(a, a) for a in node.args], **node.kwargs)
    operands = [env.get(node, x) for node in stages.operands]
    (whole,), (parts,) = run_forward(stages, operands, 6), run_forward(stages, operands, chunk)
    assert torch.equal(whole, parts)
    assert set(whole.unique().tolist()) == {0.0, 1 / (1 - P)}
