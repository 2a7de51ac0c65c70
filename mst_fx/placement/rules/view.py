"""Ops that permute, add, remove, slice or join dims; an op that slices or joins the split dim itself is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import DIAGONALS, JOINS, PERMUTES, RESHAPES, SELECTS, SLICES, TILES
from mst_fx.core.sizes import sure
from mst_fx.placement.placement import WHOLE, Placement, Split, refinements, same_shape, through_view
from mst_fx.placement.rules.registry import (
    Demand,
    Flow,
    NodePlacement,
    Spans,
    args_of,
    argument,
    back,
    mixed,
    result_shape,
    rule,
    shape_of,
)

aten = torch.ops.aten


@rule(*RESHAPES)
def reshape(node: Node, flow: Flow) -> Placement:
    """The axis must stay within one dim."""
    split = flow.of(args_of(node)[0])
    return _viewed(node, split, shape_of(args_of(node)[0]), shape_of(node)) if isinstance(split, Split) else WHOLE


@back(*RESHAPES)
def reshape_back(node: Node, split: Split) -> dict[Node, Split]:
    """The same memory, read in the operand's shape."""
    return {operand_of(node): _viewed(node, split, shape_of(node), shape_of(args_of(node)[0]))}


def _viewed(node: Node, split: Split, before: tuple[int, ...], after: tuple[int, ...]) -> Split:
    """Return where the axis lies when the memory is read in another shape.

    Raises:
        Spans: no single dim of the new shape holds the axis.
    """
    result = through_view(split, before, after)
    if result is None:
        finer = refinements(split, before, after)
        raise Spans(node, [(each.outer // split.outer, each.inner // split.inner) for each in finer])
    return result


@rule(*PERMUTES)
def permute(node: Node, flow: Flow) -> Placement:
    """The split dim moves to another place."""
    split = flow.of(args_of(node)[0])
    return split.moved(dim_permutation(node).index(split.dim)) if isinstance(split, Split) else WHOLE


@back(*PERMUTES)
def permute_back(node: Node, split: Split) -> dict[Node, Split]:
    """The split dim is at another place of the operand."""
    return {operand_of(node): split.moved(dim_permutation(node)[split.dim])}


@rule(aten.expand.default)
def expand(node: Node, flow: Flow) -> Placement:
    """New dims appear on the left."""
    split = flow.of(args_of(node)[0])
    added = len(shape_of(node)) - len(shape_of(args_of(node)[0]))
    return split.moved(split.dim + added) if isinstance(split, Split) else WHOLE


@back(aten.expand.default)
def expand_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand is split, unless it lacks the dim or has it with size 1: then it is repeated to any length."""
    operand = operand_of(node)
    dim = split.dim - len(shape_of(node)) + len(shape_of(operand))
    repeated = dim < 0 or (sure(shape_of(operand)[dim] == 1) and not sure(shape_of(node)[split.dim] == 1))
    return {} if repeated else {operand: split.moved(dim)}


@rule(*TILES)
def repeat(node: Node, flow: Flow) -> Placement:
    """New dims appear on the left; the axis lies in each copy."""
    split = flow.of(args_of(node)[0])
    if not isinstance(split, Split):
        return WHOLE
    dim = split.dim + len(shape_of(node)) - len(shape_of(args_of(node)[0]))
    return Split(dim, split.outer * args_of(node)[1][dim], split.inner)


@rule(*SLICES)
def take_slices(node: Node, flow: Flow) -> NodePlacement:
    """Any other dim may be sliced; a slice of all positions of the split dim leaves the value as it is."""
    split = flow.of(args_of(node)[0])
    dim = dim_of(node)
    results = node.meta["val"]
    if isinstance(split, Split) and split.dim == dim:
        if isinstance(results, torch.Tensor) and same_shape(results.shape, shape_of(args_of(node)[0])):
            return split
        raise mixed(node, "cuts the split dim")
    return split if isinstance(results, torch.Tensor) else (split,) * len(results)


@back(aten.slice.Tensor)
def slice_back(node: Node, split: Split) -> dict[Node, Split]:
    """A slice along the demanded dim is made whole before the loop, and then split."""
    return {} if dim_of(node) == split.dim else {operand_of(node): split}


@rule(*SELECTS)
def pick(node: Node, flow: Flow) -> NodePlacement:
    """The picked dim is removed; it must not be the split one."""
    split = flow.of(args_of(node)[0])
    dim = dim_of(node)
    if isinstance(split, Split):
        if split.dim == dim:
            raise mixed(node, "picks one position of the split dim")
        split = split.moved(split.dim - (split.dim > dim))
    results = node.meta["val"]
    return split if isinstance(results, torch.Tensor) else (split,) * len(results)


@rule(*DIAGONALS)
def diagonal(node: Node, flow: Flow) -> Placement:
    """Two dims are removed, and one is added after all others."""
    split, lost = flow.of(args_of(node)[0]), _diagonal_dims(node)
    if not isinstance(split, Split):
        return WHOLE
    if split.dim in lost:
        raise mixed(node, "takes a diagonal of the split dim")
    return split.moved(split.dim - sum(dim < split.dim for dim in lost))


@back(*DIAGONALS)
def diagonal_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand has the two dims among those of the result."""
    if split.dim == len(shape_of(node)) - 1:
        raise mixed(node, "makes the dim that is needed split")
    dim = split.dim
    for lost in _diagonal_dims(node):
        dim += dim >= lost
    return {operand_of(node): split.moved(dim)}


def _diagonal_dims(node: Node) -> list[int]:
    rank = len(shape_of(args_of(node)[0]))
    return sorted(argument(node, name) % rank for name in ("dim1", "dim2"))


@back(aten.split.Tensor, aten.split_with_sizes.default)
def split_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand is split along the same dim."""
    return {operand_of(node): split}


@back(*SELECTS)
def select_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand has the picked dim among those of the result."""
    return {operand_of(node): split.moved(split.dim + (split.dim >= dim_of(node)))}


@rule(*JOINS)
def join(node: Node, flow: Flow) -> Placement:
    """All operands must be split alike, and not along the joined dim."""
    operands: list[Any] = list(args_of(node)[0])
    split = next((p for p in map(flow.of, operands) if isinstance(p, Split)), None)
    if split is None:
        return WHOLE
    for operand in operands:
        if len(shape_of(operand)) != len(shape_of(operands[0])):
            raise mixed(node, "joins values of different ranks")
        if flow.of(operand) == WHOLE:
            raise Demand(operand, split)
        if flow.of(operand) != split:
            raise mixed(node, "joins values that are split differently")
    dim = dim_of(node, rank=len(result_shape(node)))
    if node.target == aten.stack.default:
        return split.moved(split.dim + (split.dim >= dim))
    if dim == split.dim:
        raise mixed(node, "joins along the split dim")
    return split


@back(*JOINS)
def join_back(node: Node, split: Split) -> dict[Node, Split]:
    """All operands are split alike; they lack the new dim of a stack."""
    dim = dim_of(node, rank=len(result_shape(node)))
    before = split.moved(split.dim - (node.target == aten.stack.default and split.dim > dim))
    return {operand: before for operand in args_of(node)[0]}


def dim_permutation(node: Node) -> list[int]:
    """Return, for each dim of the result of a permute, the dim of the operand."""
    rank = len(shape_of(node))
    dims = list(range(rank))
    if node.target == aten.permute.default:
        return [dim % rank for dim in args_of(node)[1]]
    if rank > 1:
        a, b = (0, 1) if node.target == aten.t.default else (args_of(node)[1] % rank, args_of(node)[2] % rank)
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def dim_of(node: Node, rank: int | None = None) -> int:
    """Return the `dim` argument, counted from the left."""
    dim = argument(node, "dim")
    assert isinstance(dim, int)
    return dim % (rank or len(shape_of(args_of(node)[0])))


def operand_of(node: Node) -> Node:
    """Return the tensor that the op reads first."""
    operand = args_of(node)[0]
    assert isinstance(operand, Node)
    return operand
