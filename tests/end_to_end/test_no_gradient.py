"""No gradient, and not zeros, where eager execution gives none: optimizers with weight decay tell them apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions
from torch.utils.checkpoint import checkpoint


def detached_gate(x, up, other, down):
    return (F.silu(x @ up).detach() * (x @ other)) @ down


def detached_tokens(x, up, other, down):
    return (F.silu(x.detach() @ up) * (x.detach() @ other)) @ down


def detached_weight(x, up, other, down):
    return (F.silu(x @ up) * (x @ other.detach())) @ down


def without_gradient(x, up, other, down):
    with torch.no_grad():
        gate = x @ other
    return (F.silu(x @ up) * gate) @ down


def only_compared(x, up, other, down):
    return (F.silu(x @ up) * (x @ other > 0)) @ down


def only_its_shape(x, up, other, down):
    return (F.silu(x @ up) * torch.ones_like(x @ other)) @ down


def filled_over(x, up, other, down):
    return (F.silu(x @ up) + (x @ other).zero_()) @ down


def dead(x, up, other, down):
    h = x @ up
    (h * (x @ other)).sum()
    return F.silu(h) @ down


def only_its_order(x, up, other, down):
    return (F.silu(x @ up) * (x @ other).sort(-1)[1].to(x.dtype)) @ down


def only_its_best(x, up, other, down):
    return (F.silu(x @ up) * (x @ other).topk(8)[1].to(x.dtype)) @ down


NO_GRADIENT = [
    *(detached_gate, detached_tokens, detached_weight, without_gradient, only_compared),
    *(only_its_shape, only_its_order, only_its_best, filled_over, dead),
]


@pytest.mark.parametrize("program", NO_GRADIENT, ids=lambda program: program.__name__)
def test_no_gradient_where_eager_gives_none(program):
    shapes = (3, 7, 4), (4, 8), (4, 8), (8, 4)
    assert looped_regions(beside_eager(program, lambda _: [leaf(*shape) for shape in shapes])) == 1


def mlp(x, up, down):
    return (x @ up).tanh() @ down


def result_detached_in_place(x, up, down):
    y = mlp(x, up, down)
    total = y.sum()
    y.detach_()
    return total, y


def made_of_the_result(x, up, down):
    y = mlp(x, up, down) * 2
    total = y.sum()
    y.detach_()
    return total, y


def result_of_a_checkpoint(x, up, down):
    y = checkpoint(mlp, x, up, down, use_reentrant=False)
    total = y.sum()
    y.detach_()
    return total, y


def tokens_detached_before(x, up, down):
    tokens = x * 2
    tokens.detach_()
    return mlp(tokens, up, down)


SWITCHED = [result_detached_in_place, made_of_the_result, result_of_a_checkpoint]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("program", [*SWITCHED, tokens_detached_before], ids=lambda program: program.__name__)
def test_gradients_that_are_switched_in_place(program, inner):
    """A captured value tells what it needs in the end; what was read or made before is left alone."""

    def given(_):
        return leaf(3, 7, 4), leaf(4, 8), leaf(8, 4)

    reports = beside_eager(program, given, inner=inner)
    assert looped_regions(reports) == (program is tokens_detached_before)
