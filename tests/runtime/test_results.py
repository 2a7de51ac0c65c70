"""Chunks of operands, and how the outputs of the chunks become the results of a loop."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, misaligned, of_a_larger_one, transposed
from looping import values

from mst_fx.runtime.result_kinds import Cat, Grouped, Outer, Rows, Sum, kind_of
from mst_fx.runtime.results import aligned, chunk_shape, chunks_of, collector_of, example, laid_out
from mst_fx.verify.by_chunks import EXACT, all_splits

BF16, F32 = torch.bfloat16, torch.float32


SHAPE = (4, 6, 3)
AXES = [(split.dim, split.outer, split.inner) for split in all_splits(SHAPE)]


def in_chunks(axis):
    """The positions of an axis of SHAPE, and every length that a chunk of it may have."""
    dim, outer, inner = axis
    total = SHAPE[dim] // (outer * inner)
    return [(total, length) for length in range(1, total + 1)]


def collected(kind, total, length, outputs):
    """The result of a loop whose body gave these outputs, chunk by chunk."""
    collector = collector_of(kind, total, length)
    for outs in outputs:
        given = iter(outs)
        collector.add(given)
        assert not list(given)  # it takes its own outputs, and all of them
    return collector.finished()


@pytest.mark.parametrize("layout", [of_a_larger_one, transposed], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("axis", AXES)
def test_chunks_make_up_the_whole(axis, layout):
    dim, outer, inner = axis
    x = layout(*SHAPE)
    for total, length in in_chunks(axis):
        parts = list(chunks_of(x, axis, length))
        lengths = [min(length, total - start) for start in range(0, total, length)]
        assert [list(part.shape) for part in parts] == [chunk_shape(SHAPE, axis, own) for own in lengths]
        assert all(part.is_contiguous() for part in parts)
        apart = [part.reshape(*SHAPE[:dim], outer, -1, inner, *SHAPE[dim + 1 :]) for part in parts]
        assert torch.equal(torch.cat(apart, dim + 1).reshape(SHAPE), x)


@pytest.mark.parametrize(
    ("axis", "expected"), [((1, 1, 1), [5, 3, 2]), ((1, 2, 1), [5, 2, 3, 2]), ((1, 2, 4), [5, 2, 3, 4, 2])]
)
def test_the_axis_has_a_dim_of_its_own(axis, expected):
    assert chunk_shape([5, 24, 2], axis, 3) == expected
    assert list(example(torch.empty(5, 24, 2), axis, 3).shape) == expected


def test_chunks_are_views_where_they_lie_in_one_piece():
    x = torch.randn(6, 4)
    assert [part.data_ptr() - x.data_ptr() for part in chunks_of(x, (0, 1, 1), 4)] == [0, 4 * 4 * 4]
    assert all(part.data_ptr() != x.data_ptr() for part in chunks_of(x, (1, 1, 1), 2))


@pytest.mark.parametrize("axis", AXES)
def test_outputs_are_written_to_their_places(axis):
    """A body gives an output with the axis merged with the factors around it."""
    dim = axis[0]
    whole = values(*SHAPE)
    for total, length in in_chunks(axis):
        parts = chunks_of(whole, axis, length)
        outputs = [[part.reshape(*SHAPE[:dim], -1, *SHAPE[dim + 1 :])] for part in parts]
        result = collected(Cat(*axis), total, length, outputs)
        assert torch.equal(result, whole)
        assert result.is_contiguous()


def test_a_result_of_one_chunk_shares_no_memory_with_the_output():
    outs = torch.randn(4, 3)
    for kind in (Cat(0, 1, 1), Sum(F32, F32)):
        result = collected(kind, 4, 4, [[outs]])
        assert torch.equal(result, outs)
        assert result.data_ptr() != outs.data_ptr()


def test_sums_of_transposed_outputs_are_contiguous():
    outs = [torch.randn(3, 2).t(), torch.randn(2, 3)]
    result = collected(Sum(F32, F32), 4, 2, [[out] for out in outs])
    torch.testing.assert_close(result, outs[0] + outs[1])
    assert result.is_contiguous()


SMALL = 2.0**-9
"""Added to 1 in bfloat16 it is lost; 512 of them are not."""


def small_steps(count):
    return [torch.ones(16, 16, dtype=BF16), *[torch.full((16, 16), SMALL, dtype=BF16)] * count]


@pytest.mark.parametrize(("dtype", "expected"), [(F32, 2.0), (BF16, 1.0)])
def test_sums_add_up_in_their_own_dtype(dtype, expected):
    outs = small_steps(512)
    result = collected(Sum(dtype, BF16), len(outs), 1, [[out] for out in outs])
    assert (result.dtype, result.unique().tolist()) == (BF16, [expected])
    assert outs[0].unique().tolist() == [1.0]  # the outputs stay as they are


@pytest.mark.parametrize(("dtype", "expected"), [(F32, 2.0), (BF16, 1.0)])
def test_sums_of_products_add_up_in_their_own_dtype(dtype, expected):
    identity = torch.eye(16, dtype=BF16)
    result = collected(Outer(dtype, BF16), 513, 1, [[identity, out] for out in small_steps(512)])
    assert (result.dtype, result.unique().tolist()) == (BF16, [expected])


def test_one_chunk_alone_needs_no_other_dtype():
    one, several = (collector_of(Sum(F32, BF16), 8, length) for length in (8, 4))
    for collector in (one, several):
        collector.add(iter([torch.ones(2, dtype=BF16)]))
    assert [collector._total.dtype for collector in (one, several)] == [BF16, F32]


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("length", [2, 3, 7])
def test_products_of_outputs_add_up(length, batch):
    a, b = values(*batch, 7, 3), values(*batch, 7, 5, seed=1)
    outputs = zip(a.split(length, -2), b.split(length, -2), strict=True)
    result = collected(Outer(torch.float64, torch.float64), 7, length, outputs)
    torch.testing.assert_close(result, a.mT @ b, **EXACT)
    assert result.is_contiguous()


@pytest.mark.parametrize(("dtype", "expected"), [(F32, 2.0), (BF16, 1.0)])
def test_sums_of_products_of_groups_add_up_in_their_own_dtype(dtype, expected):
    """The second group has rows in the first chunk alone."""
    identity = torch.eye(16, dtype=BF16).repeat(2, 1)
    outputs = [[identity, out.repeat(2, 1), torch.tensor([16, 16], dtype=torch.int32)] for out in small_steps(512)]
    outputs[0][2][1] = 32
    result = collected(Grouped(dtype, BF16), 513, 1, outputs)
    assert (result.dtype, result[0].unique().tolist(), result[1].unique().tolist()) == (BF16, [expected], [1.0])


@pytest.mark.parametrize("length", [2, 3, 7])
@pytest.mark.parametrize(
    ("axis", "sizes"), [((0, 1, 1), (0, 5)), ((1, 1, 1), (1, 0, 5)), ((0, 1, 4), (0, 5)), ((0, 1, 1), (0, 4, 5))]
)
def test_rows_are_sums_of_products(axis, sizes, length):
    """Two products a chunk; a position of the axis may have several rows."""
    each = 4 if 4 in (axis[2], *sizes) else 1
    factors = [values(7 * each, 3), values(3, 5), values(7 * each, 2, seed=1), values(2, 5, seed=1)]
    parts = [factors[0].split(each * length), factors[2].split(each * length)]
    outputs = [[a, factors[1], b, factors[3]] for a, b in zip(*parts, strict=True)]
    result = collected(Rows(2, axis, sizes), 7, length, outputs)
    expected = factors[0] @ factors[1] + factors[2] @ factors[3]
    torch.testing.assert_close(result, expected.view(result.shape), **EXACT)
    assert [size for size in sizes if size] == [size for size in result.shape if size in sizes]


@pytest.mark.parametrize(
    "kind",
    [Cat(1, 2, 3), Sum(F32, BF16), Outer(F32, BF16), Grouped(F32, BF16), Rows(2, (0, 1, 4), (0, 5))],
    ids=lambda kind: kind.name,
)
def test_a_literal_stands_for_its_kind(kind):
    assert kind_of(kind.literal) == kind
    assert kind_of(eval(repr(kind.literal))) == kind  # generated code holds it as text


def test_aligned_memory_is_left_as_it_is():
    x, odd = torch.ones(8), misaligned(2, 3)
    assert aligned(x) is x
    assert torch.equal(aligned(odd), odd)
    assert not aligned(odd).data_ptr() % 16


@pytest.mark.parametrize("strides", [None, (1, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_whole_operand_is_brought_to_the_layout_of_the_bodies(layout, strides):
    x = layout(4, 6)
    ours = laid_out(x, strides)
    assert torch.equal(ours, x)
    assert ours.stride() == (strides or (6, 1))
    assert not ours.data_ptr() % 16  # compiled code may read 16 bytes at a time


def test_a_whole_operand_that_lies_as_it_should_is_not_copied():
    x = torch.randn(6, 4)
    assert laid_out(x, None).data_ptr() == laid_out(x.t(), (1, 4)).data_ptr() == x.data_ptr()
    assert example(x.t(), None, 0, (1, 4)).stride() == (1, 4)
