"""Collectives over the ranks of a mesh: each token of a rank meets the same token of the others, chunk by chunk.

Ranks are stacked in front of dim 0, and tokens in it stay together. All ranks run as many chunks, of the same lengths.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from torch.fx import Node

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import sure
from mst_fx.core.torch_private.collectives import EXCHANGES, GATHERS, REDUCE_ALL, REDUCE_PARTS, WAITS
from mst_fx.placement.placement import Placement, Split
from mst_fx.placement.rules.registry import Flow, Spans, args_of, argument, back, mixed, rule, shape_of

FEWER_RANKS = "Let fewer ranks share a sequence, so that each of them has several heads."


@rule(*REDUCE_ALL, *WAITS)
def same_place(node: Node, flow: Flow) -> Placement:
    """Each element stays in its place."""
    return flow.of(args_of(node)[0])


@rule(*GATHERS)
def gather(node: Node, flow: Flow) -> Placement:
    """Dim 0 is as many times as long as there are ranks, and has their tokens one after the other."""
    split = flow.of(args_of(node)[0])
    if not isinstance(split, Split) or split.dim:
        return split
    return Split(0, argument(node, "group_size") * split.outer, split.inner)


@rule(*REDUCE_PARTS)
def reduce_parts(node: Node, flow: Flow) -> Placement:
    """Dim 0 is parted among the ranks, each part with all tokens."""
    split = flow.of(args_of(node)[0])
    if not isinstance(split, Split) or split.dim:
        return split
    return Split(0, _part(node, split), split.inner)


@rule(*EXCHANGES)
def exchange(node: Node, flow: Flow) -> Placement:
    """Dim 0 has a part for each rank; an axis in dim 0 lies within each part."""
    split = flow.of(args_of(node)[0])
    return _within_parts(node, split) if isinstance(split, Split) else split


@back(*EXCHANGES)
def exchange_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand has the same parts."""
    operand: Any = args_of(node)[0]
    return {operand: _within_parts(node, split)}


@back(*GATHERS)
def gather_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand of a rank is one part of the result."""
    operand: Any = args_of(node)[0]
    return {operand: split if split.dim else Split(0, _part(node, split), split.inner)}


@back(*REDUCE_PARTS)
def reduce_parts_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand has as many parts as there are ranks."""
    operand: Any = args_of(node)[0]
    return {operand: split if split.dim else Split(0, argument(node, "group_size") * split.outer, split.inner)}


def _part(node: Node, split: Split) -> int:
    """Return the outer factor of one rank's part."""
    if split.outer % argument(node, "group_size"):
        raise mixed(node, "gives the tokens to different ranks")
    return int(split.outer // argument(node, "group_size"))


def even_parts(node: Node) -> int | None:
    """Return into how many parts of one size a node exchanges dim 0; None where sizes differ, or may differ."""
    sizes: list[Any] = [*argument(node, "output_split_sizes"), *argument(node, "input_split_sizes")]
    first, *others = (size.meta["val"] if isinstance(size, Node) else size for size in sizes)
    return len(sizes) // 2 if all(sure(size == first) for size in others) else None


def _within_parts(node: Node, split: Split) -> Split:
    """Return the split, if an axis in dim 0 lies within each part.

    Raises:
        Spans: the axis has a part for each rank, and only what is in a part can be split.
        Refusal: the parts are no factor of it, or nothing is left in them to split.
    """
    if split.dim:
        return split
    ranks, length = even_parts(node), split.axis_length(shape_of(args_of(node)[0]))
    missing = ranks // gcd(ranks, split.outer) if ranks else 0
    if not missing or not sure(length % missing == 0):
        raise mixed(node, "divides the split dim among the ranks")
    if sure(length == missing) and missing > 1:
        text = f"{node.target} gives each rank one position of the split dim"
        raise Refusal(Reason.AXIS_MIXED, node, text, FEWER_RANKS)
    if missing > 1:
        raise Spans(node, [(missing, 1)])
    return split
