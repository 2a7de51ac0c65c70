"""Families of pieces: slices of logits along the tokens that may be read in the same way.

Terms
  piece    a slice of the logits along the tokens; the pieces of a family have no token in common
  track    what is made of each piece in the same way, and the joined value: one value for the tokens of all
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from mst_fx.core.aten_ops import (
    CONTRACTIONS,
    CUTS,
    SELECTS,
    SLICES,
)
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import is_symbolic
from mst_fx.placement.rules import shape_of
from mst_fx.placement.rules.view import dim_of


@dataclass(eq=False)
class Track:
    """What is made of each piece in the same way.

    Attributes:
        members: the node of each piece.
        placement: how each lies along the tokens; of a node with several results, one for each.
        make: makes the joined value, of the values of other nodes and of earlier tracks.
        take: makes the value of a member, of a slice of the joined value; None where it is that slice.
    """

    members: tuple[Node, ...]
    placement: Any
    make: Callable[[dict[Any, Any]], Any]
    take: Callable[[torch.Tensor, Node], torch.Tensor] | None = None

    @property
    def sliced(self) -> bool:
        """Whether the members are slices of the joined value, so that what reads them may be joined, too."""
        return self.placement is not None and self.take is None


class Apart(Exception):  # noqa: N818 - control flow within the module
    """Pieces of logits are read in ways that cannot be joined; `node` is where they part."""

    def __init__(self, node: Node, text: str) -> None:
        super().__init__(text)
        self.node = node


@dataclass
class Family:
    """The pieces of one value, and what is made of them.

    Attributes:
        whole: the value.
        pieces: the nodes.
        dim: the dim along which the pieces are joined.
        shape: that of the joined pieces.
        tracks: what is made of them, in the order in which it is made; the first one is the pieces themselves.
        rows: the runs of tokens that the pieces take, [start, end); None where these are all tokens in their order.
    """

    whole: Node
    pieces: tuple[Node, ...]
    dim: int
    shape: tuple[int, ...]
    rows: list[tuple[int, int]] | None = None
    tracks: list[Track] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """The length of each piece."""
        return [shape_of(piece)[self.dim] for piece in self.pieces]


def families(graph: Graph) -> Iterator[Family]:
    """Yield the families of pieces of the values that a graph makes of products."""
    projected = descendants(node for node in graph.nodes if node.target in CONTRACTIONS)
    for whole in graph.nodes:
        shape = shape_of(whole)
        wide = whole in projected and len(shape) > 1 and not any(map(is_symbolic, shape)) and shape[-1] > 1
        if not wide or whole.target in CUTS or not _cuts_of(whole):
            continue
        rows = torch.arange(count(shape[:-1]))
        pieces = list(_pieces(whole, rows.view(*shape[:-1], 1)))
        pieces = [(node, index.contiguous()) for node, index in pieces if 0 < index.numel() < rows.numel()]
        if not all(_crosses(index, shape[:-1]) for _, index in pieces):
            yield from _runs(whole, pieces)


def _crosses(index: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Return whether a piece takes each position of the longest dim of tokens: a loop can run along that dim."""
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    positions = index // count(sizes[longest + 1 :]) % sizes[longest]
    return positions.unique().numel() == sizes[longest]


def _number(item: Node) -> int:
    """Return the number of the one of several values that a node picks."""
    number: Any = item.args[1]
    return int(number)


def count(sizes: Sequence[int]) -> int:
    """Return the number of elements of a value with these sizes."""
    return int(torch.Size(sizes).numel())


def _cuts_of(node: Node) -> list[Node]:
    """Return the readers of a value that take some of its tokens, the same whatever the lengths are."""
    rank = len(shape_of(node))
    cuts = [user for user in node.users if user.target in (*SLICES, *SELECTS) and user.all_input_nodes == [node]]
    return [cut for cut in cuts if dim_of(cut) < rank - 1]


def _pieces(node: Node, index: torch.Tensor) -> Iterator[tuple[Node, torch.Tensor]]:
    """Yield what is cut of a value and read by something else, with the numbers of its tokens, in graph order."""
    cuts = _cuts_of(node)
    if any(user not in cuts for user in node.users):
        yield node, index
    for cut in cuts:
        target: Any = cut.target
        taken = target(index, *cut.args[1:], **cut.kwargs)
        if isinstance(taken, torch.Tensor):
            yield from _pieces(cut, taken)
        else:
            for item in sorted(cut.users, key=_number):
                yield from _pieces(item, taken[item.args[1]])


def _runs(whole: Node, pieces: list[tuple[Node, torch.Tensor]]) -> Iterator[Family]:
    """Yield a family for each run of two or more pieces that have no token in common."""
    runs: list[list[tuple[Node, torch.Tensor]]] = [[]]
    for node, index in pieces:
        if any(bool(torch.isin(index, other).any()) for _, other in runs[-1]):
            runs.append([])
        runs[-1].append((node, index))
    for run in runs:
        if len(run) > 1:
            yield from _in_order(whole, [piece for piece, _ in run], [index for _, index in run])


def _in_order(whole: Node, pieces: list[Node], indices: list[torch.Tensor]) -> Iterator[Family]:
    """Yield the family of pieces that can be joined along one dim: at best so that they are all tokens in order."""
    rank, tokens = indices[0].dim(), count(shape_of(whole)[:-1])
    found = []
    for dim in range(rank - 1):
        sizes = {(*index.shape[:dim], *index.shape[dim + 1 :]) for index in indices}
        if len(sizes) == 1 and all(index.dim() == rank for index in indices):
            joint = torch.cat(indices, dim)
            rows = _ranges(joint.flatten())
            shape = (*joint.shape[:-1], shape_of(whole)[-1])
            found.append(Family(whole, tuple(pieces), dim, shape, None if rows == [(0, tokens)] else rows))
    yield from sorted(found, key=lambda family: len(family.rows or ()))[:1]


def _ranges(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers, [start, end)."""
    breaks = ((numbers.diff() != 1).nonzero().flatten() + 1).tolist()
    bounds = [0, *breaks, numbers.numel()]
    return [(int(numbers[start]), int(numbers[end - 1]) + 1) for start, end in pairwise(bounds)]
