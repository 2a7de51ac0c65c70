"""Gathers and look-ups along another dim than the split one, or in a whole value by split indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import GATHERS, PUTS, RANGES, RESHAPES
from mst_fx.core.sizes import hint, number, sure
from mst_fx.placement.placement import WHOLE, Placement, Split, same_shape
from mst_fx.placement.rules.registry import Demand, Flow, args_of, argument, back, mixed, rule, shape_of

aten = torch.ops.aten
MASKS = (torch.bool, torch.uint8)


@rule(*GATHERS)
def gather(node: Node, flow: Flow) -> Placement:
    """Operand and index are split alike, along another dim; or the index alone is split, along the gathered dim."""
    data: Any
    index: Any
    data, dim, index = args_of(node)[:3]
    a, b = flow.of(data), flow.of(index)
    split = a if isinstance(a, Split) else b
    if not isinstance(split, Split):
        return WHOLE
    if argument(node, "sparse_grad"):
        raise mixed(node, "has a sparse gradient")
    if split.dim == dim % len(shape_of(data)):
        if a == WHOLE:
            return split
        raise _error_for_rows(node, split, data, index, b)
    if not sure(shape_of(data)[split.dim] == shape_of(index)[split.dim]):
        raise mixed(node, "has fewer indices than rows")
    for operand, placement in ((data, a), (index, b)):
        if placement == WHOLE:
            raise Demand(operand, split)
        if placement != split:
            raise mixed(node, f"combines values split as {a} and {b}")
    return split


@back(*GATHERS)
def gather_back(node: Node, split: Split) -> dict[Node, Split]:
    """The index lies as the result; so does the operand, unless the gathered dim is the split one."""
    data, dim, index = args_of(node)[:3]
    along = split.dim == dim % len(shape_of(data))
    return {index: split} if along else {data: split, index: split}


@dataclass(frozen=True)
class Picks:
    """The indices of some dims of a value.

    Attributes:
        indices: the index of each indexed dim.
        picked: the shape that the indices broadcast to.
        first: the first dim of the result that the indices make.
        unindexed: the dims of the value that are not indexed, in their order in the result.
    """

    indices: dict[int, Any]
    picked: tuple[int, ...]
    first: int
    unindexed: tuple[int, ...]

    def dim_in_result(self, dim: int) -> int | None:
        """Return the dim of the result that a dim of the value becomes; None where it is indexed."""
        if dim not in self.unindexed:
            return None
        place = self.unindexed.index(dim)
        return place if place < self.first else place + len(self.picked)

    def dim_in_value(self, dim: int) -> int | None:
        """Return the dim of the value that becomes a dim of the result; None where the indices make it."""
        if self.first <= dim < self.first + len(self.picked):
            return None
        return self.unindexed[dim if dim < self.first else dim - len(self.picked)]

    def made_dim(self, index: Any, own: int) -> int:
        """Return the dim of the result that a dim of an index makes."""
        return self.first + len(self.picked) - len(shape_of(index)) + own

    def making_dim(self, index: Any, dim: int) -> int | None:
        """Return the dim of an index that makes a dim of the result; None where the index is repeated along it."""
        own = dim - self.first - len(self.picked) + len(shape_of(index))
        return own if own >= 0 and sure(shape_of(index)[own] == self.picked[dim - self.first]) else None


def picks_of(node: Node) -> Picks:
    """Return what a node of `index.Tensor` or `index_put` picks.

    Raises:
        Refusal: it picks by a mask, whose values decide how many positions it picks.
    """
    indices = {dim: index for dim, index in enumerate(argument(node, "indices")) if index is not None}
    if any(index.meta["val"].dtype in MASKS for index in indices.values()):
        raise mixed(node, "picks by a mask")
    picked = _broadcast([shape_of(index) for index in indices.values()])
    dims = sorted(indices)
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    unindexed = tuple(dim for dim in range(len(shape_of(args_of(node)[0]))) if dim not in indices)
    return Picks(indices, picked, dims[0] if together else 0, unindexed)


def _broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape that all shapes broadcast to; asking adds no guard."""
    rank = max(map(len, shapes))
    sizes = zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)
    return tuple(next((size for size in each if not sure(size == 1)), 1) for each in sizes)


@rule(aten.index.Tensor)
def index(node: Node, flow: Flow) -> Placement:
    """The value is whole and the indices are split; or the value is split along a dim without an index."""
    data: Any = args_of(node)[0]
    if all(flow.of(operand) == WHOLE for operand in node.all_input_nodes):
        return WHOLE
    picks, table = picks_of(node), flow.of(data)
    positions = positions_of(node)
    if any(flow.of(counted) != WHOLE for counted in positions):
        raise mixed(node, "counts rows that are split")
    if table == WHOLE:
        return _picked(node, flow, picks)
    assert isinstance(table, Split)
    place = picks.dim_in_result(table.dim)
    if place is None and picks.indices[table.dim] in positions:
        return _paired(node, flow, picks, table)
    if place is None:
        rows = next(iter(picks.indices.values()))
        raise _error_for_rows(node, table, data, rows, flow.of(rows))
    if any(flow.of(given) != WHOLE for given in picks.indices.values()):
        raise mixed(node, "combines a split table with split indices")
    return table.moved(place)


def positions_of(node: Node) -> dict[Node, int]:
    """Return the indices that count all positions of the dim that they index, and their dim along which they count.

    `x[arange(n), labels]` picks from each row the element that its label names: rows and labels may be split alike,
    and each chunk counts its own rows. A write to such elements does the same.
    """
    if node.target not in (aten.index.Tensor, *PUTS):
        return {}
    if "positions" in node.meta:  # the trace of a body must not compare sizes of whole values
        return dict(node.meta["positions"])
    found = node.meta["positions"] = {}
    for dim, index in enumerate(argument(node, "indices")):
        counts = _counts_along(index, shape_of(args_of(node)[0])[dim]) if index is not None else None
        if counts is not None:
            found[index] = counts
    return found


def _counts_along(index: Node, size: int) -> int | None:
    """Return the dim along which a value is 0, 1, 2, ... size - 1; None for any other value."""
    shape = shape_of(index)
    while index.target in RESHAPES:
        index = args_of(index)[0]
    if not counts_up(index):
        return None
    dims = [dim for dim, own in enumerate(shape) if not sure(own == 1)]
    if len(dims) != 1:
        return None
    return dims[0] if sure(shape_of(index)[0] == size) else None


def counts_up(node: Node) -> bool:
    """Return whether a node makes 0, 1, 2, ..."""
    if node.target not in RANGES:
        return False
    from_zero = node.target == aten.arange.default or args_of(node)[0] == 0
    by_one = node.target != aten.arange.start_step or argument(node, "step") == 1
    return bool(from_zero and by_one)


def _paired(node: Node, flow: Flow, picks: Picks, table: Split) -> Placement:
    """Return the placement where the other indices pick from each row by its own indices.

    Raises:
        Demand: one of them is whole.
        Refusal: one of them is split differently, or counts rows, too.
    """
    counted = picks.indices[table.dim]
    if list(picks.indices.values()).count(counted) > 1:
        raise mixed(node, "counts rows of two dims at once")
    result = table.moved(picks.made_dim(counted, positions_of(node)[counted]))
    for given in picks.indices.values():
        own = picks.making_dim(given, result.dim) if given is not counted else None
        expected: Placement = WHOLE if own is None else table.moved(own)
        if flow.of(given) == WHOLE and isinstance(expected, Split):
            if given in positions_of(node):
                raise mixed(node, "counts rows of two dims at once")
            raise Demand(given, expected)
        if flow.of(given) != expected:
            raise mixed(node, "combines a split table with split indices")
    return result


def _picked(node: Node, flow: Flow, picks: Picks) -> Placement:
    """Return the split that the indices of a whole value give the result; all of them must lie alike.

    Raises:
        Demand: an index is whole, or the value must be split because an index counts its rows.
        Refusal: two indices are split differently.
    """
    found: Split | None = None
    for given in picks.indices.values():
        placement = flow.of(given)
        if isinstance(placement, Split):
            split = placement.moved(picks.first + len(picks.picked) - len(shape_of(given)) + placement.dim)
            if found not in (None, split):
                raise mixed(node, f"combines indices split as {found} and {split}")
            found = split
    assert found is not None
    positions = positions_of(node)
    for dim, given in picks.indices.items():
        if given in positions and picks.made_dim(given, positions[given]) == found.dim:
            raise Demand(args_of(node)[0], found.moved(dim))
    for given in picks.indices.values():
        own = picks.making_dim(given, found.dim)
        if own is not None and flow.of(given) == WHOLE:
            raise Demand(given, found.moved(own))
    return found


@back(aten.index.Tensor)
def index_back(node: Node, split: Split) -> dict[Node, Split]:
    """The demand is on the indices where they make the dim, otherwise on the table."""
    picks = picks_of(node)
    dim = picks.dim_in_value(split.dim)
    if dim is not None:
        return {args_of(node)[0]: split.moved(dim)}
    positions = positions_of(node)
    demands = {}
    for indexed, given in picks.indices.items():
        own = picks.making_dim(given, split.dim)
        if own is not None and given in positions:
            demands[args_of(node)[0]] = split.moved(indexed)
        elif own is not None:
            demands[given] = split.moved(own)
    return demands


def _error_for_rows(node: Node, table: Placement, data: Any, rows: Any, picked: Placement) -> Exception:
    """Return the error to raise where rows of the split dim are picked: only a permutation of the rows may do that."""
    single = len(shape_of(rows)) == 1 or (bool(shape_of(rows)) and same_shape(shape_of(rows)[1:], shape_of(data)[1:]))
    alone = node.target in GATHERS or len(argument(node, "indices")) == 1
    if isinstance(table, Split) and table.dim == 0 and picked == WHOLE and single and alone:
        picks, tokens = shape_of(rows)[0], shape_of(data)[0]
        each = number(picks // tokens) if hint(tokens) else None
        if each and sure(picks % tokens == 0):
            return Demand(rows, Split(0, table.outer, table.inner * each))
    return mixed(node, "picks rows of the split dim")


@rule(aten.embedding.default)
def look_up(node: Node, flow: Flow) -> Placement:
    """The table is whole and the indices are split; or the table is split along its columns."""
    table, indices = args_of(node)[:2]
    a, b = flow.of(table), flow.of(indices)
    if a == b == WHOLE:
        return WHOLE
    if argument(node, "scale_grad_by_freq") or argument(node, "sparse"):
        raise mixed(node, "has a gradient that counts all indices or is sparse")
    if a == WHOLE:
        return b
    if not isinstance(a, Split) or a.dim == 0 or b != WHOLE:
        raise mixed(node, "looks up in a split table")
    return a.moved(len(shape_of(indices)))


@back(aten.embedding.default)
def look_up_back(node: Node, split: Split) -> dict[Node, Split]:
    """The demand is on the indices for their dims, on the table for its columns."""
    table, indices = args_of(node)[:2]
    return {indices: split} if split.dim < len(shape_of(indices)) else {table: split.moved(1)}


@rule(aten.index_select.default)
def select_rows(node: Node, flow: Flow) -> Placement:
    """The value is split along another dim and the index is whole, or the value is whole and the index is split."""
    data, dim, rows = args_of(node)[:3]
    split, picked = flow.of(data), flow.of(rows)
    dim = dim % max(len(shape_of(data)), 1)
    if split == WHOLE:
        return picked.moved(dim) if isinstance(picked, Split) else WHOLE
    if picked != WHOLE:
        raise mixed(node, "has a split index")
    if isinstance(split, Split) and split.dim == dim:
        raise mixed(node, "selects along the split dim")
    return split


@back(aten.index_select.default)
def select_back(node: Node, split: Split) -> dict[Node, Split]:
    """The demand is on the index for the dim that it picks along, on the value for any other."""
    data, dim, rows = args_of(node)[:3]
    return {rows: split.moved(0)} if split.dim == dim % len(shape_of(data)) else {data: split}
