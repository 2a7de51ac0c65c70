"""Writes in place inside of a region, those that autograd does not see among them: values change, gradients do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions


def wide(x, up):
    """Of a product that autograd did not save."""
    return (x @ up) * 2


def scaled(x, up, down):
    h = x @ up
    with torch.no_grad():
        h.mul_(1.5)
    return h @ down


def data(x, up, down):
    h = x @ up
    h.data.mul_(2)
    return h @ down


def detached(x, up, down):
    h = x @ up
    h.detach().mul_(2)
    return h @ down


def masked(x, up, down):
    h = wide(x, up)
    with torch.no_grad():
        h[h < 0] = 0
        h[..., 2].add_(1)
        h.masked_fill_(h > 1, 1.0).clamp_(-1)
    return h @ down


def view_of_detached(x, up, down):
    h = wide(x, up)
    h.detach()[..., ::2].mul_(3)
    shifted = h[..., 1:]
    h.detach().view(-1, 8)[:, 1].zero_()
    return h @ down + shifted.sum(-1, keepdim=True)


def slices(x, up, down):
    h = x @ up
    with torch.no_grad():
        for i in range(2):
            h[:, :, i::2] *= i + 1
    return h.softmax(-1) @ down


def buffer_of_slices(x, up, down):
    h = x @ up
    with torch.no_grad():
        swapped = torch.zeros_like(h)
    swapped[..., :4] = h[..., 4:]
    swapped[..., 4:] = h[..., :4].tanh()
    return swapped @ down


def buffer_of_a_copy(x, up, down):
    h = wide(x, up)
    with torch.no_grad():
        copy = torch.empty_like(h)
    copy.copy_(h)
    return copy @ down


def seen_and_unseen(x, up, down):
    h = (x @ up).mul_(2)
    with torch.no_grad():
        h += 1
    h = h.mul_(3)
    h.detach().sub_(1)
    return h @ down


def gradients_within(x, up, down):
    h = wide(x, up)
    with torch.no_grad():
        h.mul_(2)
        with torch.enable_grad():
            h = h.mul_(3)
            squared = h * h
        constant = h + 1
    return (squared + constant) @ down


def made_without_gradient(x, up, down):
    h = wide(x, up)
    with torch.no_grad():
        mask, total = h > 0, h.sum(-1, keepdim=True)
        double = (h * 2).mul_(3)
    return (h * mask + double / (1 + total * total)) @ down


def out(x, up, down):
    h = wide(x, up)
    with torch.no_grad():
        torch.mul(h, 2, out=h)
        torch.add(h, 1, out=h)
    return h @ down


def activation(x, up, down):
    h = x @ up
    with torch.no_grad():
        F.relu(h, inplace=True)
        F.dropout(h, 0.0, True, inplace=True)
    return h @ down


def copy_is_no_alias(x, up, down):
    h = wide(x, up)
    copy = h.detach().clone()
    copy.mul_(3)
    return (h + copy) @ down


def alias_sees_the_write(x, up, down):
    h = x @ up
    alias = h.detach()
    h.mul_(3)
    return (h.tanh() * alias) @ down


def shifted_logits(x, head, _):
    logits = x @ head
    with torch.no_grad():
        logits -= logits.amax(-1, keepdim=True)
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(15) % 8)


def shifted_data_of_logits(x, head, _):
    logits = x @ head
    logits.data.sub_(logits.data.amax(-1, keepdim=True))
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(15) % 8)


def masked_logits(x, head, _):
    logits = x @ head
    with torch.no_grad():
        logits[..., 3] = float("-inf")
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(15) % 3)


LOOPED = [
    *(scaled, data, detached, masked, view_of_detached, slices, buffer_of_slices, buffer_of_a_copy, seen_and_unseen),
    *(gradients_within, made_without_gradient, out, activation, copy_is_no_alias, alias_sees_the_write),
    *(shifted_logits, shifted_data_of_logits, masked_logits),
]


def given(_):
    return leaf(3, 5, 4), leaf(4, 8), leaf(8, 4)


@pytest.mark.parametrize("program", LOOPED, ids=lambda program: program.__name__)
def test_a_write_inside_of_a_loop(program):
    assert looped_regions(beside_eager(program, given)) == 1


def learnt_scale(x, up, down):
    alias = (x @ up).detach()
    alias *= down[:, 0]
    return alias.tanh() @ down


def learnt_column(x, up, down):
    alias = (x @ up).data
    alias[..., 0] = down[0, 0]
    return alias.tanh() @ down


def bias_of_a_frozen_head(x, head, bias):
    with torch.no_grad():
        logits = x @ head
    logits = logits.detach()
    logits += bias[:, 0]
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(15) % 8)


def one_of_several_views(x, up, down):
    h = x @ up
    _, alias = torch.broadcast_tensors(down[:, 0].expand_as(h), h.detach())
    alias.mul_(down[:, 1])
    return alias.tanh() @ down


@pytest.mark.parametrize(
    "program",
    [learnt_scale, learnt_column, bias_of_a_frozen_head, one_of_several_views],
    ids=lambda program: program.__name__,
)
def test_a_detached_view_that_gets_a_gradient_of_its_own(program):
    (refusal,) = beside_eager(program, given)[0].refusals
    assert refusal.reason == "MUTATION"
    assert "writes what has a gradient to a detached view" in refusal.text


def result_zeroed(x, up, down):
    y = wide(x, up) @ down
    with torch.no_grad():
        y.zero_()
    return y * 2


def parts_of_a_result(x, up, down):
    y = wide(x, up) @ down
    with torch.no_grad():
        y[:, 1:3] = 0
        y[y > 0.5] = 1
    return y.square()


def loss_scaled(x, head, _):
    loss = F.cross_entropy((x @ head).flatten(0, 1), torch.arange(15) % 8)
    with torch.no_grad():
        loss.mul_(2)
    return loss * loss


def operand_of_a_sum(x, up, down):
    total = up.sum(0)
    h = x @ up
    with torch.no_grad():
        total.mul_(2)
    return (h * total).sigmoid() @ down


def view_before_the_write(x, up, down):
    h = wide(x, up)
    part = h[..., :4]
    with torch.no_grad():
        h.add_(1)
    return torch.cat([part * 2, h[..., 4:]], -1) @ down


BESIDE = [result_zeroed, parts_of_a_result, loss_scaled, operand_of_a_sum, view_before_the_write]


@pytest.mark.parametrize("program", BESIDE, ids=lambda program: program.__name__)
def test_a_write_around_a_loop_looped_or_not(program):
    """Whether it is inside, behind or refused is the pass's business: the numbers are eager's."""
    beside_eager(program, given)


def saved_by_a_product(x, up, down):
    h = x @ up
    g = h * h.exp()
    h.data.mul_(2)
    return (h + g) @ down


def saved_by_a_row_of_a_view(x, up, down):
    h = x @ up
    g = h[..., 1:].square()
    h.data[..., 0].zero_()
    return (h + g.sum(-1, keepdim=True)) @ down


SAVED = [saved_by_a_product, saved_by_a_row_of_a_view]


@pytest.mark.parametrize("program", SAVED, ids=lambda program: program.__name__)
def test_what_may_be_saved_is_not_written_through_data(program):
    """Eager's backward reads the new value there, a recompute would read the old one."""
    (report,) = beside_eager(program, given)
    (refused,) = report.refusals
    assert (refused.reason, report.regions) == ("MUTATION", ())
    assert "writes through .data to what " in refused.text
    assert refused.text.startswith("Tensor.")
    assert refused.source.split(":")[1] == str(program.__code__.co_firstlineno + 3)
