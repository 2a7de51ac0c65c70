"""A node of an aten graph, run on fewer positions of the axis than it was traced for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg

from mst_fx.core.aten_ops import FILLS, GROUP_NORMS, RESHAPES
from mst_fx.core.sizes import is_size
from mst_fx.placement.placement import Placement, split_of
from mst_fx.placement.rules import Result, argument, inverted, positions_of
from mst_fx.placement.rules.view import dim_of

aten = torch.ops.aten


def numbers_read(node: Node, placement: Result | Placement) -> list[Node]:
    """The operands of a node that `run_resized` needs as numbers: those that are no sizes of what is split."""
    split, target = split_of(placement), node.target
    args: Sequence[Any] = node.args
    kwargs: Mapping[str, Any] = node.kwargs
    if target in GROUP_NORMS:
        args, kwargs = _replaced(target, args, kwargs, "N", None)
    if inverted(node, placement) is not None:
        args = ()
    elif split is not None and (target in RESHAPES or target == aten.expand.default):
        args = args[:1]
    elif split is not None and target in FILLS:
        args, kwargs = _replaced(target, args, kwargs, "size", None)
    elif split is not None and target == aten.slice.Tensor and dim_of(node) == split.dim:
        args = args[:1]
    found: list[Node] = []
    map_arg((tuple(args), dict(kwargs)), found.append)
    return [operand for operand in found if is_size(operand.meta.get("val"))]


def run_resized(node: Node, placement: Result | Placement, length: int, env: Mapping[Node, Any]) -> Any:
    """The node's value for `length` positions.

    Args:
        node: to run.
        placement: of its value; sizes that it names are replaced where it is split.
        length: positions of the axis that the operands hold.
        env: the operands' values; a size of the whole need not be there, and is not read.
    """
    args: Any
    kwargs: Any
    args, kwargs = map_arg((node.args, node.kwargs), env.get)
    target: Any = node.target
    order = inverted(node, placement)
    if order is not None:
        positions = torch.arange(env[order].shape[0], dtype=env[order].dtype, device=env[order].device)
        return aten.index_put.default(torch.empty_like(env[order]), [env[order]], positions)
    if target in GROUP_NORMS:
        args, kwargs = _replaced(target, args, kwargs, "N", args[0].shape[0])
    split = split_of(placement)
    if split is None:
        return target(*args, **kwargs)
    if positions_of(node):
        return args[0][_own_positions(node, args[0], env)]
    sizes = split.chunk_shape(node.meta["val"].shape, length)
    if target in RESHAPES:
        return args[0].reshape(sizes)
    if target == aten.expand.default:
        return args[0].expand(sizes)
    if target in FILLS:
        args, kwargs = _replaced(target, args, kwargs, "size", sizes)
    if target == aten.slice.Tensor and dim_of(node) == split.dim:
        return args[0]  # a full slice: the rule allows no other
    return target(*args, **kwargs)


def _replaced(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: object
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Arguments with another value for one of them."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    position = [argument.name for argument in target._schema.arguments].index(name)
    return (*args[:position], value, *args[position + 1 :]), kwargs


def _own_positions(node: Node, x: torch.Tensor, env: Mapping[Node, Any]) -> tuple[Any, ...]:
    """The indices of a pick; those that count all positions count the mini-sequence's."""
    counted = positions_of(node)
    indices: list[Any] = []
    for dim, index in enumerate(argument(node, "indices")):
        if index in counted:
            shape = [1] * index.meta["val"].dim()
            shape[counted[index]] = x.shape[dim]
            indices.append(torch.arange(x.shape[dim], device=x.device).view(shape))
        else:
            indices.append(slice(None) if index is None else env[index])
    return tuple(indices)
