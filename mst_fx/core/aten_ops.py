"""This file lists what the pass knows of aten ops, by what they have in common. No other file lists ops.

Families        what an op is, under the field's names
Linearity       through which of its operands a sum may go
Kernels         whether a compiler generates a kernel for the op, and fuses it with the ops around it
Backward        what the op's backward reads, and whether a compiler recomputes the op's result for it
Reading         what a node of a captured graph is, by the ops that it decomposes into

Every op that has a placement rule has a place in each of the last three (`tests/core/test_aten_ops.py`). Ops that torch
tags as pointwise stand in a list only where they differ from other elementwise ops.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from mst_fx.core.torch_private.collectives import COLLECTIVES, EXCHANGES, WAITS

aten = torch.ops.aten

# Families: views, which have no memory of their own.

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
"""The same elements in the same order, in another shape."""
PERMUTES = (aten.t.default, aten.transpose.int, aten.permute.default)
"""The same elements with the dims in another order."""
SLICES = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default)
"""Slices of a dim, which stays a dim."""
SELECTS = (aten.select.int, aten.unbind.int)
"""Single positions of a dim, which goes away."""
VIEWS = (*RESHAPES, *PERMUTES, *SLICES, aten.expand.default, *SELECTS, operator.getitem)
"""Views of existing memory, whole or sliced; or one of several results."""
ALIASES = (aten.detach.default, aten.alias.default)
"""The same memory in the same shape."""
DIAGONALS = (aten.diagonal.default,)
"""The diagonals of two dims."""

# Families: ops that make a value from a shape.

FILLS = (
    aten.empty.memory_format,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
"""Fills of a `size` with one value, or with none: any slice of such a value can be made alone."""
FILLS_LIKE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
"""Fills with the shape of an operand; they do not read its values."""
FILL_VALUES: dict[Any, int] = {aten.full.default: 1, aten.new_full.default: 2, aten.full_like.default: 1}
"""Fills with a given value, and the position of that value among the arguments."""
ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
"""Fills with zeros."""
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
"""Positions: 0, 1, 2, ..., or other numbers at equal distances."""
DRAWS = (aten.randint.low,)
"""Random numbers without operands, which can be drawn once, before a loop."""
SCALARS = (aten.scalar_tensor.default,)
"""A number as a tensor without dims."""

# Families: elementwise ops, besides those that torch tags as pointwise.

CASTS = (aten._to_copy.default, aten.clone.default, *ALIASES)
"""The same values in the same shape, at most in another dtype or in other memory."""
COPIES = (
    *CASTS,
    aten.lift_fresh_copy.default,
    *FILLS_LIKE,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.copy.default,
    aten.zero.default,
)
"""Values in the shape of an operand, copied from an operand or filled in."""
UNTAGGED_POINTWISE = (aten.leaky_relu.default, aten.hardswish.default, aten.rsub.Tensor, aten.masked_fill.Tensor)
"""Elementwise ops that not every version of torch tags as such."""

# Families: matrix products.

GROUPED_PRODUCTS = (aten._grouped_mm.default,)
"""Each group of rows times a matrix of its own."""
PRODUCTS = (aten.mm.default, aten.bmm.default)
"""[.., n, k] @ [.., k, m]."""
PRODUCTS_PLUS = (aten.addmm.default, aten.baddbmm.default)
"""A bias, which broadcasts, plus such a product."""
SCALED_PRODUCTS = (aten._scaled_mm.default,)
"""[n, k] @ [k, m] in few bits, times a scale for all, or one for each row and each column."""
ONE_PRODUCT = (aten.mm.default, aten.addmm.default, *SCALED_PRODUCTS)
"""A product with one matrix, not with one for each of a batch or of groups."""
CONTRACTIONS = (*PRODUCTS, *PRODUCTS_PLUS, *GROUPED_PRODUCTS, *SCALED_PRODUCTS)
"""Matrix products of any kind."""

# Families: attention.

ATTENTIONS = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
)
"""Attention in one kernel: (result, logsumexp of the scores, ...) of queries, keys and values [B, heads, T, D]."""
ATTENTION_GRADIENTS: dict[Any, Any] = {
    op: getattr(aten, f"{op._schema.name.removeprefix('aten::')}_backward").default for op in ATTENTIONS
}
"""The op that computes the gradients of queries, keys and values, for each of these."""

# Families: reductions, scans and norms.

SUMS = (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
)
"""Reductions that add up: the results for the chunks of a dim add up to the result for the dim."""
REDUCTIONS = (
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
    aten.mean.default,
    aten.mean.dim,
    aten.prod.default,
    aten.prod.dim_int,
    aten.var.correction,
    aten.std.correction,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.default,
    aten.all.dim,
    aten.all.dims,
    aten.max.default,
    aten.min.default,
    aten.median.default,
    aten.nanmedian.default,
    aten.linalg_vector_norm.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
)
"""Reductions with one result that do not add up like this."""
REDUCTIONS_TO_TWO = (
    aten.var_mean.correction,
    aten.std_mean.correction,
    aten.max.dim,
    aten.min.dim,
    aten.aminmax.default,
    aten.kthvalue.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
)
"""Reductions with two results of one shape."""
SOFTMAXES = (aten._softmax.default, aten._log_softmax.default)
"""Normalisation of each row by the sum of its exponentials."""
SORTS = (aten.sort.default, aten.sort.stable)
"""(sorted values, permutation) along a dim."""
SCANS = (
    *SOFTMAXES,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.logcumsumexp.default,
    *SORTS,
    aten.topk.default,
)
"""Ops whose results have all dims of the operand, and that mix only positions of the argument `dim`."""
COUNTS = (aten.histc.default,)
"""Counts of the values in each of several ranges."""
LAYER_NORMS = (aten.native_layer_norm.default, aten._fused_rms_norm.default)
"""Normalisation over the last dims, and its statistics."""
GROUP_NORMS = (aten.native_group_norm.default,)
"""Normalisation of each image over groups of its channels, and its statistics."""
LOSSES = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
"""(negative log-likelihood, total weight) of rows or of images."""
NONE, MEAN, SUM = 0, 1, 2
"""aten's codes for the argument `reduction` of a loss."""

# Families: reads and writes at indices.

GATHERS = (aten.gather.default,)
"""Reads with an index for each element."""
LOOK_UPS = (aten.embedding.default, aten.index.Tensor)
"""Reads of rows of a table; the gradient is as large as the table, and adds up in float32."""
ROW_PICKS = (aten.index.Tensor, aten.gather.default, aten.index_select.default)
"""Reads that can permute rows, or undo that."""
SEARCHES = (aten.bucketize.Tensor, aten.isin.Tensor_Tensor)
"""Ops that look up each value among whole values."""
SORTED_SEARCHES = (aten.searchsorted.Tensor,)
"""Ops that look up each value in one sorted row, or each row in a sorted row of its own."""
SCATTERS = (
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)
"""Writes with an index for each written element."""
ROW_WRITES = (aten.index_add.default, aten.index_copy.default, aten.index_reduce.default, aten.index_fill.int_Scalar)
"""Writes with an index for each row."""
PUTS = (aten.index_put.default,)
"""Writes with indices of several dims."""
ROW_ADDS = (aten.scatter_add.default, *PUTS, aten.index_add.default)
"""Writes that can add rows to the rows that a permutation names."""
SLICE_WRITES = (aten.slice_scatter.default, aten.select_scatter.default)
"""Writes to a slice, or to one position, of one dim."""

# Families: ops that move values.

JOINS = (aten.cat.default, aten.stack.default)
"""Several values along one dim."""
TILES = (aten.repeat.default,)
"""A value several times along each dim."""
FLIPS = (aten.flip.default, aten.rot90.default)
"""Positions of the argument `dims` in reverse."""
ROLLS = (aten.roll.default,)
"""Positions shifted round."""
UNFOLDS = (aten.unfold.default,)
"""Overlapping windows of one dim."""
PADS = (aten.constant_pad_nd.default,)
"""Positions added before and after those of a dim."""
TRIANGLES = (aten.tril.default, aten.triu.default)
"""One half of each matrix."""
PADS_AND_POOLS: dict[int, tuple[Any, ...]] = {
    1: (aten.reflection_pad1d.default, aten.replication_pad1d.default),
    2: (
        aten.reflection_pad2d.default,
        aten.replication_pad2d.default,
        aten.avg_pool2d.default,
        aten.max_pool2d_with_indices.default,
        aten._adaptive_avg_pool2d.default,
        aten.adaptive_max_pool2d.default,
    ),
    3: (aten.avg_pool3d.default, aten._adaptive_avg_pool3d.default),
}
"""Paddings and poolings of images, by how many of the last dims they mix."""
CHANNEL_SHUFFLES = (aten.channel_shuffle.default,)
"""Channels in another order."""
PIXEL_SHUFFLES = (aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
"""Channels that become pixels, or the other way round."""
_IMAGES = tuple(op for ops in PADS_AND_POOLS.values() for op in ops) + CHANNEL_SHUFFLES + PIXEL_SHUFFLES
_MOVES = (*JOINS, *TILES, *FLIPS, *ROLLS, *UNFOLDS, *PADS, *TRIANGLES, *_IMAGES)
_READS = (*GATHERS, *LOOK_UPS, *ROW_PICKS, *SEARCHES, *SORTED_SEARCHES)
_WRITES = (*SCATTERS, *ROW_WRITES, *PUTS, *SLICE_WRITES)
_REDUCTIONS = (*SUMS, *REDUCTIONS, *REDUCTIONS_TO_TWO, *COUNTS, *LAYER_NORMS, *GROUP_NORMS, *LOSSES)
_MADE = (*FILLS, *RANGES, *DRAWS, *SCALARS)

# Linearity: f(a + b) = f(a) + f(b).

LINEAR_IN_FIRST = (
    *RESHAPES,
    *PERMUTES,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.neg.default,
    aten.clone.default,
    aten.detach.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.div.Tensor,
    *EXCHANGES,
    *WAITS,
)
"""Ops that are linear in the first operand, where no other operand is a partial sum."""
LINEAR_IN_ONE = (aten.mul.Tensor,)
"""Ops that are linear in either operand, where the other one is no partial sum."""
CHOICES = (aten.where.self,)
"""Ops that take each element from one of two operands, as a mask says."""
LINEAR_IN_ALL = (aten.add.Tensor, aten.sub.Tensor, *JOINS)
"""Ops that are linear in all operands together."""

# Chunks and permutations of a split value.

MADE_IN_CHUNKS = (*FILLS, aten.expand.default)
"""Ops that can make the rows of one chunk alone, given the sizes of a chunk."""
KEEP_PERMUTATION = (*RESHAPES, *CASTS, aten.expand.default)
"""Ops that leave the entries of a permutation of rows as they are."""
WITHOUT_GRADIENT = (aten.detach.default, *FILLS, *FILLS_LIKE)
"""Ops whose floating-point result passes no gradient back to the operands."""

# Kernels.

SHOWS_MEMORY = frozenset([*VIEWS, *ALIASES, *WAITS])
"""Ops without a buffer of their own: their value lies in the buffer of their operand."""
UNFUSED = frozenset(
    [
        *CONTRACTIONS,
        *ATTENTIONS,
        *ATTENTION_GRADIENTS.values(),
        *COLLECTIVES,
        *SORTS,
        aten.histc.default,
        aten.cumsum.default,
        aten.topk.default,
        aten.as_strided.default,
    ]
)
UNFUSED -= SHOWS_MEMORY
"""Ops without a generated kernel, or whose operand must lie in memory: they read buffers and make buffers."""
FUSED = frozenset([*COPIES, *UNTAGGED_POINTWISE, *_MADE, *_REDUCTIONS, *SCANS, *_READS, *_WRITES, *_MOVES, *DIAGONALS])
FUSED -= SHOWS_MEMORY | UNFUSED
"""Ops, besides those tagged pointwise, that are fused: their value is a buffer where an unfused op reads it."""
REDUCE_THEN_MAP = frozenset([aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default])
"""Ops that reduce what they read before they map it, in one kernel; a softmax reduces in a kernel of its own."""
NORMALISE = frozenset([*SOFTMAXES, *LAYER_NORMS])
"""Ops that reduce rows, and then map their elements with the results: two loops over what they read."""
COSTLY = frozenset(
    [
        aten.exp.default,
        aten.log.default,
        aten.log10.default,
        aten.log1p.default,
        aten.log2.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.tanh.default,
    ]
)
"""Functions that a C++ kernel does not compute twice for one element; in torch 2.11, of these exp and sigmoid alone."""
PICK_ENTRIES = frozenset([aten.nll_loss_forward.default, aten.gather.default])
"""Ops that read a few entries of their operand, in a kernel of their own. It runs before the kernel that maps all
entries, unless that kernel also computes the softmax whose entries are picked."""

# Backward.

LINEAR = frozenset([*VIEWS, *LINEAR_IN_FIRST, *LINEAR_IN_ALL, aten._to_copy.default, aten.mean.dim, aten.index.Tensor])
LINEAR -= {aten.div.Tensor}
"""Ops whose backward reads no operand."""
BILINEAR = LINEAR | {aten.mul.Tensor, aten.div.Tensor, *CONTRACTIONS}
"""These, ops whose backward reads one operand for the gradient of another, and division (reads the denominator)."""
RECOMPUTED = frozenset([*VIEWS, *COPIES, *UNTAGGED_POINTWISE, *_MADE, *_REDUCTIONS, *SCANS, *_READS, *_WRITES])
RECOMPUTED |= {*_MOVES, *DIAGONALS}
"""Ops, besides those tagged pointwise, whose result a compiler recomputes for backward; it saves all others."""

# Reading.

VIEWS_AND_CASTS = (*VIEWS, aten._to_copy.default, aten.clone.default)
"""Ops that give a value in another form, or a slice of it."""
PICKS = (*VIEWS_AND_CASTS, aten.index.Tensor, aten.index_select.default)
"""Ops that give a weight in another form, or some of its entries."""
REPEATS = (aten.index.Tensor, aten.index_select.default, *GATHERS, *TILES, aten.clone.default)
"""Ops that can repeat rows; a copy of an expanded value does."""
SHOWN_TO_CALLERS = (*VIEWS, aten.detach.default, *JOINS)
"""Ops that hand values to a caller unchanged: views of them, or several joined."""
MOVES = (*RESHAPES, *PERMUTES, operator.getitem, aten.clone.default, aten.detach.default, *EXCHANGES, *WAITS)
"""Ops that give the same elements in another shape or order, or to another rank."""
CUTS = (aten.slice.Tensor, aten.select.int)
"""Ops that keep positions from a start to an end."""
MADE_OF_NOTHING = (*FILLS, *RANGES, *FILLS_LIKE)
"""Ops that make new memory and fill it with one value, with positions or with nothing."""
COMPUTES = frozenset([*COPIES, *UNTAGGED_POINTWISE, *DRAWS, *SCALARS, *_REDUCTIONS, *SCANS, *_READS, *_WRITES])
COMPUTES |= {*_MOVES, *DIAGONALS, *COLLECTIVES, *ATTENTIONS}
COMPUTES -= {*CONTRACTIONS, *PICKS, *REPEATS, *SHOWN_TO_CALLERS, *MADE_OF_NOTHING}
"""Ops, besides those tagged pointwise, that compute something; a reader knows nothing more of them."""


ATTENTION = tuple(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""Attention as one kernel; what its backward needs is measured (`tests/predict/test_segments.py`)."""


def is_pointwise(op: object) -> bool:
    """Return whether torch itself tags an op as elementwise."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags


def is_random(op: object) -> bool:
    """Return whether an op draws random numbers."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def is_mutable(op: object) -> bool:
    """Return whether an op writes to one of its operands."""
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def is_recomputed(op: object) -> bool:
    """Return whether a compiler recomputes an op's result for backward, in place of saving it."""
    return op in RECOMPUTED or is_pointwise(op)


def has_known_memory(op: object) -> bool:
    """Return whether the model of memory knows what an op allocates: its results alone, or what has been measured."""
    known = op in RECOMPUTED or op in UNFUSED or op in ATTENTION or is_pointwise(op)
    return known or getattr(op, "namespace", "") == "mst_fx"
