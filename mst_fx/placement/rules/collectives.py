"""Collectives over the ranks of a mesh: each token of a rank meets the same token of the others, chunk by chunk.

Ranks are stacked in front of dim 0, and tokens in it stay together. All ranks run as many chunks, of the same lengths.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mst_fx.core.torch_private.collectives import GATHERS, REDUCE_ALL, REDUCE_PARTS, WAITS
from mst_fx.placement.placement import Placement, Split
from mst_fx.placement.rules.registry import Flow, args_of, argument, back, mixed, rule


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
