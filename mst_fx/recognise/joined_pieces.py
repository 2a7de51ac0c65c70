"""Pieces of logits that are all read in the same way are joined: what is made of each is made of all of them at once.

`loss(head(x)[:9]) + loss(head(x)[9:])` computes the losses of all tokens, and adds up those of each piece: the logits
are one value again, whose rows a loop can take in any chunks. Only what has no classes any more is cut into pieces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.capture.lower import executed, retraced, set_current_meta
from mst_fx.capture.run_node import execute
from mst_fx.core.aten_ops import (
    CASTS,
    MADE_OF_NOTHING,
    ONE_PRODUCT,
    PRODUCTS,
    PRODUCTS_PLUS,
    RESHAPES,
    SHOWS_MEMORY,
    is_pointwise,
    is_random,
)
from mst_fx.core.graph_walk import descendants, walk
from mst_fx.placement.placement import Split
from mst_fx.placement.rules import args_of, shape_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.placement.rules.view import dim_of
from mst_fx.recognise.pieces import Apart, Family, Track, count, families
from mst_fx.recognise.tracks import is_wide, tracks_of

aten = torch.ops.aten


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
    """Let one node stand for all that compute the same: each piece has its own view of the class weights.

    Values that callers get stay two: they may write to one of them.
    """
    known: dict[Any, Node] = {}
    shown = _shown(graph)
    for node in graph.nodes:
        called = isinstance(node.target, torch._ops.OpOverload) and not is_random(node.target)
        if node.target is operator.getitem or (called and node.target not in MADE_OF_NOTHING):
            first = known.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if first is not node and not {first, node} <= shown:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _shown(graph: Graph) -> set[Node]:
    """Return the values that callers get, and those that these are views of."""
    return set(walk(graph.output_node().all_input_nodes, _memory_of))


def _memory_of(node: Node) -> list[Node]:
    return node.all_input_nodes[:1] if node.target in SHOWS_MEMORY else []


def _follow(family: Family) -> None:
    """Find the tracks of a family.

    Raises:
        Apart: a wide value of a piece has a reader that those of the other pieces lack, or one that cannot be joined.
    """
    classes, dependent = family.shape[-1], descendants(family.pieces)
    family.tracks.append(Track(family.pieces, Split(family.dim), _joint(family)))
    done = {*family.pieces}
    for user in family.whole.graph.nodes:
        of = {each.members[0]: each for each in family.tracks if each.sliced}
        read = [of[node] for node in user.all_input_nodes if node in of]
        if user in done or not read:
            continue
        if user.op == "output":
            break
        more = _rejoined(read[0], user)
        if not more and any(is_wide(track.members[0], classes) for track in read):
            more = tracks_of(family, read[0], user, dependent)
        done.update(member for each in more for member in each.members)
        family.tracks += more
    for track in family.tracks:
        wide = track.sliced and is_wide(track.members[0], classes)
        for user in (user for member in track.members if wide for user in member.users if user not in done):
            told = f"{user.target} reads one piece of the logits, and no other piece is read so"
            raise Apart(user, "a piece of the logits is returned" if user.op == "output" else told)


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
        operands = [node for node in product.all_input_nodes if count(shape_of(node)[:-1]) > 1]
        alone = product.target in RESHAPES or product.target in CASTS or is_pointwise(product.target)
        if not alone or len(operands) != 1 or shape_of(operands[0])[-1:] != shape_of(whole)[-1:]:
            raise Apart(family.pieces[0], f"{product.target} stands between the projection and a piece of the logits")
        way.append(product)
        (product,) = operands
    tokens, owner = factors(product)[0], whole.graph.owning_module
    assert owner is not None
    if product.target not in ONE_PRODUCT or any(
        count(shape_of(node)) >= count(shape_of(whole)) for node in product.all_input_nodes
    ):
        raise Apart(family.pieces[0], f"{product.target} is not one product of the tokens and a matrix")

    def make(env: dict[Any, Any]) -> torch.Tensor:
        picked = torch.cat([aten.slice.Tensor(env[tokens], 0, start, end) for start, end in rows])
        value = execute(owner, product, {**env, tokens: picked})
        for before, node in pairwise([product, *reversed(way)]):
            if node.target not in RESHAPES:
                value = execute(owner, node, {**env, before: value})
        return value.reshape(shape)

    return make


def _rejoined(track: Track, user: Node) -> list[Track]:
    """Return the track of a reader that joins all members of a track once more, in their order."""
    members, rank = list(track.members), len(shape_of(track.members[0]))
    if user.target != aten.cat.default or list(args_of(user)[0]) != members or track.take is not None:
        return []
    split = track.placement
    along = isinstance(split, Split) and split.outer == 1 and dim_of(user, rank) == split.dim
    return [Track((user,), None, lambda env: env[track])] if along else []


def _retraced(lowered: GraphModule, family: Family, examples: Sequence[Any]) -> GraphModule:
    """Trace the graph once more, with the joined values in place of those of each piece.

    Three groups of nodes run one after the other: those that depend on no piece, the tracks, and all others.
    """
    late = descendants(family.pieces)
    shown = _shown(lowered.graph)
    ends = list(accumulate(family.lengths))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))

    def run(*values: Any) -> Any:
        env = executed(lowered, values, lambda node: node not in late)
        for track in family.tracks:
            with set_current_meta(track.members[0]):
                env[track] = track.make(env)
                env.update(_members(track, env[track], bounds, shown))
        for node in lowered.graph.nodes:
            if node.op == "output":
                return [env[result] for result in node.args[0]]
            if node not in env:
                with set_current_meta(node):
                    env[node] = _run(lowered, node, env)
        raise AssertionError("a graph ends in its output")

    return retraced(run, examples)


def _run(lowered: GraphModule, node: Node, env: dict[Any, Any]) -> Any:
    """Run a node; a view of a member may be none of a slice of the joined value."""
    if node.target not in RESHAPES:
        return execute(lowered, node, env)
    value: torch.Tensor = env[args_of(node)[0]]
    return value.reshape(shape_of(node))


def _members(
    track: Track, value: Any, bounds: Sequence[tuple[int, int]], shown: Container[Node]
) -> Iterator[tuple[Node, Any]]:
    """Yield the members of a track with their values; those that callers get have memory of their own."""
    for member, part in _parts(track, value, bounds):
        own = member in shown and isinstance(part, torch.Tensor) and not _is_view(member)
        yield member, part.clone() if own else part


def _is_view(node: Node) -> bool:
    source = node.all_input_nodes[0] if node.target is operator.getitem else node
    return source.target in SHOWS_MEMORY


def _parts(track: Track, value: Any, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Node, Any]]:
    """Yield the members of a track with their parts of the joined value."""
    if len(track.members) != len(bounds) or track.placement is None:
        yield from ((member, value) for member in track.members)
        return
    if isinstance(track.placement, tuple):
        yield from ((member, None) for member in track.members)  # their items are tracks of their own
        return
    for member, (start, end) in zip(track.members, bounds, strict=True):
        part = _positions(value, track.placement, start, end) if isinstance(track.placement, Split) else value
        yield member, part if track.take is None else track.take(part, member)


def _positions(value: torch.Tensor, split: Split, start: int, end: int) -> torch.Tensor:
    """Return the positions of the axis from `start` to `end`."""
    if split.outer == 1:
        part: torch.Tensor = aten.slice.Tensor(value, split.dim, start * split.inner, end * split.inner)
        return part
    apart = value.unflatten(split.dim, (split.outer, -1))
    return _positions(apart, Split(split.dim + 1, 1, split.inner), start, end).flatten(split.dim, split.dim + 1)
