"""Graphs that are written in odd ways: looped or left alone, and never an internal error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions
from fuzzing.harness import Square, indices, weight
from torch import nn
from torch.utils.checkpoint import checkpoint


def mlp_inputs(_):
    return leaf(3, 7, 4), leaf(4, 8), leaf(8, 4)


def head_inputs(_):
    return leaf(3, 6, 4), weight(4, 9), weight(4, 2), weight(2, 9), indices(9, 3, 6)


def test_a_head_of_any_length_through_inductor():
    """In a batch of two the tokens of a mini-sequence are no dim of the graph: code must find their number."""

    def given(k):
        length = 7 + 4 * k
        return leaf(2, length, 16), weight(16, 65), indices(65, 2, length)

    def program(x, head, y):
        return F.cross_entropy((x @ head).flatten(0, 1), F.pad(y[:, 1:], (0, 1), value=-100).flatten())

    reports = beside_eager(program, given, 2, dynamic=True, inner="inductor")
    assert [len(report.regions) for report in reports] == [1]


def test_shifted_logits_of_a_second_length():
    def given(k):
        length = 7 + 4 * k
        return leaf(2, length, 16), weight(16, 48), weight(48, 16), weight(16, 65), indices(65, 2, length)

    def program(x, up, down, head, y):
        x = x + F.silu(x @ up) @ down
        return F.cross_entropy((x @ head)[:, :-1].flatten(0, 1), y[:, 1:].flatten())

    assert looped_regions(beside_eager(program, given, 2, inner="aot_eager")) == 2


def next_token(logits, y):
    return F.cross_entropy(logits[:, :-1].reshape(-1, 9), y[:, 1:].reshape(-1))


def adapted(x, head, a, b, y):
    return next_token(x @ head + x @ a @ b, y)


def adapted_and_scaled(x, head, a, b, y):
    return next_token((x @ head).tanh() * 3 + 0.5 * (x @ a @ b), y)


def joined(x, head, a, b, y):
    return next_token(torch.cat([x @ head[:, :5], x @ head[:, 5:]], -1), y)


def joined_and_adapted(x, head, a, b, y):
    return next_token(torch.cat([x @ head[:, :5], x @ head[:, 5:]], -1) + x @ a @ b, y)


def last_ones(x, head, a, b, y):
    logits = x @ head + x @ a @ b
    return F.cross_entropy(logits[:, -3:].flatten(0, 1), y[:, -3:].flatten())


def two_shifts(x, head, a, b, y):
    logits = x @ head + x @ a @ b
    return next_token(logits, y) + F.cross_entropy(logits[:, :-2].reshape(-1, 9), y[:, 2:].reshape(-1))


HEADS = [adapted, adapted_and_scaled, joined, joined_and_adapted, last_ones, two_shifts]


@pytest.mark.parametrize("program", HEADS, ids=lambda program: program.__name__)
def test_heads_of_several_products_whose_logits_are_cut(program):
    assert looped_regions(beside_eager(program, head_inputs)) >= 1


def halves_in_an_empty_value(x, up, down):
    h = F.gelu(x @ up)
    o = torch.empty_like(h)
    o[..., 0::2], o[..., 1::2] = h[..., 1::2], -h[..., 0::2]
    return o @ down


def columns_in_zeros(x, up, down):
    h = F.gelu(x @ up)
    o = torch.zeros_like(h)
    o[..., 2] = h[..., 3]
    o[..., 4:6] = h[..., :2] * h[..., 2:4]
    return (o + h) @ down


def part_of_itself(x, up, down):
    h = F.gelu(x @ up) * 2
    h[..., :4] = h[..., 4:] + 1
    return h @ down


def flipped_and_padded(x, up, down):
    h = (x @ up).tanh()
    return (h + h.flip(-1) + F.pad(h[..., 1:], (0, 1))) @ down


def rolled(x, up, down):
    h = (x @ up).tanh()
    return (h * h.roll(3, -1) + h.roll((1, -2), (-1, -1))) @ down


def reflected(x, up, down):
    h = (x @ up).tanh()
    return F.pad(h.flatten(0, 1), (2, 2), mode="reflect").view(3, 7, 12)[..., 1:9] @ down


def scattered(x, up, down):
    h = (x @ up).tanh()
    index = h.detach().argsort(-1)
    return (torch.zeros_like(h).scatter(-1, index, h * 2) + h.scatter_add(-1, index.flip(-1), h)) @ down


@pytest.mark.parametrize(
    "program",
    [
        *(halves_in_an_empty_value, columns_in_zeros, part_of_itself),
        *(flipped_and_padded, rolled, reflected, scattered),
    ],
    ids=lambda program: program.__name__,
)
def test_features_that_are_moved(program):
    assert looped_regions(beside_eager(program, mlp_inputs)) == 1


def test_classes_that_are_moved():
    """Outside of the nucleus there is no class but the label's."""

    def nucleus(x, head, y):
        logits = x @ head
        ordered, index = logits.sort(-1, descending=True)
        outside = ordered.softmax(-1).cumsum(-1) > 0.9
        outside = torch.cat([torch.zeros_like(outside[:, :1]), outside[:, :-1]], -1)
        mask = torch.zeros_like(outside).scatter(-1, index, outside)
        return F.cross_entropy(logits.masked_fill(mask & (torch.arange(32) != y[:, None]), -1e4), y)

    assert looped_regions(beside_eager(nucleus, lambda _: (leaf(20, 6), leaf(6, 32), indices(32, 20)))) == 1


def chunks(gate, x, up, down):
    a, b = (x @ up).chunk(2, -1)
    return (F.silu(a) * b) @ down


def splits(gate, x, up, down):
    a, b, c = (x @ up).split([8, 4, 4], -1)
    return (F.silu(a) * torch.cat([b, c], -1)) @ down


def unbound(gate, x, up, down):
    a, b = (x @ up).unflatten(-1, (2, 8)).unbind(-2)
    return (F.silu(a) * b) @ down


def unbound_outside(gate, x, up, down):
    first, second = torch.stack([x, x * 2]).cumsum(2).unbind(0)
    return (F.silu(first @ gate) * (second @ gate)) @ down


def chunks_outside(gate, x, up, down):
    first, second = torch.cat([x, x * 2], -1).cumsum(1).chunk(2, -1)
    return (F.silu(first @ gate) * (second @ gate)) @ down


def checkpointed(gate, x, up, down):
    return (checkpoint(F.silu, x @ gate, use_reentrant=False) * (x @ gate)) @ down


def checkpointed_pair(gate, x, up, down):
    a, b = checkpoint(lambda h: (F.silu(h), h.sigmoid()), x @ gate, use_reentrant=False)
    return (a * b * (x @ gate)) @ down


def custom_function(gate, x, up, down):
    return (Square.apply(x @ gate) * (x @ gate)) @ down


TUPLES = [chunks, splits, unbound, unbound_outside, chunks_outside]
OPAQUE = [checkpointed, checkpointed_pair, custom_function]


@pytest.mark.parametrize("program", TUPLES + OPAQUE, ids=lambda program: program.__name__)
def test_tuples_that_a_region_reads(program):
    reports = beside_eager(program, lambda _: (leaf(4, 8), leaf(3, 7, 4), leaf(4, 16), leaf(8, 4)))
    assert looped_regions(reports) == 1 or program in OPAQUE


def of_an_embedding(x, ids, up, scale, table, down):
    """Both the weight and the rows of the table are made in front of the loop."""
    return (F.linear(x, F.normalize(up, dim=1) * scale) + F.embedding(ids, table)) @ down


def test_a_computed_weight_beside_an_embedding():
    def given(_):
        return leaf(7, 4), indices(13, 7), weight(16, 4), weight(16, 1), weight(13, 16), weight(16, 4)

    beside_eager(of_an_embedding, given)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.scale, self.table, self.down = weight(16, 4), weight(16, 1), weight(13, 16), weight(16, 4)

    def forward(self, x, ids):
        return of_an_embedding(x, ids, self.up, self.scale, self.table, self.down)


def test_a_computed_weight_beside_an_embedding_of_a_module():
    beside_eager(Embedded, lambda _: (leaf(7, 4), indices(13, 7)))


def test_a_second_mlp_without_a_residual():
    def stacked(x, up, down):
        return F.gelu(F.gelu(x @ up) @ down @ up) @ down

    assert looped_regions(beside_eager(stacked, mlp_inputs)) == 2


def test_sizes_that_are_computed_after_a_result_was_read():
    def program(x, head, y):
        length, logits = x.shape[1], x @ head
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) * length
        return loss, (logits * length**0.5).logsumexp(-1).sum() / (logits.shape[0] * logits.shape[1])

    def given(k):
        return leaf(2, 6 + k, 3), weight(3, 9), indices(9, 2, 6 + k)

    reports = beside_eager(program, given, 2, dynamic=True)
    assert [len(report.regions) for report in reports] == [1]


def test_integers_that_are_drawn_for_each_value_are_drawn_outside():
    def program(x, up, down):
        h = x @ up
        return (h * torch.randint(0, 2, h.shape)).tanh() @ down

    assert looped_regions(beside_eager(program, mlp_inputs)) == 1


def test_ops_on_nested_tensors_are_told_and_left_alone():
    def program(rows, up, down):
        tokens = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 3, 8]))
        made = tokens + F.dropout(F.silu(tokens @ up), 0.0) @ down
        return made.values() + F.silu(made.values() @ up) @ down

    (report,) = beside_eager(program, lambda _: (leaf(8, 3), leaf(3, 8), leaf(8, 3)))
    assert len(report.regions) == 1
    assert [refusal.reason for refusal in report.refusals] == ["SUBCLASS"]
    assert "works on values of NestedTensor" in report.refusals[0].text


def adapted_mlp(x, up, a, b, down):
    return (x @ up + x @ a @ b).tanh() @ down


@pytest.mark.parametrize(("rank", "features"), [(0, 4), (2, 0)])
def test_matrices_without_columns(rank, features):
    """As adapters of rank 0, and the smallest tails of adaptive softmaxes, have them."""

    def given(_):
        return leaf(21, 4), weight(4, 8), weight(4, rank), weight(rank, 8), weight(8, features)

    assert looped_regions(beside_eager(adapted_mlp, given, inner="eager")) == 1


@pytest.mark.parametrize("change", ["transpose_", "squeeze_", "unsqueeze_"])
def test_tokens_that_get_another_shape_in_place_later(change):
    """A captured value has the shape that it has in the end."""

    def program(x, up, down):
        with torch.no_grad():  # eager execution has saved the tokens otherwise, and raises an error
            tokens = x * 2
            y = (tokens @ up).tanh() @ down
            getattr(tokens, change)(*{"transpose_": (0, 1), "squeeze_": (0,), "unsqueeze_": (0,)}[change])
            return y, tokens + 1

    def given(_):
        return leaf(1, 7, 4), leaf(4, 8), leaf(8, 4)

    (report,) = beside_eager(program, given, inner="eager")
    assert not report.regions
    assert [refusal.reason for refusal in report.refusals] == ["MUTATION"]
