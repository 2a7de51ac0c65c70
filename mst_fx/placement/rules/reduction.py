"""Reductions, scans and normalisations: over other dims only; but a sum over the split dim is a partial sum."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import GROUP_NORMS, LAYER_NORMS, REDUCTIONS, REDUCTIONS_TO_TWO, SCANS, SUMS
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.placement.rules.registry import (
    Flow,
    NodePlacement,
    args_of,
    argument,
    back,
    mixed,
    result_shape,
    rule,
    shape_of,
    takes,
)


@rule(*SUMS)
def total(node: Node, flow: Flow) -> Placement:
    """A sum over the split dim adds up over the chunks."""
    split, dims = flow.of(args_of(node)[0]), _dims(node)
    if isinstance(split, Split) and split.dim in dims:
        return PARTIAL
    return _without(node, split, dims)


@rule(*REDUCTIONS)
def reduce(node: Node, flow: Flow) -> Placement:
    """The split dim must not be reduced."""
    split, dims = flow.of(args_of(node)[0]), _dims(node)
    if isinstance(split, Split) and split.dim in dims:
        raise mixed(node, "reduces over the split dim")
    return _without(node, split, dims)


@rule(*REDUCTIONS_TO_TWO)
def reduce_to_two(node: Node, flow: Flow) -> NodePlacement:
    """Both results have the same placement."""
    placement: Any = reduce(node, flow)
    return (placement, placement)


@back(*SUMS, *REDUCTIONS, *REDUCTIONS_TO_TWO)
def reduce_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand has the reduced dims among those of the result."""
    operand: Any = args_of(node)[0]
    dim = split.dim
    if len(result_shape(node)) < len(shape_of(operand)):
        for lost in sorted(_dims(node)):
            dim += dim >= lost
    return {operand: split.moved(dim)}


@rule(*SCANS)
def along(node: Node, flow: Flow) -> NodePlacement:
    """The op keeps the shape and mixes one dim, which must not be the split one."""
    split = flow.of(args_of(node)[0])
    if isinstance(split, Split) and split.dim == argument(node, "dim") % len(shape_of(args_of(node)[0])):
        raise mixed(node, "mixes the split dim")
    return split if isinstance(node.meta["val"], torch.Tensor) else (split,) * len(node.meta["val"])


@back(*SCANS)
def along_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand lies as the result."""
    operand: Any = args_of(node)[0]
    return {operand: split}


@rule(*LAYER_NORMS)
def layer_norm(node: Node, flow: Flow) -> NodePlacement:
    """The op normalises over the last dims; the statistics keep the leading dims."""
    split: Any = flow.of(args_of(node)[0])
    normalized: Any = args_of(node)[1]
    if any(flow.of(arg) != WHOLE for arg in args_of(node)[2:]):
        raise mixed(node, "has a split weight")
    if isinstance(split, Split) and split.dim >= len(shape_of(args_of(node)[0])) - len(normalized):
        raise mixed(node, "normalises over the split dim")
    return (split,) * len(node.meta["val"])


@rule(*GROUP_NORMS)
def group_norm(node: Node, flow: Flow) -> NodePlacement:
    """The op normalises each image over groups of its channels; the statistics keep the dim of the images."""
    split: Any = flow.of(args_of(node)[0])
    if any(flow.of(arg) != WHOLE for arg in args_of(node)[1:]):
        raise mixed(node, "has a split weight")
    if isinstance(split, Split) and split.dim != 0:
        raise mixed(node, "normalises over the split dim")
    return (split,) * len(node.meta["val"])


def _dims(node: Node) -> set[int]:
    """Return the reduced dims: all dims where the op names none."""
    rank = len(shape_of(args_of(node)[0]))
    dims = argument(node, "dim") if takes(node, "dim") else None
    if dims is None or dims == []:
        return set(range(rank))
    return {dim % max(rank, 1) for dim in ([dims] if isinstance(dims, int) else dims)}


def _without(node: Node, split: Placement, dims: set[int]) -> Placement:
    """Return the placement after `dims` are removed, or reduced to size 1."""
    if not isinstance(split, Split):
        return split
    if len(result_shape(node)) == len(shape_of(args_of(node)[0])):
        return split
    return split.moved(split.dim - sum(dim < split.dim for dim in dims))
