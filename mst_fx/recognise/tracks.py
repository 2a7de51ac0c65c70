"""What is made of each piece in the same way is made of all at once, where the op's placement rule allows it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node, map_arg

from mst_fx.core.aten_ops import (
    FILLS,
    LOSSES,
    NONE,
    RESHAPES,
    SUM,
    SUMS,
)
from mst_fx.core.refusal import Refusal
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Routed, Split
from mst_fx.placement.rules import Demand, Spans, args_of, argument, rule_for, shape_of
from mst_fx.placement.run_on_chunk import run_resized
from mst_fx.recognise.pieces import Apart, Family, Track

aten = torch.ops.aten


def is_wide(node: Node, classes: int) -> bool:
    """Return whether a value has the classes, or is several values that may have them."""
    value = node.meta["val"]
    return isinstance(value, (tuple, list)) or (value.dim() > 0 and value.shape[-1] == classes)


def tracks_of(family: Family, track: Track, user: Node, dependent: set[Node]) -> list[Track]:
    """Return the tracks of what the first member's reader, and its like for every other member, make."""
    alike = [_counterpart(user, track, position) for position in range(len(track.members))]
    of = {member: each for each in family.tracks if each.sliced for member in each.members}
    for own in zip(*(node.all_input_nodes for node in alike), strict=True):
        read = of.get(own[0])
        if read is None and dependent.isdisjoint(own):
            continue
        if read is None or read.members != own:
            raise Apart(
                user, f"{user.target} reads several pieces of the logits, or what was made of one in another way"
            )
    return _placed(family, of, tuple(alike))


def _counterpart(user: Node, track: Track, position: int) -> Node:
    """Return the reader of another member that stands where `user` stands among those of the first one."""
    first, other = track.members[0], track.members[position]
    like = [node for node in first.users if _kind(node) == _kind(user)]
    found = [node for node in other.users if _kind(node) == _kind(user)]
    if len(like) != len(found):
        raise Apart(user, f"{user.target} reads one piece of the logits, and no other piece is read so")
    return found[like.index(user)]


def _kind(node: Node) -> Any:
    """Return what has to be equal for nodes that do the same: ops, and arguments but for sizes and tensors.

    A tensor counts by its number among those that the node reads. Sizes are checked with the values (`_check_values`).
    """
    number = {operand: f"tensor {index}" for index, operand in enumerate(node.all_input_nodes)}
    sized = node.target in (*RESHAPES, *FILLS, aten.expand.default)
    args, kwargs = map_arg(((*node.args[:1], *node.args[2:]) if sized else node.args, node.kwargs), number.__getitem__)
    return (node.target, str(args), str(sorted(kwargs.items())))


def _placed(family: Family, of: dict[Node, Track], alike: tuple[Node, ...]) -> list[Track]:
    """Return the tracks of nodes that are alike, by the placement rule of the first one."""
    first = alike[0]
    operands: list[Any] = [of.get(node) for node in first.all_input_nodes]
    placements = {node: each.placement for node, each in zip(first.all_input_nodes, operands, strict=True) if each}
    if first.target is operator.getitem:
        track, item = operands[0], first.args[1]
        if not isinstance(track.placement[item], Split):
            raise Apart(first, f"{track.members[0].target} adds up over the tokens of a piece")
        _check_alike(family, alike, track.placement[item])
        return [Track(alike, track.placement[item], lambda env: env[track][item])]
    own = dict(zip(first.all_input_nodes, zip(*(n.all_input_nodes for n in alike), strict=True), strict=True))
    sums_losses = first.target in LOSSES and argument(first, "reduction") == SUM
    placement = PARTIAL if sums_losses else _placement(first, placements)
    if sums_losses:
        placements[argument(first, "target")] = Split(0)
    _check_operands(family, first, own, placements)
    if sums_losses:
        return _losses(of, alike, own)
    if placement == PARTIAL and first.target in SUMS:
        return [_sums(family, alike, of[first.all_input_nodes[0]])]
    if placement == PARTIAL:
        raise Apart(first, f"{first.target} adds up over the tokens of a piece")
    if isinstance(placement, Routed):
        raise Apart(first, f"{first.target} sorts the tokens of a piece")
    if not isinstance(placement, tuple):
        _check_alike(family, alike, placement)
    length = sum(family.lengths)

    def make(env: dict[Any, Any]) -> Any:
        return run_resized(first, placement, length, _operands(env, of, own, placements))

    return [Track(alike, placement, make)]


def _check_operands(
    family: Family, reader: Node, own: dict[Node, tuple[Node, ...]], placements: dict[Node, Any]
) -> None:
    """Check that what the members read can be joined where it has to be split, and is one value where not.

    Raises:
        Apart: it is not so.
    """
    for node, members in own.items():
        placement = placements.get(node)
        if isinstance(placement, Split):
            _check_alike(family, members, placement)
        elif node not in placements and len(set(members)) > 1:
            raise Apart(reader, f"{reader.target} reads another value for each piece of the logits")


def _check_alike(family: Family, members: tuple[Node, ...], placement: Any) -> None:
    """Check that the values of all members have one dtype, and one shape but for the length of the piece.

    Raises:
        Apart: they do not; they may be split along another dim, or broadcast.
    """
    first: Any = members[0].meta["val"]
    for member, length in zip(members, family.lengths, strict=True):
        value = member.meta["val"]
        shape = placement.chunk_shape(first.shape, length) if isinstance(placement, Split) else [*first.shape]
        if value.dtype != first.dtype or list(value.shape) != shape:
            raise Apart(members[0], f"{members[0].target} has another shape or dtype for another piece of the logits")


def _operands(
    env: dict[Any, Any], of: dict[Node, Track], own: dict[Node, tuple[Node, ...]], placements: dict[Node, Any]
) -> dict[Node, Any]:
    """Return the values that the joined op reads: joined values, joined operands of the pieces, and whole ones."""
    values = {}
    for node, members in own.items():
        if node in of:
            values[node] = env[of[node]]
        elif node in placements:
            values[node] = torch.cat([env[member] for member in members], placements[node].dim)
        else:
            values[node] = env[node]
    return values


class _Flow:
    def __init__(self, placements: dict[Node, Any]) -> None:
        self.placements = placements

    def of(self, arg: Any) -> Placement:
        """Return the placement of an operand."""
        placement: Placement = self.placements.get(arg, WHOLE) if isinstance(arg, Node) else WHOLE
        return placement


def _placement(node: Node, placements: dict[Node, Any]) -> Any:
    """Return where a node's value lies; the operands that have to be split for it are added to the placements.

    Raises:
        Apart: it mixes tokens.
    """
    rule = rule_for(node.target)
    while rule is not None:
        try:
            return rule(node, _Flow(placements))
        except Demand as demand:
            if (
                demand.node in placements
                or demand.node not in node.all_input_nodes
                or demand.split.outer * demand.split.inner != 1
            ):
                break
            placements[demand.node] = demand.split
        except (Refusal, Spans):
            break
    raise Apart(node, f"{node.target} mixes the tokens of a piece of the logits")


def _sums(family: Family, alike: tuple[Node, ...], track: Track) -> Track:
    """Return the track of sums over the tokens of a piece: first over all other dims, then over those of each piece."""
    first = alike[0]
    split, rank = track.placement, len(shape_of(first.all_input_nodes[0]))
    given = args_of(first)[1] if first.target == aten.sum.dim_IntList else None
    dims = [dim % rank for dim in given] if given else list(range(rank))
    others = [dim for dim in dims if dim != split.dim]
    if (
        first.target not in (aten.sum.default, aten.sum.dim_IntList)
        or split != Split(split.dim)
        or is_wide(first, family.shape[-1])
    ):
        raise Apart(first, f"{first.target} adds up over the tokens of a piece")
    dtype: Any = first.kwargs.get("dtype")
    kind = dtype or first.all_input_nodes[0].meta["val"].dtype
    wide = torch.promote_types(kind, torch.float32) if kind.is_floating_point else dtype

    def make(env: dict[Any, Any]) -> torch.Tensor:
        each = env[track] if dtype is None else env[track].to(dtype)
        return each.sum(others, keepdim=True, dtype=wide) if others else each

    def take(part: torch.Tensor, member: Node) -> torch.Tensor:
        return part.sum(split.dim).to(member.meta["val"].dtype).reshape(shape_of(member))

    return Track(alike, split, make, take)


def _losses(of: dict[Node, Track], alike: tuple[Node, ...], own: dict[Node, tuple[Node, ...]]) -> list[Track]:
    """Return the tracks of losses that are sums over a piece: the losses of all tokens, and the sum of each piece."""
    first = alike[0]
    scores, target, weight = args_of(first)[:3]
    ignored = args_of(first)[4]
    items = [[item for item in node.users if item.args[1] == 0] for node in alike]
    if (
        scores not in of
        or of[scores].placement != Split(0)
        or any(len(node.users) != len(found) for node, found in zip(alike, items, strict=True))
    ):
        raise Apart(first, f"{first.target} adds up over the tokens of a piece")

    def make(env: dict[Any, Any]) -> torch.Tensor:
        values = _operands(env, of, own, {target: Split(0)})
        op: Any = first.target
        each: torch.Tensor = op(values[scores], values[target], values.get(weight), NONE, ignored)[0]
        return each

    def take(part: torch.Tensor, member: Node) -> torch.Tensor:
        return part.sum()

    done = Track(alike, None, lambda env: None)
    return [done, Track(tuple(found[0] for found in items), Split(0), make, take)]
