"""The graph with joined pieces computes what the graph with pieces does, or there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.fx.experimental.proxy_tensor import make_fx

from mst_fx.capture.decompositions import decompositions
from mst_fx.core.aten_ops import is_random
from mst_fx.recognise.joined_pieces import joined
from mst_fx.recognise.pieces import Apart, families

aten = torch.ops.aten
T, D, V = 32, 4, 12
NONE, SUM = 0, 2


def inputs(dtype=torch.float64):
    x, w = torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return x, w, torch.randint(0, V, (T,)), torch.rand(T, 1, dtype=dtype), torch.rand(V, dtype=dtype)


def lowered(program, given):
    """The aten graph of a program of logits, labels, a number for each token and one for each class."""

    def run(x, w, y, of_token, of_class):
        return program(F.linear(x, w), y, of_token, of_class)

    gm = make_fx(run, decomposition_table=decompositions(), tracing_mode="fake")(*given)
    gm.graph.eliminate_dead_code()
    return gm, [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]


def weighted_sums(logits, y, of_token, of_class):
    logs = logits.log_softmax(-1).split(8)
    return [aten.nll_loss_forward(z, t, of_class, SUM, 3)[0] for z, t in zip(logs, y.split(8), strict=True)]


def smoothed_means(logits, y, of_token, of_class):
    pieces = zip(logits.split(8), y.split(8), strict=True)
    return [F.cross_entropy(z, t, of_class, ignore_index=2, label_smoothing=0.2) for z, t in pieces]


def scaled(logits, y, of_token, of_class):
    return [
        (z * u / of_class).logsumexp(-1)
        for z, u in zip(logits.split([5, 20, 7]), of_token.split([5, 20, 7]), strict=True)
    ]


def best_of_each_token(logits, y, of_token, of_class):
    return [item for z in logits.split(8) for item in z.max(-1)]


def sums_of_each_position(logits, y, of_token, of_class):
    return [z.exp().sum((0, 2)) for z in logits.view(8, 4, V).split(2)]


def total_sums(logits, y, of_token, of_class):
    return [each for z in logits.split(8) for each in (z.exp().sum(), z.sum((0, 1), True, dtype=torch.float32))]


def pairs_of_classes(logits, y, of_token, of_class):
    return [z.view(-1, V // 2, 2).softmax(-1).square().sum((1, 2)) for z in logits.split([12, 20])]


def sequences_flattened(logits, y, of_token, of_class):
    return [z.reshape(-1, V).logsumexp(-1) for z in logits.view(2, 16, V).split([4, 12], 1)]


def two_readers_of_one_kind(logits, y, of_token, of_class):
    both = zip(logits.split(8), of_token.split(8), of_token.flip(0).split(8), strict=True)
    return [each.logsumexp(-1) for z, a, b in both for each in (z * a, z * b)]


def joined_again(logits, y, of_token, of_class):
    return torch.cat([(z + of_class).logsumexp(-1) for z in logits.split(8)]) * 2, logits.logsumexp(-1)


def some_tokens_in_another_order(logits, y, of_token, of_class):
    scores = (logits / 0.7 + of_class).view(2, 16, V)
    return [scores[i, a:b].logsumexp(-1) for i, a, b in ((1, 2, 9), (0, 0, 16), (1, 9, 12))]


def marks_counted(logits, y, of_token, of_class):
    return [(z > 0).sum() for z in logits.split(8)]


JOINED = [
    weighted_sums,
    smoothed_means,
    scaled,
    best_of_each_token,
    sums_of_each_position,
    total_sums,
    pairs_of_classes,
    sequences_flattened,
    two_readers_of_one_kind,
    joined_again,
    some_tokens_in_another_order,
    marks_counted,
]


@pytest.mark.parametrize("program", JOINED)
def test_joined_pieces_have_the_values_of_pieces(program):
    given = inputs()
    gm, examples = lowered(program, given)
    expected = gm(*given)
    whole = joined(gm, examples)
    assert whole is not None
    assert not list(families(whole.graph))
    for value, own in zip(whole(*given), expected, strict=True):
        torch.testing.assert_close(value, own)


def divided_by_its_sum(logits, y, of_token, of_class):
    return [(z.exp() / z.exp().sum()).logsumexp(-1) for z in logits.split(8)]


def divided_by_its_kept_sum(logits, y, of_token, of_class):
    return [(z.exp() / z.exp().sum((0, 1), True)).logsumexp(-1) for z in logits.split(1)]


def sums_of_as_many_classes_as_tokens(logits, y, of_token, of_class):
    return [z.exp().sum(0).square().sum() for z in (logits[:V], logits[V : 2 * V])]


def losses_that_tell_their_weight(logits, y, of_token, of_class):
    logs = logits.log_softmax(-1).split(8)
    parts = zip(logs, y.split(8), strict=True)
    return [item for z, t in parts for item in aten.nll_loss_forward(z, t, of_class, SUM, 3)]


def weights_of_each_piece(logits, y, of_token, of_class):
    logs = logits.log_softmax(-1).split(16)
    weights = (of_class, of_class * 2)
    return [aten.nll_loss_forward(z, t, a, SUM, 3)[0] for z, t, a in zip(logs, y.split(16), weights, strict=True)]


def as_many_classes_as_tokens(logits, y, of_token, of_class):
    first, second = logits[:V], logits[V : 2 * V]
    return first.logsumexp(0), second.logsumexp(1)


def norms_of_pieces(logits, y, of_token, of_class):
    return [torch.nansum(z.exp(), (0, 1)) for z in logits.split(8)]


def scales_for_all_tokens_or_for_each(logits, y, of_token, of_class):
    first, second = logits.split(16)
    return (first * of_token[:16]).logsumexp(-1), (second * of_token[:1]).logsumexp(-1)


def scales_in_two_dtypes(logits, y, of_token, of_class):
    first, second = logits.float().split(16)
    return (first * of_token[:16]).logsumexp(-1), (second * of_token[16:].float()).logsumexp(-1)


def members_and_what_joins_them(logits, y, of_token, of_class):
    norms = [z.logsumexp(-1, keepdim=True) for z in logits.split(16)]
    return [(z - norm).exp().sum(-1) for z, norm in zip(logits.split(16), reversed(norms), strict=True)]


def operands_the_other_way_round(logits, y, of_token, of_class):
    first, second = logits.exp().split(16)
    return torch.addcdiv(first, first, of_class).logsumexp(-1), torch.addcdiv(second, of_class, second).logsumexp(-1)


def options_by_name(logits, y, of_token, of_class):
    first, second = logits.split(16)
    return torch.add(first, of_class, alpha=2).logsumexp(-1), torch.add(second, of_class, alpha=3).logsumexp(-1)


def groups_of_other_sizes(logits, y, of_token, of_class):
    first, second = logits.split(16)
    return first.view(-1, 4, 3).logsumexp(-1), second.view(-1, 6, 2).logsumexp(-1)


def another_op(logits, y, of_token, of_class):
    first, second = logits.split(16)
    return first.sin().logsumexp(-1), second.cos().logsumexp(-1)


def joined_along_the_classes(logits, y, of_token, of_class):
    return torch.cat([z * 2 for z in logits.split(16)], 1)


def sequences_joined_along_the_tokens(logits, y, of_token, of_class):
    return torch.cat([z.reshape(-1, V) * 2 for z in logits.view(2, 16, V).split(4, 1)]).logsumexp(-1)


def sums_of_a_piece_and_of_the_tokens_of_another(logits, y, of_token, of_class):
    first, second = logits.exp().split(16)
    return first.sum((0, 1)).square(), second.sum((1,)).square().sum()


def sorted_tokens(logits, y, of_token, of_class):
    return [z.sort(0)[0].logsumexp(-1) for z in logits.split(8)]


def best_token_of_each_class(logits, y, of_token, of_class):
    return [z.max(0)[0].square().sum() for z in logits.split(8)]


def returned(logits, y, of_token, of_class):
    return [z.exp() for z in logits.split(8)]


APART = [
    divided_by_its_sum,
    divided_by_its_kept_sum,
    sums_of_as_many_classes_as_tokens,
    losses_that_tell_their_weight,
    weights_of_each_piece,
    as_many_classes_as_tokens,
    norms_of_pieces,
    scales_for_all_tokens_or_for_each,
    scales_in_two_dtypes,
    members_and_what_joins_them,
    operands_the_other_way_round,
    options_by_name,
    groups_of_other_sizes,
    another_op,
    joined_along_the_classes,
    sequences_joined_along_the_tokens,
    sums_of_a_piece_and_of_the_tokens_of_another,
    sorted_tokens,
    best_token_of_each_class,
    returned,
]


@pytest.mark.parametrize("program", APART)
def test_pieces_that_are_not_alike_are_not_joined(program):
    gm, examples = lowered(program, inputs())
    with pytest.raises(Apart):
        joined(gm, examples)


def test_numbers_that_are_drawn_twice_stay_two():
    """Ops that look the same are one op, but for draws."""

    def program(logits, y, of_token, of_class):
        first, second = (logits + torch.rand_like(logits) for _ in range(2))
        return [z.logsumexp(-1) for each in (first, second) for z in each.split(8)]

    gm, examples = lowered(program, inputs())
    drawn = [node for node in gm.graph.nodes if is_random(node.target)]
    whole = joined(gm, examples)
    assert whole is not None
    assert sum(is_random(node.target) for node in whole.graph.nodes) == len(drawn) == 2
