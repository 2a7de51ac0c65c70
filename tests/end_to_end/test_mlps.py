"""Every spelling of an MLP in `mlps`: the gradients of eager, one loop, nothing wide saved for backward."""

from __future__ import annotations

import pytest
import torch
from memory_probe import saved_bytes
from mlps import FF, GATED, PLAIN, D, Mlp
from numerics import assert_as_good_as_eager, looped

B, T = 2, 256
CASES = [(pattern, name) for pattern, table in (("mlp", PLAIN), ("gated_mlp", GATED)) for name in table]


def make(pattern, name):
    torch.manual_seed(0)
    return Mlp((PLAIN if pattern == "mlp" else GATED)[name])


def step(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize(("pattern", "name"), CASES)
def test_gradients(pattern, name):
    report = assert_as_good_as_eager(make(pattern, name), (torch.randn(B, 24, D),), step=step, chunk_tokens=14)
    (region,) = report.regions
    assert (region.pattern, region.chunks) == (pattern, 4)
    assert not report.refusals


@pytest.mark.parametrize(("pattern", "name"), CASES)
def test_nothing_wide_is_saved(pattern, name):
    model, x = make(pattern, name), torch.randn(B, T, D, requires_grad=True)
    known = [x, *model.parameters(), *model.buffers()]
    wide = B * T * FF * 4
    torch._dynamo.reset()
    compiled, eager = looped(step, chunk_tokens=64), step
    assert saved_bytes(lambda: eager(model, x), known) >= wide
    assert saved_bytes(lambda: compiled(model, x), known) <= saved_bytes(lambda: eager(model, x), known) - wide
