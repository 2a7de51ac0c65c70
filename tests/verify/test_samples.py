"""Random numbers for a run: of which kinds, for which values, in which layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import region_of, sketched

import mst_fx
from mst_fx.bodies.work import analysed
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import close
from mst_fx.verify.excerpt import Excerpt, excerpt
from mst_fx.verify.samples import (
    KINDS,
    Kind,
    as_given,
    draw,
    in_float64,
    live_ins_of,
    lowest_precision,
    nudged,
    plain,
)

T, D, V = 40, 4, 6


def of(fn, *inputs, capture=sketched) -> Excerpt:
    region, config = region_of(capture(fn, *inputs)), mst_fx.Config()
    return excerpt(region, analysed(region, config, {}), config)


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def drawn(found, kind=KINDS[0], seed=0, detached=()):
    return draw(found, kind, seed, detached)


def head(x, w, labels):
    return F.cross_entropy(x @ w, labels, ignore_index=77)


@pytest.fixture(scope="module")
def of_a_head():
    return of(head, *leaves((T, D), (D, V)), torch.randint(0, V, (T,)))


def labels_in(samples):
    return samples.live_ins[2]


def test_numbers_come_again_with_the_seed(of_a_head):
    one, again, other = (drawn(of_a_head, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.live_ins, again.live_ins, strict=True))
    assert not torch.equal(one.live_ins[0], other.live_ins[0])
    before = torch.get_rng_state()
    drawn(of_a_head)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_classes_and_some_are_to_be_ignored(of_a_head):
    assert set(labels_in(drawn(of_a_head)).tolist()) - {77} <= set(range(min(D, V)))
    assert 77 in labels_in(drawn(of_a_head))
    assert 77 not in labels_in(drawn(of_a_head, Kind(marked=False)))
    assert set(labels_in(drawn(of_a_head, Kind(True, False, 2))).tolist()) == {0, 1}
    assert set(labels_in(drawn(of_a_head, KINDS[-1])).tolist()) == {0}


def test_floats_are_normal_or_above_zero_and_weights_are_small(of_a_head):
    tokens, weight, _ = drawn(of_a_head).live_ins
    assert (tokens < 0).any()
    assert (tokens.shape, weight.shape) == ((T, D), (D, V))
    assert weight.std() < 0.7 * tokens.std()
    assert all((x > 0).all() for x in drawn(of_a_head, Kind(signed=False)).live_ins[:2])


def test_gradients_of_outputs_that_send_one_back():
    def program(x, w):
        logits = x @ w
        return logits, logits.logsumexp(-1), logits.argmax(-1)

    found = of(program, *leaves((T, D), (D, V)))
    logits, *_ = found.region.outputs
    assert [None if x is None else tuple(x.shape) for x in drawn(found).upstream] == [(T, V), (T,), None]
    assert [x is None for x in drawn(found, detached=(logits,)).upstream] == [True, False, True]


def test_booleans_and_what_a_top_k_has_picked():
    gm = sketched(lambda x, mask: x.topk(3)[1] * x.sum(-1, keepdim=True) * mask, *leaves((T, D)), torch.ones(T, 1) > 0)
    _, items, *nodes = (node for node in gm.graph.nodes if node.op.startswith("call"))
    region = close(Reader(gm), nodes, nodes[0].all_input_nodes[0])
    found = excerpt(region, analysed(region, mst_fx.Config(), {}), mst_fx.Config())
    values = dict(zip((node.name for node in region.live_ins), drawn(found).live_ins, strict=True))
    picked, mask = values[items.name], values["mask"]
    assert all(len(set(row)) == 3 for row in picked.tolist())
    assert mask.dtype == torch.bool
    assert 0 < mask.sum() < T


def test_live_ins_lie_in_memory_as_in_the_program():
    x = torch.randn(D, 2 * T).t()[::2].requires_grad_()
    down, row = torch.randn(V, D).t(), torch.randn(1, V).expand(D, V)
    found = of(lambda x, down, row: x @ down + x @ row, x, down, row)
    given = live_ins_of(found, drawn(found), as_given)
    assert [value.stride() for value in given] == [x.stride(), down.stride(), (0, 1)]
    assert [value.requires_grad for value in given] == [True, False, False]
    assert torch.equal(given[0], drawn(found).live_ins[0])
    assert torch.equal(given[2], given[2][:1].expand(D, V))


@pytest.mark.parametrize("strides", [(1, 1), (1000, 1), (1, 1000)])
def test_values_that_overlap_or_leave_large_gaps_are_dense(strides):
    x = torch.empty_strided((T, D), strides)
    found = of(lambda x: x.exp(), x.as_strided((T, D), strides))
    (given,) = live_ins_of(found, drawn(found), as_given)
    assert given.untyped_storage().nbytes() == T * D * 4
    assert torch.equal(given, drawn(found).live_ins[0])
    assert (given.stride(0) < given.stride(1)) == (strides[0] < strides[1])


def test_floats_alone_are_converted_or_nudged():
    x, labels = torch.linspace(1, 2, T * D).view(T, D).bfloat16(), torch.arange(T)
    assert in_float64(x, x).dtype == torch.float64
    assert in_float64(labels, labels) is labels
    wide = x.float()
    moved = nudged(wide, wide, 1e-3, 0)
    assert 1e-4 < ((moved - wide) / wide).abs().max() < 1e-2
    assert torch.equal(moved, nudged(wide, wide, 1e-3, 0))
    assert not torch.equal(moved, nudged(wide, wide, 1e-3, 1))
    assert torch.equal(nudged(labels, labels, 1e-3, 0), labels)


def test_numbers_that_are_no_tensors(of_a_head):
    assert [plain(of_a_head, value) for value in (3, 0.25, None)] == [3, 0.25, None]


@pytest.mark.parametrize(
    ("dtypes", "lowest"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.float64, torch.float64), torch.float64),
        ((torch.float32, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float32), torch.float16),
    ],
)
def test_the_coarsest_dtype_that_is_computed_in(dtypes, lowest):
    first, then = dtypes
    found = of(lambda x: x.exp().to(then).sin().to(first), *leaves((T, D), dtype=first))
    assert lowest_precision(found) == lowest
