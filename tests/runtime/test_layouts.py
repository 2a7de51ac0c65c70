"""Strides: of operands, of the gradients that come in, and of results that are read as they were captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions
from graphs import captured, rewritten
from layouts import LAYOUTS, expanded_columns, expanded_rows, misaligned, one_number, overlapping

from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence


def in_layout(make, *shape):
    return make(*shape).detach().requires_grad_()


def mlp(x, up, table, down):
    """Reads its weights as they lie, and as views."""
    h = F.gelu(x @ up).unflatten(-1, (2, 8)) * table + table.t().reshape(-1)[1:9]
    return F.linear(h.flatten(2), down)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("odd", [{1, 2, 3}, {0}], ids=["weights", "tokens"])
def test_operands_of_every_layout(layout, odd):
    shapes = ((3, 10, 4), (4, 16), (2, 8), (4, 16))

    def given(_):
        return [in_layout(layout, *shape) if i in odd else leaf(*shape) for i, shape in enumerate(shapes)]

    assert looped_regions(beside_eager(mlp, given)) == 1


def shifted(x, up, down):
    return torch.tanh(x @ up) @ down


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_whole_operands_are_read_as_they_lie_where_no_elements_share_memory(layout):
    """No copy is made of a weight that lies transposed."""
    up = in_layout(layout, 4, 16)
    gm, _ = rewritten(captured(shifted, leaf(12, 4), up, leaf(16, 4)))
    (call,) = (node for node in gm.graph.nodes if node.target is mini_sequence)
    spec = LoopSpec(*CallSpec(*call.args[4]).forward_spec)
    own = layout not in (expanded_rows, expanded_columns, one_number, overlapping) and not up.is_contiguous()
    assert [strides for _, strides in spec.strides] == ([up.stride()] if own else [])


def test_bodies_hold_no_ops_that_keep_to_the_layout_they_were_traced_for():
    gm, report = rewritten(captured(mlp, leaf(3, 10, 4), leaf(4, 16), leaf(2, 8), leaf(4, 16)))
    assert len(report.regions) == 1
    bodies = [child for name, child in gm.named_children() if name.startswith("mini_sequence")]
    ops = {node.target for body in bodies for node in body.graph.nodes}
    assert torch.ops.aten.reshape.default in ops
    assert torch.ops.aten.view.default not in ops


@pytest.mark.parametrize("layout", [misaligned, one_number, overlapping], ids=lambda layout: layout.__name__)
def test_compiled_bodies_take_operands_in_the_layout_that_they_were_made_for(layout):
    """Inductor's code relies on strides, and on addresses that are multiples of 16 bytes."""

    def given(_):
        return leaf(12, 4), in_layout(layout, 4, 16), in_layout(layout, 16), in_layout(layout, 16, 4)

    def biased(x, up, shift, down):
        return torch.tanh(x @ up + shift) @ down

    assert looped_regions(beside_eager(biased, given, inner="inductor")) == 1


def heads_and_a_sum(x, up, down):
    h = F.gelu(x @ up).unflatten(-1, (4, 4))
    return h.flatten(-2) @ down, h.sum((0, 1))


def sum_read_transposed(x, up, down):
    y, total = heads_and_a_sum(x, up, down)
    return y, total.t().tanh()


def tokens_last(x, up, down):
    return (F.gelu(x @ up) @ down).transpose(1, 2).sin()


def two_losses(x, up, down):
    y, total = heads_and_a_sum(x, up, down)
    return y.permute(2, 0, 1).square().sum(), total.t().contiguous().flatten().cumsum(0)


@pytest.mark.parametrize("upstream", ["transposed", "expanded", "zero"])
@pytest.mark.parametrize(
    "program", [heads_and_a_sum, sum_read_transposed, tokens_last, two_losses], ids=lambda program: program.__name__
)
def test_gradients_that_come_in(program, upstream):
    reports = beside_eager(
        program, lambda _: (leaf(3, 10, 4), leaf(4, 16), leaf(16, 4)), backward="each", upstream=upstream
    )
    assert looped_regions(reports) == 1


def of_the_first(x, z, up, down, up2, down2, mix, q, q2):
    """Two regions that are alike; the gradients of their second results lie in other orders."""
    h, h2 = torch.tanh(x @ up), torch.tanh(z @ up2)
    s, s2 = (h.unsqueeze(-1) * q.unsqueeze(1)).sum(0), (h2.unsqueeze(-1) * q2.unsqueeze(1)).sum(0)
    return h @ down, h2 @ down2, (s.t().contiguous() @ mix).square().sum(), (s2 * s2).sum()


def of_the_second(x, z, up, down, up2, down2, mix, q, q2):
    y, y2, loss, loss2 = of_the_first(z, x, up, down, up2, down2, mix, q2, q)
    return y2, y, loss2, loss


@pytest.mark.parametrize("program", [of_the_first, of_the_second], ids=lambda program: program.__name__)
def test_alike_regions_share_a_body_and_not_the_strides_of_their_gradients(program):
    shapes = [(12, 4), (12, 4), (4, 16), (16, 4), (4, 16), (16, 4), (16, 5), (12, 3), (12, 3)]
    reports = beside_eager(program, lambda _: [leaf(*shape) for shape in shapes], inner="inductor")
    assert [len(report.regions) for report in reports] == [2]


def means(x, up, down):
    h = F.gelu(x @ up)
    mean = h.mean(-1).t().exp()
    return (h * mean.t().unsqueeze(-1)) @ down, mean.t().view(-1).cumsum(0)


def means_of_heads(x, up, down):
    h = F.gelu(x @ up).unflatten(-1, (2, 16))
    mean = h.mean(-1).permute(2, 0, 1).tanh()
    y = (h * mean.permute(1, 2, 0).unsqueeze(-1)).flatten(2) @ down
    return y, mean.permute(1, 2, 0).view(-1, 2).cumsum(0)


def weighted_tokens(x, head, _):
    logits = x @ head
    weight = logits.logsumexp(-1).t().tanh()
    loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(21), reduction="none").view(3, 7)
    return (loss * weight.t()).sum(), weight.t().view(-1).cumsum(0)


def features_first(x, up, down):
    h = F.silu((up.t() @ x.transpose(-1, -2)).transpose(-1, -2))
    return F.instance_norm(h.transpose(-1, -2)).transpose(-1, -2) @ down


def tokens_second(x, up, down):
    y = (F.gelu(x.transpose(0, 1) @ up) @ down).transpose(0, 1).sin()
    return y.transpose(0, 1).view(-1, 4)[:, :2].cumsum(0)


READ_AS_CAPTURED = [means, means_of_heads, weighted_tokens, features_first, tokens_second]


@pytest.mark.parametrize("program", READ_AS_CAPTURED, ids=lambda program: program.__name__)
def test_views_of_a_result_that_was_captured_transposed(program):
    reports = beside_eager(program, lambda _: (leaf(3, 7, 4), leaf(4, 32), leaf(32, 4)))
    assert looped_regions(reports) == 1


def of_one_row(y, h, other, column):
    y += h.amax(1, keepdim=True) @ other
    return y


def of_one_column(y, h, other, column):
    y += h @ column
    return y


def of_another_dtype(y, h, other, column):
    y += (h > 0).long() @ (4 * other).long()  # whole numbers are exact
    return y


def of_one_column_behind_another(y, h, other, column):
    y += h @ other
    y += h @ column
    return y


def of_one_row_behind_another(y, h, other, column):
    y += h @ other
    y += h.amax(1, keepdim=True) @ column
    return y


ENDINGS = [of_one_row, of_one_column, of_another_dtype, of_one_column_behind_another, of_one_row_behind_another]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_products_that_are_repeated_in_a_sum(ending):
    """They stay in the body: the runtime multiplies straight into rows of the result, one for one."""

    def program(x, up, down, other, column):
        h = (x @ up).tanh()
        return ending(h @ down, h, other, column)

    reports = beside_eager(program, lambda _: (leaf(6, 2, 2), leaf(2, 8), leaf(8, 2), leaf(8, 2), leaf(8, 1)))
    assert looped_regions(reports) == 1
