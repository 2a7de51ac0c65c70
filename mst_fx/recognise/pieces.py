"""Pieces of logits that are all read in the same way are joined: what is made of each is made of all of them at once.

`loss(head(x)[:9]) + loss(head(x)[9:])` computes the losses of all tokens, and adds up those of each piece: the logits
are one value again, whose rows a loop can take in any chunks. Only what has no classes any more is cut into pieces.

Terms
  piece    a slice of the logits along the tokens; the pieces of a family have no token in common
  track    what is made of each piece in the same way, and the joined value: one value for all tokens
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.capture.lower import execute, set_current_meta, traced, tracing
from mst_fx.core.aten_ops import (
    CASTS,
    CONTRACTIONS,
    CUTS,
    LOSSES,
    MADE_OF_NOTHING,
    NONE,
    ONE_PRODUCT,
    PRODUCTS,
    PRODUCTS_PLUS,
    RESHAPES,
    SELECTS,
    SLICES,
    SUM,
    SUMS,
    is_pointwise,
    is_random,
)
from mst_fx.core.clean_room import without_autocast
from mst_fx.core.graph_walk import descendants
from mst_fx.core.refusal import Refusal
from mst_fx.core.sizes import is_symbolic
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.placement.rules import Demand, Spans, args_of, argument, rule_for, shape_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.placement.rules.view import dim_of
from mst_fx.placement.run_on_chunk import run_resized

aten = torch.ops.aten


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


@dataclass
class Family:
    """The pieces of one value, and what is made of them.

    Attributes:
        whole: the value.
        pieces: the nodes.
        dim: the dim along which the pieces are joined.
        shape: that of the joined pieces.
        rows: the runs of tokens that the pieces take, [start, end); None where these are all tokens in their order.
        tracks: in the order in which they are made; the first one is the pieces themselves.
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


class Apart(Exception):  # noqa: N818 - control flow within the module
    """Pieces of logits are read in ways that cannot be joined; `node` is where they part."""

    def __init__(self, node: Node, text: str) -> None:
        super().__init__(text)
        self.node = node


def joined(lowered: GraphModule, examples: Sequence[Any]) -> GraphModule | None:
    """Return the graph with all pieces of its wide values joined; None where it has none.

    Args:
        lowered: an aten graph.
        examples: fake values for its placeholders.

    Raises:
        Apart: there are pieces, but they cannot be joined.
    """
    _merge_equal(lowered.graph)
    result, module, failed = None, lowered, None
    for _ in range(len(lowered.graph.nodes)):
        for family in families(module.graph):
            try:
                _follow(family)
            except Apart as apart:
                failed = failed or apart
                continue
            result = module = _retraced(module, family, examples)
            break
        else:
            break
    if failed is not None:
        raise failed
    return result


def _merge_equal(graph: Graph) -> None:
    """Let one node stand for all that compute the same: each piece has its own view of the class weights."""
    known: dict[Any, Node] = {}
    for node in graph.nodes:
        pure = isinstance(node.target, torch._ops.OpOverload) and not is_random(node.target)
        if pure and node.target not in MADE_OF_NOTHING:
            first = known.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def families(graph: Graph) -> Iterator[Family]:
    """Yield the families of pieces of the values that a graph makes of products."""
    projected = descendants(node for node in graph.nodes if node.target in CONTRACTIONS)
    for whole in graph.nodes:
        shape = shape_of(whole)
        wide = whole in projected and len(shape) > 1 and not any(map(is_symbolic, shape))
        if not wide or whole.target in CUTS or not _cuts_of(whole):
            continue
        rows = torch.arange(shape[:-1].numel() if isinstance(shape, torch.Size) else _count(shape[:-1]))
        pieces = list(_pieces(whole, rows.view(*shape[:-1], 1)))
        pieces = [(node, index) for node, index in pieces if 0 < index.numel() < rows.numel()]
        yield from _runs(whole, pieces)


def _count(sizes: Sequence[int]) -> int:
    return int(torch.Size(sizes).numel())


def _cuts_of(node: Node) -> list[Node]:
    """Return the readers of a value that take some of its tokens."""
    rank = len(shape_of(node))
    cuts = [user for user in node.users if user.target in (*SLICES, *SELECTS) and args_of(user)[0] is node]
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
            for item in sorted(cut.users, key=lambda item: item.args[1]):
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
    rank, count = indices[0].dim(), _count(shape_of(whole)[:-1])
    found = []
    for dim in range(rank - 1):
        sizes = {(*index.shape[:dim], *index.shape[dim + 1 :]) for index in indices}
        if len(sizes) == 1 and all(index.dim() == rank for index in indices):
            joint = torch.cat(indices, dim)
            rows = _ranges(joint.flatten())
            shape = (*joint.shape[:-1], shape_of(whole)[-1])
            found.append(Family(whole, tuple(pieces), dim, shape, None if rows == [(0, count)] else rows))
    yield from sorted(found, key=lambda family: len(family.rows or ()))[:1]


def _ranges(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers, [start, end)."""
    breaks = ((numbers.diff() != 1).nonzero().flatten() + 1).tolist()
    bounds = [0, *breaks, numbers.numel()]
    return [(int(numbers[start]), int(numbers[end - 1]) + 1) for start, end in pairwise(bounds)]


def _follow(family: Family) -> None:
    """Find the tracks of a family.

    Raises:
        Apart: a wide value of a piece has a reader that those of the other pieces lack, or one that cannot be joined.
    """
    classes, dependent = family.shape[-1], descendants(family.pieces)
    family.tracks.append(Track(family.pieces, Split(family.dim), _joint(family)))
    done = {*family.pieces}
    for user in family.whole.graph.nodes:
        of = {each.members[0]: each for each in family.tracks if each.placement is not None}
        read = [of[node] for node in user.all_input_nodes if node in of]
        if user in done or not read:
            continue
        more = _rejoined(read[0], user)
        if not more and any(_is_wide(track.members[0], classes) for track in read):
            more = _next(family, read[0], user, dependent)
        done.update(member for each in more for member in each.members)
        family.tracks += more
    for track in family.tracks:
        wide = track.placement is not None and _is_wide(track.members[0], classes)
        for user in (user for member in track.members if wide for user in member.users if user not in done):
            raise Apart(user, f"{user.target} reads one piece of the logits, and no other piece is read so")


def _joint(family: Family) -> Callable[[dict[Any, Any]], Any]:
    """Return what makes the joined pieces: a view of the whole value, or the same of fewer tokens.

    Raises:
        Apart: the whole value is not made of each token alone, by a product and elementwise ops.
    """
    whole, shape, rows = family.whole, family.shape, family.rows
    if rows is None:
        return lambda env: env[whole].reshape(shape)
    way, product = list[Node](), whole
    while product.target not in (*PRODUCTS, *PRODUCTS_PLUS):
        operands = [node for node in product.all_input_nodes if _count(shape_of(node)[:-1]) > 1]
        alone = product.target in RESHAPES or product.target in CASTS or is_pointwise(product.target)
        if not alone or len(operands) != 1 or shape_of(operands[0])[-1:] != shape_of(whole)[-1:]:
            raise Apart(family.pieces[0], f"{product.target} stands between the projection and a piece of the logits")
        way.append(product)
        (product,) = operands
    tokens = factors(product)[0]
    if product.target not in ONE_PRODUCT or any(
        _count(shape_of(node)) >= _count(shape_of(whole)) for node in product.all_input_nodes
    ):
        raise Apart(family.pieces[0], f"{product.target} is not one product of the tokens and a matrix")

    def make(env: dict[Any, Any]) -> torch.Tensor:
        picked = torch.cat([aten.slice.Tensor(env[tokens], 0, start, end) for start, end in rows])
        value = execute(whole.graph.owning_module, product, {**env, tokens: picked})
        for before, node in zip([product, *way[:0:-1]], reversed(way), strict=True):
            if node.target not in RESHAPES:
                value = execute(whole.graph.owning_module, node, {**env, before: value})
        return value.reshape(shape)

    return make


def _rejoined(track: Track, user: Node) -> list[Track]:
    """Return the track of a reader that joins all members of a track once more, in their order."""
    members, rank = list(track.members), len(shape_of(track.members[0]))
    if user.target != aten.cat.default or list(args_of(user)[0]) != members or track.take is not None:
        return []
    along = isinstance(track.placement, Split) and dim_of(user, rank) == track.placement.dim
    return [Track((user,), None, lambda env: env[track])] if along else []


def _is_wide(node: Node, classes: int) -> bool:
    value = node.meta["val"]
    return isinstance(value, (tuple, list)) or (value.dim() > 0 and value.shape[-1] == classes)


def _next(family: Family, track: Track, user: Node, dependent: set[Node]) -> list[Track]:
    """Return the tracks of what the first member's reader, and its like for every other member, make."""
    alike = [_counterpart(user, track, position) for position in range(len(track.members))]
    of = {member: each for each in family.tracks for member in each.members}
    for own in zip(*(node.all_input_nodes for node in alike), strict=True):
        tracks = {of.get(node) for node in own}
        if len(tracks) > 1 or (None in tracks and not dependent.isdisjoint(own)):
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
    """Return what has to be equal for nodes that do the same: ops, and arguments but for sizes and tensors."""
    arguments = [arg for arg in (*node.args, *node.kwargs.values()) if not isinstance(arg, (Node, list, tuple))]
    return (node.target, len(node.args), tuple(map(str, arguments)), len(node.all_input_nodes))


def _placed(family: Family, of: dict[Node, Track], alike: tuple[Node, ...]) -> list[Track]:
    """Return the tracks of nodes that are alike, by the placement rule of the first one."""
    first = alike[0]
    operands: list[Any] = [of.get(node) for node in first.all_input_nodes]
    placements = {node: each.placement for node, each in zip(first.all_input_nodes, operands, strict=True) if each}
    if first.target is operator.getitem:
        track, item = operands[0], first.args[1]
        if not isinstance(track.placement[item], Split):
            raise Apart(first, f"{track.members[0].target} adds up over the tokens of a piece")
        return [Track(alike, track.placement[item], lambda env: env[track][item])]
    own = dict(zip(first.all_input_nodes, zip(*(n.all_input_nodes for n in alike), strict=True), strict=True))
    if first.target in LOSSES and argument(first, "reduction") == SUM:
        return _losses(family, of, alike, own)
    placement = _placement(first, placements)
    length = sum(family.lengths)

    def make(env: dict[Any, Any]) -> Any:
        return run_resized(first, placement, length, _operands(env, of, own, placements))

    for node, members in own.items():
        if node not in placements and len(set(members)) > 1:
            raise Apart(first, f"{first.target} reads another value for each piece of the logits")
    if placement == PARTIAL and first.target in SUMS:
        return [_sums(family, alike, of[first.all_input_nodes[0]])]
    if placement == PARTIAL:
        raise Apart(first, f"{first.target} adds up over the tokens of a piece")
    return [Track(alike, placement, make)]


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
    if first.target not in (aten.sum.default, aten.sum.dim_IntList) or split != Split(split.dim):
        raise Apart(first, f"{first.target} adds up over the tokens of a piece")
    dtype = first.kwargs.get("dtype")

    def make(env: dict[Any, Any]) -> torch.Tensor:
        return env[track].sum(others, keepdim=True, dtype=dtype) if others else env[track]

    def take(part: torch.Tensor, member: Node) -> torch.Tensor:
        return part.sum(split.dim, dtype=dtype).reshape(shape_of(member))

    return Track(alike, split, make, take)


def _losses(
    family: Family, of: dict[Node, Track], alike: tuple[Node, ...], own: dict[Node, tuple[Node, ...]]
) -> list[Track]:
    """Return the tracks of losses that are sums over a piece: the losses of all tokens, and the sum of each piece."""
    first = alike[0]
    scores, target, weight = args_of(first)[:3]
    ignored = args_of(first)[4]
    items = [[item for item in node.users if item.args[1] == 0] for node in alike]
    if of[scores].placement != Split(0) or any(
        len(node.users) != len(found) for node, found in zip(alike, items, strict=True)
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


def _retraced(lowered: GraphModule, family: Family, examples: Sequence[Any]) -> GraphModule:
    """Trace the graph once more, with the joined values in place of those of each piece.

    Three groups of nodes run one after the other: those that depend on no piece, the tracks, and all others.
    """
    late = descendants(family.pieces)
    ends = list(accumulate(family.lengths))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))

    def run(*values: Any) -> Any:
        env: dict[Any, Any] = {}
        given = iter(values)
        for node in lowered.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op != "output" and node not in late:
                with set_current_meta(node):
                    env[node] = execute(lowered, node, env)
        for track in family.tracks:
            with set_current_meta(track.members[0]):
                env[track] = track.make(env)
                env.update(_members(track, env[track], bounds))
        for node in lowered.graph.nodes:
            if node.op == "output":
                return [env[result] for result in node.args[0]]
            if node not in env:
                with set_current_meta(node):
                    env[node] = execute(lowered, node, env)
        raise AssertionError("a graph ends in its output")

    with tracing(examples), without_autocast():
        module = traced(run, examples)
    module.graph.eliminate_dead_code()
    return module


def _members(track: Track, value: Any, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Node, Any]]:
    """Yield the members of a track with their values."""
    if len(track.members) != len(bounds) or track.placement is None:
        yield from ((member, value) for member in track.members)
        return
    if isinstance(track.placement, tuple):
        yield from ((member, None) for member in track.members)  # their items are tracks of their own
        return
    for member, (start, end) in zip(track.members, bounds, strict=True):
        part = aten.slice.Tensor(value, track.placement.dim, start, end)
        yield member, part if track.take is None else track.take(part, member)
