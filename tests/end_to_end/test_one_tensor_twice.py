"""A tensor under two names: `contiguous`, `to` and `flatten` give back what they are given where it serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf


def gated(x, gate, up, down):
    return (F.silu(x @ gate) * (x.contiguous() @ up)) @ down


def beside_itself(x, gate, up, down):
    y = x.to(torch.float64)
    return (F.silu(y @ gate) * (x @ up)) @ down + y


def normed(x, gate, up, down):
    h = F.layer_norm(x.flatten(2), (4,))
    return (F.silu(h @ gate) * (h.contiguous() @ up)) @ down + x


def cut(x, gate, up, down):
    return (F.silu(x @ gate) * (x.contiguous() @ up))[:, 1:].logsumexp(-1)


def weights(x, gate, up, down):
    return (F.silu(x @ gate) * (x @ gate.double())) @ down


@pytest.mark.parametrize("program", [gated, beside_itself, normed, cut, weights], ids=lambda program: program.__name__)
def test_is_looped_under_both(program):
    shapes = (2, 9, 4), (4, 12), (4, 12), (12, 4)
    (report,) = beside_eager(program, lambda _: [leaf(*shape) for shape in shapes], verify=True)
    assert len(report.regions) == 1
    assert not report.refusals


def scaled(x, up, a, b):
    h = (x @ up).tanh()
    return (h * a + h.sin() * b) @ up.t()


@pytest.mark.parametrize("first", ["same", "other"])
def test_alike_regions_for_which_it_is_one_and_two(first):
    """Their bodies are shared."""

    def program(x, up):
        a, b = up.sum(0).exp(), up.sum(0).cos()
        pairs = [(a.contiguous(), a.contiguous()), (a.contiguous(), b.contiguous())]
        return sum(scaled(x, up, *pair) for pair in (pairs if first == "same" else pairs[::-1]))

    (report,) = beside_eager(program, lambda _: [leaf(2, 9, 4), leaf(4, 12)])
    assert len(report.regions) == 2
