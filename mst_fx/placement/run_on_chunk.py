"""Run a node of an aten graph on fewer positions of the axis than it was traced for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg

from mst_fx.core.aten_ops import FILLS, GROUP_NORMS, RESHAPES
from mst_fx.core.sizes import at_sizes, is_size
from mst_fx.core.torch_private.collectives import EXCHANGES
from mst_fx.placement.placement import Placement, split_of
from mst_fx.placement.rules import NodePlacement, argument, even_parts, inverted, positions_of
from mst_fx.placement.rules.view import dim_of

aten = torch.ops.aten


def numbers_read(node: Node, placement: NodePlacement | Placement) -> list[Node]:
    """Return the operands of a node that `run_resized` needs as numbers: all but the sizes of a split value."""
    split, target = split_of(placement), node.target
    args: Sequence[Any] = node.args
    kwargs: Mapping[str, Any] = node.kwargs
    if target in GROUP_NORMS:
        args, kwargs = _replaced(target, args, kwargs, "N", None)
    if target in EXCHANGES and even_parts(node):
        args = args[:1]
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


def run_resized(
    node: Node,
    placement: NodePlacement | Placement,
    length: int,
    env: Mapping[Node, Any],
    varying: Mapping[Any, Any] | None = None,
) -> Any:
    """Return the node's value for `length` positions of the axis.

    Args:
        node: the node to run.
        placement: the placement of its value; where that is split, the sizes among the arguments are replaced.
        length: positions of the axis in the operands.
        env: the operands' values; it needs no size of a whole value, which is not read.
        varying: the values of symbols in sizes of other dims; as they were captured by default.
    """
    args: Any
    kwargs: Any
    args, kwargs = map_arg((node.args, node.kwargs), env.get)
    target: Any = node.target
    permutation = inverted(node, placement)
    if permutation is not None:
        positions = torch.arange(
            env[permutation].shape[0], dtype=env[permutation].dtype, device=env[permutation].device
        )
        return aten.index_put.default(torch.empty_like(env[permutation]), [env[permutation]], positions)
    args, kwargs = _with_sizes_of(args[0], node, args, kwargs) if args else (args, kwargs)
    split = split_of(placement)
    if split is None and varying and target in RESHAPES:
        return args[0].reshape([at_sizes(size, varying) for size in node.meta["val"].shape])
    if split is None:
        return target(*args, **kwargs)
    if positions_of(node):
        indices = _own_positions(node, args[0], env)
        return target(args[0], indices, *args[2:], **{name: x for name, x in kwargs.items() if name != "indices"})
    sizes = [at_sizes(size, varying or {}) for size in split.chunk_shape(node.meta["val"].shape, length)]
    if target in RESHAPES:
        return args[0].reshape(sizes)
    if target == aten.expand.default:
        return args[0].expand(sizes)
    if target in FILLS:
        args, kwargs = _replaced(target, args, kwargs, "size", sizes)
    if target == aten.slice.Tensor and dim_of(node) == split.dim:
        return args[0]  # a full slice: the rule refuses any other
    return target(*args, **kwargs)


def _with_sizes_of(
    operand: Any, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments, where an op names sizes of what it reads, with those of this operand."""
    target: Any = node.target
    if target in GROUP_NORMS:
        return _replaced(target, args, kwargs, "N", operand.shape[0])
    if target in EXCHANGES and (ranks := even_parts(node)):
        for name in ("output_split_sizes", "input_split_sizes"):
            args, kwargs = _replaced(target, args, kwargs, name, [operand.shape[0] // ranks] * ranks)
    return args, kwargs


def _replaced(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: object
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments with another value for the one of this name."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    position = [argument.name for argument in target._schema.arguments].index(name)
    return (*args[:position], value, *args[position + 1 :]), kwargs


def _own_positions(node: Node, x: torch.Tensor, env: Mapping[Node, Any]) -> list[torch.Tensor | None]:
    """Return the indices of a pick, or of a write; those that count all positions count the positions of the chunk."""
    counted = positions_of(node)
    indices: list[Any] = []
    for dim, index in enumerate(argument(node, "indices")):
        if index in counted:
            shape = [1] * index.meta["val"].dim()
            shape[counted[index]] = x.shape[dim]
            indices.append(torch.arange(x.shape[dim], device=x.device).view(shape))
        else:
            indices.append(None if index is None else env[index])
    return indices
