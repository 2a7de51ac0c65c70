"""Counts of keys: the ways to write them that are told, and what looks like one."""

from __future__ import annotations

import pytest
import torch
from looping import Call, aten_graph, indices, placeholders, returned, values
from torch.fx import Graph

from mst_fx.capture.decompositions import decompositions
from mst_fx.placement.rules.counting import DISTINCT, counted_key, feeds_groups, row_write

aten = torch.ops.aten
TOKENS, EACH, GROUPS = 5, 2, 4
KEYS, SCORES = indices(TOKENS, EACH, below=GROUPS), values(TOKENS, GROUPS)
ROWS, SOME = values(5, 2), torch.tensor([4, 0, 2])


def key_of(function, *inputs, distinct=False):
    """The input, or else the op, whose values a function counts; None where it counts nothing."""
    module = aten_graph(Call(function, inputs), decompositions())
    for node in placeholders(module):
        node.meta[DISTINCT] = distinct
    key = counted_key(returned(module)[0])
    while key is not None and key.target in (aten.view.default, aten.unsqueeze.default, aten._to_copy.default):
        key = key.args[0]
    return key if key is None or key.op != "placeholder" else placeholders(module).index(key)


def one_hot(keys):
    return (keys[..., None] == torch.arange(GROUPS)).long()


def ones_like_rows(keys):
    return keys.new_ones(keys.numel())


def zeros(keys):
    return keys.new_zeros(GROUPS)


WITH_REPEATS = {
    "histc": lambda keys: torch.histc(keys.double(), GROUPS, 0, GROUPS - 1),
    "one hot": lambda keys: one_hot(keys).sum((0, 1)),
    "one hot, dim by dim": lambda keys: one_hot(keys).float().sum(0).sum(0),
    "classes in front": lambda keys: (torch.arange(GROUPS)[:, None, None] == keys).sum((1, 2)),
    "classes between": lambda keys: (keys[:, None] == torch.arange(GROUPS)[:, None]).sum(-1).sum(0),
    "dims merged and moved": lambda keys: one_hot(keys).view(-1, GROUPS).t().sum(1),
    "a dim that is kept": lambda keys: (torch.arange(GROUPS)[:, None] == keys.flatten()).sum(1, keepdim=True).sum(1),
    "a row for each token": lambda keys: aten.scatter_add.default(
        keys.new_zeros(TOKENS, GROUPS), 1, keys, torch.ones_like(keys)
    ).sum(0),
    "one by one": lambda keys: torch.stack([(keys == each).sum() for each in range(GROUPS)]),
    "index_add": lambda keys: aten.index_add.default(zeros(keys), 0, keys.flatten(), ones_like_rows(keys)),
    "index_put": lambda keys: aten.index_put.default(zeros(keys), [keys.flatten()], ones_like_rows(keys), True),
    "one 1 for all": lambda keys: aten.index_put.default(zeros(keys), [keys.flatten()], keys.new_ones(()), True),
    "scatter_add": lambda keys: aten.scatter_add.default(zeros(keys), 0, keys.flatten(), ones_like_rows(keys)),
    "ones by another name": lambda keys: aten.scatter_add.default(
        torch.full([GROUPS], 0), 0, keys.flatten(), keys.new_full([1], 1).expand(keys.numel())
    ),
}


@pytest.mark.parametrize("count", WITH_REPEATS.values(), ids=WITH_REPEATS)
def test_keys_are_counted(count):
    assert key_of(count, KEYS) == 0
    assert torch.equal(count(KEYS).long(), KEYS.flatten().bincount(minlength=GROUPS))


def marked(keys):
    return keys.new_zeros(TOKENS, GROUPS).scatter(-1, keys, 1).sum(0)


def marked_along_the_tokens(scores):
    """The best tokens of each column, of which one may be in a row twice."""
    return torch.zeros(2, GROUPS, dtype=torch.int64).scatter(-1, scores.topk(2, 0)[1], 1).sum(0)


def test_a_mask_marks_a_key_once():
    """Two equal keys of one row would count as one."""
    assert key_of(marked, KEYS) is None
    assert key_of(marked, KEYS[:, :1]) == 0
    assert key_of(marked, KEYS, distinct=True) == 0
    assert key_of(lambda scores: marked(scores.topk(EACH)[1]), SCORES).target.__name__ == "getitem"
    assert key_of(lambda scores: marked(scores.topk(EACH)[1].int().long()), SCORES) is not None
    assert key_of(lambda scores: marked(scores.topk(EACH)[0].long()), SCORES) is None
    assert key_of(marked_along_the_tokens, values(GROUPS, 2)) is None


NOT_TOLD = {
    "the range of the values": lambda keys: torch.histc(keys.double(), GROUPS),
    "a sum that leaves a dim of keys": lambda keys: one_hot(keys).sum((0, 2)),
    "a sum that leaves two dims": lambda keys: one_hot(keys).sum(0),
    "more than one becomes one": lambda keys: one_hot(keys).sum(0).bool().sum(0),
    "one by one, not in turn": lambda keys: torch.stack([(keys == each).sum() for each in (0, 2, 1, 3)]),
    "one by one, of two": lambda keys: torch.stack([(keys[:, each] == each).sum() for each in range(2)]),
    "one by one, none or some": lambda keys: torch.stack([(keys == each).sum().bool() for each in range(GROUPS)]),
    "merged with the keys": lambda keys: one_hot(keys).view(-1, 2).sum(0),
    "classes from 1": lambda keys: (keys[..., None] == torch.arange(1, GROUPS + 1)).sum((0, 1)),
    "every other class": lambda keys: (keys[..., None] == torch.arange(0, 2 * GROUPS, 2)).sum((0, 1)),
    "a key for each class": lambda keys: (keys.repeat(1, 2) == torch.arange(GROUPS)).sum(0),
    "added to ones": lambda keys: aten.index_add.default(zeros(keys) + 1, 0, keys.flatten(), ones_like_rows(keys)),
    "twos": lambda keys: aten.index_add.default(zeros(keys), 0, keys.flatten(), ones_like_rows(keys), alpha=2),
    "other values": lambda keys: aten.scatter_add.default(zeros(keys), 0, keys.flatten(), keys.flatten()),
    "written, not added": lambda keys: aten.index_put.default(zeros(keys), [keys.flatten()], ones_like_rows(keys)),
    "marked by twos": lambda keys: keys.new_zeros(TOKENS, GROUPS).scatter(-1, keys[:, :1], 2).sum(0),
    "marked along the tokens": lambda keys: keys.new_zeros(GROUPS, EACH).scatter(0, keys, 1).sum(0),
}


@pytest.mark.parametrize("count", NOT_TOLD.values(), ids=NOT_TOLD)
def test_what_is_not_taken_for_a_count(count):
    assert key_of(count, KEYS, distinct=True) is None


@pytest.mark.parametrize(
    ("carried_by", "fed"),
    [
        ([(aten.cumsum.default, 0), (aten._to_copy.default,)], True),
        ([(aten.view.default, [-1]), (aten.cumsum.default, 0), (aten.view.default, [-1])], True),
        ([(aten.mul.Tensor, 2), (aten.cumsum.default, 0)], False),
    ],
)
def test_counts_that_say_where_groups_end(carried_by, fed):
    graph = Graph()
    rows, weight, keys = map(graph.placeholder, ("rows", "weight", "keys"))
    counts = ends = graph.call_function(aten.sum.dim_IntList, (keys, [0]))
    graph.call_function(aten.amax.default, (counts,))
    for op, *arguments in carried_by:
        ends = graph.call_function(op, (ends, *arguments))
    graph.call_function(aten._grouped_mm.default, (rows, weight, ends))
    assert feeds_groups(counts) == fed


def write_of(op):
    module = aten_graph(Call(op, [ROWS, SOME, values(3, 2)]))
    found = row_write(returned(module)[0])
    if found is not None and found.index in placeholders(module):
        assert [found.target, found.index, found.values] == placeholders(module)
    return found


def test_writes_to_rows():
    assert write_of(lambda x, i, y: aten.index_add.default(x, 0, i, y)).accumulates
    assert write_of(lambda x, i, y: aten.index_put.default(x, [i], y, True)).accumulates
    assert not write_of(lambda x, i, y: aten.index_put.default(x, [i], y)).accumulates
    assert write_of(lambda x, i, y: aten.scatter_add.default(x, 0, i[:, None].expand(3, 2), y)).accumulates
    assert not write_of(lambda x, i, y: aten.scatter.src(x, 0, i[:, None].expand(3, 2), y)).accumulates


def test_writes_to_something_else_than_rows():
    assert write_of(lambda x, i, y: aten.scatter_add.default(x, 0, i[:, None], y)) is None  # to one column
    assert write_of(lambda x, i, y: aten.index_add.default(x[:3], 1, i[1:] % 2, y)) is None
    assert write_of(lambda x, i, y: aten.index_put.default(x, [i, i % 2], y[:, 0])) is None
