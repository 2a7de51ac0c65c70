"""Reductions, scans and normalisations: free over other dims; a sum over the split dim is a partial sum."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.placement.rules.registry import (
    Flow,
    Result,
    args_of,
    argument,
    back,
    mixed,
    result_shape,
    rule,
    shape_of,
    takes,
)

aten = torch.ops.aten

SUMS = (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
)
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
PAIRS = (
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
SCANS = (
    aten._softmax.default,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.logcumsumexp.default,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
)


@rule(*SUMS)
def total(node: Node, flow: Flow) -> Placement:
    """A sum over the split dim adds up over the mini-sequences."""
    split, dims = flow.of(args_of(node)[0]), _dims(node)
    if isinstance(split, Split) and split.dim in dims:
        return PARTIAL
    return _without(node, split, dims)


@rule(*REDUCTIONS)
def reduce(node: Node, flow: Flow) -> Placement:
    """Over other dims only."""
    split, dims = flow.of(args_of(node)[0]), _dims(node)
    if isinstance(split, Split) and split.dim in dims:
        raise mixed(node, "reduces over the split dim")
    return _without(node, split, dims)


@rule(*PAIRS)
def reduce_to_two(node: Node, flow: Flow) -> Result:
    """Two results, placed alike."""
    placement: Any = reduce(node, flow)
    return (placement, placement)


@back(*SUMS, *REDUCTIONS, *PAIRS)
def reduce_back(node: Node, split: Split) -> dict[Node, Split]:
    """The dims that are gone stood among the others."""
    operand: Any = args_of(node)[0]
    dim = split.dim
    if len(result_shape(node)) < len(shape_of(operand)):
        for lost in sorted(_dims(node)):
            dim += dim >= lost
    return {operand: split.moved(dim)}


@rule(*SCANS)
def along(node: Node, flow: Flow) -> Result:
    """Ops that keep the shape and mix one dim."""
    split = flow.of(args_of(node)[0])
    if isinstance(split, Split) and split.dim == argument(node, "dim") % len(shape_of(args_of(node)[0])):
        raise mixed(node, "mixes the split dim")
    return split if isinstance(node.meta["val"], torch.Tensor) else (split,) * len(node.meta["val"])


@back(*SCANS)
def along_back(node: Node, split: Split) -> dict[Node, Split]:
    """Every other dim is that of the operand."""
    operand: Any = args_of(node)[0]
    return {operand: split}


def _norm_rule(node: Node, flow: Flow) -> Result:
    """Normalisation over the last dims; the statistics keep the leading dims."""
    split: Any = flow.of(args_of(node)[0])
    normalized: Any = args_of(node)[1]
    if any(flow.of(arg) != WHOLE for arg in args_of(node)[2:]):
        raise mixed(node, "has a split weight")
    if isinstance(split, Split) and split.dim >= len(shape_of(args_of(node)[0])) - len(normalized):
        raise mixed(node, "normalises over the split dim")
    return (split,) * len(node.meta["val"])


rule(aten.native_layer_norm.default)(_norm_rule)
if hasattr(aten, "_fused_rms_norm"):
    rule(aten._fused_rms_norm.default)(_norm_rule)


@rule(aten.native_group_norm.default)
def group_norm(node: Node, flow: Flow) -> Result:
    """Normalisation of each image over groups of its channels; the statistics keep the images."""
    split: Any = flow.of(args_of(node)[0])
    if any(flow.of(arg) != WHOLE for arg in args_of(node)[1:]):
        raise mixed(node, "has a split weight")
    if isinstance(split, Split) and split.dim != 0:
        raise mixed(node, "normalises over the split dim")
    return (split,) * len(node.meta["val"])


def _dims(node: Node) -> set[int]:
    """The reduced dims; all of them where the op names none."""
    rank = len(shape_of(args_of(node)[0]))
    dims = argument(node, "dim") if takes(node, "dim") else None
    if dims is None or dims == []:
        return set(range(rank))
    return {dim % max(rank, 1) for dim in ([dims] if isinstance(dims, int) else dims)}


def _without(node: Node, split: Placement, dims: set[int]) -> Placement:
    """The placement once `dims` are gone, or kept with size 1."""
    if not isinstance(split, Split):
        return split
    if len(result_shape(node)) == len(shape_of(args_of(node)[0])):
        return split
    return split.moved(split.dim - sum(dim < split.dim for dim in dims))
