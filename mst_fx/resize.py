"""A node of an aten graph, run on fewer positions of the axis than it was traced for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node, map_arg

from mst_fx.placement import Placement, split_of
from mst_fx.rules import Result, inverted
from mst_fx.rules.creation import FILLS
from mst_fx.rules.view import RESHAPES, dim_of

aten = torch.ops.aten


def run_resized(node: Node, placement: Result | Placement, length: int, env: Mapping[Node, Any]) -> Any:
    """The node's value for `length` positions.

    Args:
        node: to run.
        placement: of its value; sizes that it names are replaced where it is split.
        length: positions of the axis that the operands hold.
        env: the operands' values; a size of the whole need not be there, and is not read.
    """
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), env.get)
    target: Any = node.target
    order = inverted(node, placement)
    if order is not None:
        positions = torch.arange(env[order].shape[0], dtype=env[order].dtype, device=env[order].device)
        return aten.index_put.default(torch.empty_like(env[order]), [env[order]], positions)
    split = split_of(placement)
    if split is None:
        return target(*args, **kwargs)
    sizes = split.chunk_shape(node.meta["val"].shape, length)
    if target in RESHAPES:
        return args[0].reshape(sizes)
    if target == aten.expand.default:
        return args[0].expand(sizes)
    if target in FILLS and "size" in kwargs:
        return target(*args, **{**kwargs, "size": sizes})
    if target in FILLS:
        position = FILLS[target]
        return target(*args[:position], sizes, *args[position + 1 :], **kwargs)
    if target == aten.slice.Tensor and dim_of(node) == split.dim:
        return args[0]  # a full slice: the rule allows no other
    return target(*args, **kwargs)
