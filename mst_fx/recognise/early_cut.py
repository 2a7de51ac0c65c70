"""An early cut: where logits are cut along the tokens right after the projection, the cut moves in front of it.

`head(x)[:, :-1]` becomes `head(x[:, :-1])`, and `head(x)[:, -1]` projects one token. Logits that nobody reads are not
computed, and the others can be looped along the tokens.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.fixed_sizes import as_if_fixed, other_dims
from mst_fx.capture.lower import apart, lower, retraced, set_current_meta
from mst_fx.capture.run_node import brings_gradients, execute, is_custom_function
from mst_fx.core.aten_ops import CONTRACTIONS, CUTS
from mst_fx.core.faults import refusal_for
from mst_fx.core.graph_walk import between
from mst_fx.core.refusal import Refusal
from mst_fx.core.values import bytes_of, fake_value
from mst_fx.placement.placement import Split, same_shape
from mst_fx.placement.propagate import Unequal, origins, propagate
from mst_fx.placement.rules import Demand, Spans, args_of, shape_of
from mst_fx.placement.rules.view import dim_of
from mst_fx.placement.run_on_chunk import run_resized
from mst_fx.recognise.effects import leaves
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close
from mst_fx.recognise.revalued import revalued

aten = torch.ops.aten
MAX = 2**63 - 1  # how aten writes that a slice has no end


@dataclass(frozen=True)
class CutHead:
    """A projection whose logits are cut.

    Attributes:
        region: the nodes from the projection to the cut.
        cut_first: the aten graph that computes the same from fewer tokens.
        bytes_before: bytes of the projection's value.
        bytes_after: bytes of the value after the cut.
        sizes: the sizes to fix where the cut is moved.
    """

    region: Region
    cut_first: GraphModule
    bytes_before: int
    bytes_after: int
    sizes: tuple[Any, ...] = ()


def cut_heads(reader: Reader, marked: Container[str] = (), *, strict: bool = False) -> Iterator[CutHead | Refusal]:
    """Yield the projections of the graph whose cut can move, and a refusal for each exception on the way.

    Args:
        reader: reads the graph.
        marked: names of the sizes that have to vary.
        strict: raise exceptions, and make no refusals of them.
    """
    for node in reader.owner.graph.nodes:
        try:
            found = _chain(reader, node)
            if found is None:
                continue
            nodes, activation = found
            region = close(reader, nodes, activation)
            sizes = other_dims(fake_value(region.stream), marked)
            cut_first = _cut_first(region, apart(as_if_fixed([fake_value(node) for node in region.live_ins], sizes)))
        except Refusal:
            continue  # it stays as it was; the pattern of heads says more about it
        except Exception as error:
            yield refusal_for(error, node, "a cut of logits", strict=strict)
            continue
        if cut_first is not None:
            before, after = (bytes_of(fake_value(n)) for n in (node, region.last))
            yield CutHead(region, cut_first, before, after, sizes)


def _chain(reader: Reader, head: Node) -> tuple[list[Node], Node] | None:
    """Return the nodes from a widening contraction to a cut, and its activation; None where there is no such chain.

    Each node is the only reader of the one before, but for writes in place; one value on the way may also be returned,
    if none is written to.
    """
    contraction = reader.widening(head)
    if contraction is None or is_custom_function(head):
        return None
    nodes, returned = [head], 0
    while True:
        writers, readers, leaving = _readers(reader, nodes[-1])
        nodes += writers
        returned += leaving
        if len(readers) != 1 or returned > 1 or (returned and writers):
            return None
        (user,) = readers
        if any(_forbids(reader, node) for node in (*writers, user)) or reader.written_by(user):
            return None
        decomposed = reader.decomposed(user)
        cuts = decomposed is not None and any(node.target in CUTS for node in decomposed.ops)
        nodes.append(user)
        if cuts and reader.numel(user) < reader.numel(nodes[-2]):
            shares = returned and leaves(user)  # the caller may write to one of the two and read the other
            return None if shares else (nodes, contraction.activation)


def _readers(reader: Reader, value: Node) -> tuple[list[Node], list[Node], bool]:
    """Return the nodes that write to a value in place before all else reads it, the readers, and whether it leaves."""
    writers, pending = list[Node](), set(value.users)
    while True:
        leaves_graph = any(user.op == "output" for user in pending)
        readers = sorted((user for user in pending if user.op != "output"), key=reader.order.__getitem__)
        written = set(reader.written_by(readers[0])) if readers else set()
        if not written or not written <= {value, *writers}:
            return writers, readers, leaves_graph
        writers.append(readers[0])
        pending = (pending | set(readers[0].users)) - set(writers)


def _forbids(reader: Reader, node: Node) -> bool:
    """Return whether a node is none that acts on each token alone, as far as a cut may move past it."""
    return brings_gradients(node) or reader.obstacle(node) is not None or reader.multiplies(node)


def _cut_first(region: Region, examples: list[Any]) -> GraphModule | None:
    """Return the region's aten graph, traced on these values, with its cuts moved ahead; None where no cut can move."""
    lowered = lower(region.owner, region.nodes, region.live_ins, region.outputs, region.modes, examples=examples)
    position = region.live_ins.index(region.stream)
    moved = None
    for _ in range(len(lowered.graph.nodes)):  # each cut moves at most once
        again = next(_moved(moved or lowered, position, examples), None)
        if again is None:
            break
        moved = again
        if len(region.outputs) > 1:
            break  # a returned value is joined of the ranges on both sides of one cut
    return moved and revalued(moved, region, examples)


def _moved(lowered: GraphModule, position: int, examples: list[Any]) -> Iterator[GraphModule]:
    """Yield the graph with one cut moved, for each cut that can move; the stream is the placeholder at `position`."""
    stream = [node for node in lowered.graph.nodes if node.op == "placeholder"][position]
    for cut in lowered.graph.nodes:
        if (
            cut.target not in CUTS
            or same_shape(shape_of(cut), shape_of(args_of(cut)[0]))
            or args_of(cut)[4:] not in ((), (1,))
        ):
            continue
        uncut, axis = args_of(cut)[0], Split(dim_of(cut))
        try:
            starts = origins(uncut, axis)
            placements = propagate(lowered.graph, starts, until=cut).of
        except (Refusal, Spans, Demand, Unequal):
            continue
        if stream not in starts or any(split.inner != 1 for split in starts.values()):
            continue
        projects = any(node.target in CONTRACTIONS for node in between(starts, uncut))
        if not projects or placements.get(uncut) != axis:
            continue
        yield _retraced(lowered, cut, starts, placements, examples)


def _retraced(
    lowered: GraphModule, cut: Node, starts: Mapping[Node, Split], placements: Mapping[Node, Any], examples: list[Any]
) -> GraphModule:
    """Trace the graph once more: the nodes that lead to the cut run on the positions that the cut takes."""
    way = _Way(cut, starts, placements, frozenset(lowered.graph.output_node().all_input_nodes))

    def run(*values: Any) -> Any:
        env: dict[Node, Any] = {}
        given = iter(values)
        for node in lowered.graph.nodes:
            if node.op == "output":
                return [env[result] for result in node.args[0]]
            with set_current_meta(node):
                if node is cut:
                    env.update(way.cut_first(env))
                else:
                    env[node] = next(given) if node.op == "placeholder" else execute(lowered, node, env)
        raise AssertionError("a graph ends in its output")

    return retraced(run, examples)


@dataclass(frozen=True)
class _Way:
    """The nodes that lead to a cut.

    Attributes:
        cut: the cut of the last value on the way.
        starts: the values that the way begins with, and how each lies along the axis.
        placements: placements of the nodes on the way.
        returned: the outputs of the graph.
    """

    cut: Node
    starts: Mapping[Node, Split]
    placements: Mapping[Node, Any]
    returned: Container[Node]

    def cut_first(self, env: Mapping[Node, Any]) -> dict[Node, Any]:
        """Return the values of the cut, and of the returned nodes on the way: these are joined of three ranges.

        The ranges are the positions before the cut, those that it takes, and those after it: each position lies in one
        of them, wherever the cut begins and ends.
        """
        uncut, (start, end) = args_of(self.cut)[0], _bounds(self.cut, env)
        taken = self._on_range(env, start, end)
        value = taken[uncut].select(dim_of(self.cut), 0) if self.cut.target == aten.select.int else taken[uncut]
        whole = {}
        for node in between(self.starts, uncut):
            if node in self.returned:
                ranges = [self._on_range(env, 0, start)[node]] if start not in (0, None) else []
                ranges.append(taken[node])
                if end is not None:  # a cut may end before its start
                    done = sum(self.placements[node].axis_length(x.shape) for x in ranges)
                    ranges.append(self._on_range(env, done if len(ranges) > 1 else end, None)[node])
                whole[node] = torch.cat(ranges, self.placements[node].dim)
        return {self.cut: value, **whole}

    def _on_range(self, env: Mapping[Node, Any], start: Any, end: Any) -> dict[Node, Any]:
        """Return the values on the way at the positions [start, end) of the axis."""
        short = {node: _positions(env[node], split, start, end) for node, split in self.starts.items()}
        node, split = next(iter(self.starts.items()))
        length = short[node].shape[split.dim] // split.outer
        for node in between(self.starts, args_of(self.cut)[0]):
            with set_current_meta(node):  # not that of the cut
                short[node] = run_resized(node, self.placements[node], length, {**env, **short})
        return short


def _bounds(cut: Node, env: Mapping[Node, Any]) -> tuple[Any, Any]:
    """Return the first position that a cut takes, and the one after the last; None for the end of the axis."""
    bounds = [env.get(arg, arg) for arg in args_of(cut)[2:4]]
    if cut.target == aten.select.int:
        return bounds[0], bounds[0] + 1 if bounds[0] != -1 else None
    start, end = [*bounds, None, None][:2]
    return start, None if end is None or (isinstance(end, int) and end == MAX) else end


def _positions(value: torch.Tensor, split: Split, start: Any, end: Any) -> torch.Tensor:
    """Return the positions [start, end) of the axis; negative ones count from its end."""
    if split.outer == 1:
        return aten.slice.Tensor(value, split.dim, start, end)
    rows = aten.slice.Tensor(value.unflatten(split.dim, (split.outer, -1)), split.dim + 1, start, end)
    return rows.flatten(split.dim, split.dim + 1)
