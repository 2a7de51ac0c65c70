"""Ops that move or mix positions along some dims (flips, pads, pools, searches): any other dim may be split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import (
    CHANNEL_SHUFFLES,
    FLIPS,
    PADS,
    PADS_AND_POOLS,
    PIXEL_SHUFFLES,
    ROLLS,
    SEARCHES,
    SORTED_SEARCHES,
    TRIANGLES,
    UNFOLDS,
)
from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.registry import Demand, Flow, NodePlacement, args_of, argument, back, mixed, rule, shape_of


def _named(name: str) -> Callable[[Node, int], set[int]]:
    """Return a function that tells the dims that an argument names."""

    def dims(node: Node, rank: int) -> set[int]:
        found: Any = argument(node, name)
        return {dim % max(rank, 1) for dim in ([found] if isinstance(found, int) else found)}

    return dims


def _last(count: int) -> Callable[[Node, int], set[int]]:
    return lambda node, rank: set(range(rank - count, rank))


def _rolled(node: Node, rank: int) -> set[int]:
    """Return the rolled dims: all of them where none is named, as the value is then rolled as one row."""
    return _named("dims")(node, rank) or set(range(rank))


def _padded(node: Node, rank: int) -> set[int]:
    """Return the padded dims; the argument has pairs of pads, those of the last dim first."""
    pad: Any = argument(node, "pad")
    pairs = zip(pad[::2], pad[1::2], strict=True)
    return {rank - 1 - place for place, pair in enumerate(pairs) if pair != (0, 0)}


MIXED: dict[Any, Callable[[Node, int], set[int]]] = {
    **dict.fromkeys(FLIPS, _named("dims")),
    **dict.fromkeys(ROLLS, _rolled),
    **dict.fromkeys(UNFOLDS, _named("dimension")),
    **dict.fromkeys(PADS, _padded),
    **dict.fromkeys(TRIANGLES, _last(2)),
    **{op: _last(count) for count, ops in PADS_AND_POOLS.items() for op in ops},
    **dict.fromkeys(CHANNEL_SHUFFLES, lambda node, rank: {1}),
    **dict.fromkeys(PIXEL_SHUFFLES, _last(3)),
}
"""The dims that an op mixes, given its node and the rank of its operand."""


@rule(*MIXED)
def mix(node: Node, flow: Flow) -> NodePlacement:
    """Any dim that the op does not mix may be split."""
    operand: Any = args_of(node)[0]
    split = flow.of(operand)
    if isinstance(split, Split) and split.dim in MIXED[node.target](node, len(shape_of(operand))):
        raise mixed(node, "mixes the split dim")
    return split if isinstance(node.meta["val"], torch.Tensor) else (split,) * len(node.meta["val"])


@back(*MIXED)
def mix_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand lies as the result."""
    operand: Any = args_of(node)[0]
    if split.dim >= len(shape_of(operand)):
        raise mixed(node, "makes the dim that is needed split")
    return {operand: split}


@rule(*SEARCHES)
def look_for(node: Node, flow: Flow) -> Placement:
    """The values that are looked up may be split, the values that they are compared with may not."""
    value, among = args_of(node)[:2]
    if flow.of(among) != WHOLE:
        raise mixed(node, "looks values up among split ones")
    return flow.of(value)


@back(*SEARCHES)
def look_for_back(node: Node, split: Split) -> dict[Node, Split]:
    """The values that are looked up lie as the result."""
    return {args_of(node)[0]: split}


@rule(*SORTED_SEARCHES)
def search(node: Node, flow: Flow) -> Placement:
    """Values are looked up in one whole row, or each in the sorted row at its own place."""
    rows, values = args_of(node)[:2]
    operands = [operand for operand in node.all_input_nodes if operand is not values]
    split = flow.of(values)
    if len(shape_of(rows)) == 1 or (isinstance(split, Split) and split.dim == len(shape_of(values)) - 1):
        if any(flow.of(operand) != WHOLE for operand in operands):
            raise mixed(node, "looks values up among split ones")
        return split
    found = next((p for p in map(flow.of, node.all_input_nodes) if isinstance(p, Split)), None)
    if found is None:
        return WHOLE
    if found.dim == len(shape_of(rows)) - 1:
        raise mixed(node, "looks values up among split ones")
    for operand in (values, *operands):
        if flow.of(operand) == WHOLE:
            raise Demand(operand, found)
        if flow.of(operand) != found:
            raise mixed(node, "looks values up in rows that are split differently")
    return found


@back(*SORTED_SEARCHES)
def search_back(node: Node, split: Split) -> dict[Node, Split]:
    """The values that are looked up lie as the result; the rule demands the sorted rows."""
    return {args_of(node)[1]: split}
