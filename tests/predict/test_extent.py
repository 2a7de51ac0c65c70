"""The numbers of an axis: tokens at a position, the width of products, rows that share a matrix, sums that are cast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, region_of, sketched

import mst_fx
from mst_fx.bodies.work import analysed
from mst_fx.core.sizes import LONG, hint, long_hint
from mst_fx.predict.extent import extent_of

B, T, D, FF, E = 2, 12, 4, 8, 3


def work_of(fn, *inputs, capture=sketched):
    return analysed(region_of(capture(fn, *inputs)), mst_fx.Config(), {})


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def extent(fn, *shapes, **options):
    return extent_of(work_of(fn, *leaves(*shapes, **options)), hint)


def mlp(x, up, down):
    return F.gelu(x @ up) @ down


@pytest.mark.parametrize(
    ("shape", "length", "tokens"), [((B, T, D), T, B), ((T, B, D), T, B), ((T, D), T, 1), ((B, 3, T, D), T, 3 * B)]
)
def test_tokens_at_a_position(shape, length, tokens):
    found = extent(lambda x, w: (x @ w).tanh(), shape, (D, FF))
    assert (found.length, found.tokens_per_position, found.dynamic) == (length, tokens, False)


def test_products_are_as_wide_as_one_position_of_them():
    found = extent(mlp, (B, T, D), (D, FF), (FF, D))
    assert found.widest == B * FF * 4
    assert found.wide == B * FF * 4  # the second one makes less than it reads
    gated = extent(lambda x, a, b, down: (F.silu(x @ a) * (x @ b)) @ down, (T, D), (D, FF), (D, FF), (FF, D))
    assert (gated.widest, gated.wide) == (FF * 4, 2 * FF * 4)


def test_without_a_product_the_widest_value_counts():
    found = extent(lambda x, scale: (x.unsqueeze(-1) * scale).exp().sum((-1, -2)), (T, D), (FF,))
    assert (found.widest, found.wide, found.cast) == (D * FF * 4, 0, 0)


def test_features_are_not_the_axis():
    """Columns of tokens: the last dim is the axis, and a product tells how many features there are."""
    found = extent(lambda x, up: (up @ x).tanh().sum(1), (6, D, T), (FF, D))
    assert (found.length, found.tokens_per_position) == (T, 6)


def experts(x, chosen, up, down):
    """Two of E experts a token."""
    order = chosen.view(-1).argsort()
    ends = torch.histc(chosen.view(-1).float(), E, 0, E - 1).cumsum(0).to(torch.int32)
    rows = F.grouped_mm(F.grouped_mm(x[order // 2], up, offs=ends).tanh(), down, offs=ends)
    return torch.zeros_like(x).index_add(0, order // 2, rows)


def every_expert_on_every_token(x, up):
    return torch.bmm(x.repeat(E, 1).view(E, -1, D), up).tanh().sum((0, 2))


def test_tokens_for_each_row_that_one_matrix_multiplies():
    x, up, down = leaves((T, 8), (E, 8, 16), (E, 16, 8), dtype=torch.bfloat16)
    assert extent_of(work_of(experts, x, torch.randint(0, E, (T, 2)), up, down), hint).sharing == E / 2
    assert extent(every_expert_on_every_token, (T, D), (E, D, FF)).sharing == 1.0
    assert extent(mlp, (T, D), (D, FF), (FF, D)).sharing == 1.0


@pytest.mark.parametrize(("dtype", "cast"), [(torch.bfloat16, D * FF * 2), (torch.float32, 0)])
def test_gradients_in_half_precision_add_up_in_another_dtype(dtype, cast):
    assert extent(mlp, (T, D), (D, FF), (FF, D // 2), dtype=dtype).cast == cast


def test_a_length_that_varies_is_what_the_hint_tells():
    x, *weights = leaves((B, T, D), (D, FF), (FF, D))
    torch._dynamo.mark_dynamic(x, 1)
    work = work_of(mlp, x, *weights, capture=captured)
    short, long = (extent_of(work, at) for at in (hint, long_hint))
    assert (short.length, short.tokens_per_position, short.dynamic) == (T, B, True)
    assert (long.length, long.tokens_per_position, long.widest) == (LONG, B, short.widest)
