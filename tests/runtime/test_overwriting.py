"""A result of a loop is written over an operand that nobody reads afterwards, and over no other."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.runtime import loop_operator
from mst_fx.runtime.loop_operator import LoopSpec, run_loop
from mst_fx.runtime.overwriting import overwritable
from mst_fx.verify.by_chunks import all_splits

TOKENS, HIDDEN, WIDE = 32, 8, 16
SHAPES = [(4, 6), (2, 12), (24,), (2, 2, 6), (6, 4)]


def places(shape, axis, chunk):
    """The elements of memory that each chunk takes."""
    dim, outer, inner = axis
    numbers = torch.arange(prod(shape)).reshape(*shape[:dim], outer, -1, inner, *shape[dim + 1 :])
    return [part.flatten().tolist() for part in numbers.split(chunk, dim + 1)]


def test_chunks_of_what_is_overwritten_lie_where_those_of_the_result_do():
    axes = [(shape, (s.dim, s.outer, s.inner)) for shape in SHAPES for s in all_splits(shape)]
    values = [torch.empty(shape) for shape, _ in axes]
    found = 0
    for (shape, axis), value in zip(axes, values, strict=True):
        pairs = overwritable([("cat", *axis)], [axis for _, axis in axes], [value], values)
        alike = {position for _, position in pairs}
        same = [places(other, its, 1) == places(shape, axis, 1) for other, its in axes]
        assert alike == {position for position, equal in enumerate(same) if equal}
        found += len(alike)
    assert found > len(axes)  # views of one value, too


@pytest.mark.parametrize("chunk", [4, 5])
def test_another_output_may_be_the_chunk_that_is_overwritten(chunk):
    def body(args):
        (x,) = args
        return x.neg(), x, x, x

    x = torch.randn(12, 3)
    outs = (("cat", 0, 1, 1), ("outer", torch.float32, torch.float32), ("cat", 0, 1, 1))
    spec = tuple(LoopSpec("a version", chunk, ((0, 1, 1),), outs))
    expected, memory = (-x, x.mT @ x, x.clone()), x.data_ptr()
    results = run_loop((body, body), spec, [x], (0, 0))
    assert results[0].data_ptr() == memory
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def test_memory_in_another_order_is_left_alone():
    x = torch.randn(3, 12).mT
    spec = tuple(LoopSpec("a version", 4, ((0, 1, 1),), (("cat", 0, 1, 1),)))
    (result,) = run_loop((lambda args: [args[0].neg()], None), spec, [x], (0, 0))
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(result, -x)


class Branches(nn.Module):
    """MLPs of a value that two of them read, of one that is returned, of the caller's, and of a checkpointed block."""

    def __init__(self):
        super().__init__()
        self.up = nn.ParameterList(torch.randn(HIDDEN, WIDE) / 4 for _ in range(5))
        self.down = nn.ParameterList(torch.randn(WIDE, HIDDEN) / 4 for _ in range(5))

    def mlp(self, x, number):
        return F.gelu(x @ self.up[number]) @ self.down[number]

    def block(self, x):
        return self.mlp(x.roll(1, 0), 4)

    def forward(self, x):
        shared, shown = x.cumsum(0), x.cumsum(1)
        total = self.mlp(shared, 0) + self.mlp(shared, 1) + self.mlp(shown, 2) + self.mlp(x, 3)
        return total + checkpoint(self.block, x, use_reentrant=False), shown


def test_what_is_read_later_is_left_alone(monkeypatch):
    """The last of two loops overwrites what both read; neither the caller's tensors nor what is returned may change."""
    overwritten = []

    def results(bodies, spec, operands, overwrites):
        overwritten.append(overwrites)
        return run(bodies, spec, operands, overwrites)

    run = loop_operator._results
    monkeypatch.setattr(loop_operator, "_results", results)
    model = Branches().double()
    compiled = torch.compile(model, backend=mst_fx.backend, options={"min_bytes": 0, "chunk_tokens": 8, "strict": True})
    found = []
    for each in (model, compiled):
        x = torch.linspace(-1, 1, TOKENS * HIDDEN, dtype=torch.float64).view(TOKENS, HIDDEN).requires_grad_()
        before = x.detach().clone()
        total, shown = each(x)
        kept = shown.detach().clone()
        found.append(torch.autograd.grad(total.square().sum(), [x, *model.parameters()]))
        assert torch.equal(x, before)
        assert torch.equal(shown, kept)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(overwritten) == 10
    assert sum(pair is not None for pair in overwritten[5:]) == 2  # what is shared, and what the block makes
