"""A head whose logits are cut along the tokens at once: the cut moves in front of the projection.

`head(x)[:, :-1]` becomes `head(x[:, :-1])`, and `head(x)[:, -1]` projects one token. What nobody reads is not computed,
and what is left can be looped along the tokens.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.fixed_sizes import as_if_fixed, other_dims
from mst_fx.capture.lower import apart, execute, lower, set_current_meta, traced, tracing
from mst_fx.core.aten_ops import CONTRACTIONS, CUTS
from mst_fx.core.clean_room import without_autocast
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

aten = torch.ops.aten
MAX = 2**63 - 1  # how aten writes an open end


@dataclass(frozen=True)
class CutHead:
    """A projection whose result is cut.

    Attributes:
        region: the nodes from the projection to the cut.
        cut_first: the aten graph that computes the same from fewer tokens.
        bytes_before, bytes_after: of what the projection makes.
        sizes: to be fixed where the cut is moved.
    """

    region: Region
    cut_first: GraphModule
    bytes_before: int
    bytes_after: int
    sizes: tuple[Any, ...] = ()


def cut_heads(reader: Reader, marked: Container[str] = (), *, strict: bool = False) -> Iterator[CutHead | Refusal]:
    """The projections of the graph that may project less, and what an exception about one is told as.

    Args:
        reader: of the graph.
        marked: the sizes that have to vary, by their names.
        strict: raise such exceptions.
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
            continue  # it stays as it was written; the pattern of heads has more to say about it
        except Exception as error:
            yield refusal_for(error, node, "a cut of logits", strict=strict)
            continue
        if cut_first is not None:
            before, after = (bytes_of(fake_value(n)) for n in (node, region.last))
            yield CutHead(region, cut_first, before, after, sizes)


def _chain(reader: Reader, head: Node) -> tuple[list[Node], Node] | None:
    """The nodes from a widening contraction to the cut of its result, each the only reader of the one before.

    One value on the way may also be returned.
    """
    contraction = reader.widening(head)
    if contraction is None:
        return None
    nodes, returned = [head], 0
    while True:
        readers = [user for user in nodes[-1].users if user.op != "output"]
        returned += len(readers) < len(nodes[-1].users)
        if len(readers) != 1 or returned > 1:
            return None
        (user,) = readers
        if reader.obstacle(user) is not None or reader.multiplies(user) or reader.written_by(user):
            return None
        opened = reader.opened(user)
        cuts = opened is not None and any(node.target in CUTS for node in opened.ops)
        nodes.append(user)
        if cuts and reader.numel(user) < reader.numel(nodes[-2]):
            shares = returned and leaves(user)  # whoever gets both may write to one, and finds it in the other
            return None if shares else (nodes, contraction.activation)


def _cut_first(region: Region, examples: list[Any]) -> GraphModule | None:
    """The region's aten graph, traced on these values, with its cuts moved in front; None where none can be."""
    lowered = lower(region.owner, region.nodes, region.live_ins, region.outputs, region.modes, examples=examples)
    stream = region.live_ins.index(region.stream)
    moved = None
    for _ in range(len(lowered.graph.nodes)):  # each cut moves at most once
        again = next(_moved(moved or lowered, stream, examples), None)
        if again is None:
            break
        moved = again
        if len(region.outputs) > 1:
            break  # what is returned is made of the parts on both sides of one cut
    if moved is not None and any(mode.grad for mode in region.modes.values()):
        _revalue(moved, examples)
    return moved


def _revalue(module: GraphModule, examples: list[Any]) -> None:
    """Give the nodes fake values that tell whether they need a gradient."""
    env: dict[Node, Any] = {}
    given = iter(examples)
    with tracing(examples), without_autocast(), torch.enable_grad():
        for node in module.graph.nodes:
            if node.op != "output":
                env[node] = next(given) if node.op == "placeholder" else execute(module, node, env)
                node.meta["val"] = env[node]


def _moved(lowered: GraphModule, stream: int, examples: list[Any]) -> Iterator[GraphModule]:
    """The graph with one cut moved, for each cut that can be."""
    tokens = [node for node in lowered.graph.nodes if node.op == "placeholder"][stream]
    for cut in lowered.graph.nodes:
        if (
            cut.target not in CUTS
            or same_shape(shape_of(cut), shape_of(args_of(cut)[0]))
            or args_of(cut)[4:] not in ((), (1,))
        ):
            continue
        source, axis = args_of(cut)[0], Split(dim_of(cut))
        try:
            sources = origins(source, axis)
            placements = propagate(lowered.graph, sources, until=cut).of
        except (Refusal, Spans, Demand, Unequal):
            continue
        if tokens not in sources or any(split.inner != 1 for split in sources.values()):
            continue
        projects = any(node.target in CONTRACTIONS for node in between(sources, source))
        if not projects or placements.get(source) != axis:
            continue
        yield _retraced(lowered, cut, sources, placements, examples)


def _retraced(
    lowered: GraphModule, cut: Node, sources: Mapping[Node, Split], placements: Mapping[Node, Any], examples: list[Any]
) -> GraphModule:
    """Trace the graph once more: what leads to the cut runs on the positions that it keeps."""
    way = _Way(cut, sources, placements, frozenset(lowered.graph.output_node().all_input_nodes))

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

    with tracing(examples), without_autocast():
        moved = traced(run, examples)
    moved.graph.eliminate_dead_code()
    return moved


@dataclass(frozen=True)
class _Way:
    """What leads to a cut.

    Attributes:
        cut: of the last value on the way.
        sources: that the way begins with, and how each lies along the axis.
        placements: of the nodes on the way.
        returned: what the graph gives back.
    """

    cut: Node
    sources: Mapping[Node, Split]
    placements: Mapping[Node, Any]
    returned: Container[Node]

    def cut_first(self, env: Mapping[Node, Any]) -> dict[Node, Any]:
        """The value of the cut, and of what is on the way and returned: that is put together of three parts.

        The positions in front of the cut, those that it keeps, and those behind: each position lies in one of them,
        wherever the cut begins and ends.
        """
        source, (start, end) = args_of(self.cut)[0], _bounds(self.cut, env)
        kept = self._part(env, start, end)
        value = kept[source].select(dim_of(self.cut), 0) if self.cut.target == aten.select.int else kept[source]
        whole = {}
        for node in between(self.sources, source):
            if node in self.returned:
                pieces = [self._part(env, 0, start)[node]] if start not in (0, None) else []
                pieces.append(kept[node])
                if end is not None:  # a cut may end in front of its start
                    done = sum(self.placements[node].axis_length(piece.shape) for piece in pieces)
                    pieces.append(self._part(env, done if len(pieces) > 1 else end, None)[node])
                whole[node] = torch.cat(pieces, self.placements[node].dim)
        return {self.cut: value, **whole}

    def _part(self, env: Mapping[Node, Any], start: Any, end: Any) -> dict[Node, Any]:
        """The values on the way, of the positions [start, end) of the axis."""
        short = {node: _positions(env[node], split, start, end) for node, split in self.sources.items()}
        node, split = next(iter(self.sources.items()))
        length = short[node].shape[split.dim] // split.outer
        for node in between(self.sources, args_of(self.cut)[0]):
            short[node] = run_resized(node, self.placements[node], length, {**env, **short})
        return short


def _bounds(cut: Node, env: Mapping[Node, Any]) -> tuple[Any, Any]:
    """First position that a cut keeps, and the one behind the last; None for the end."""
    bounds = [env.get(arg, arg) for arg in args_of(cut)[2:4]]
    if cut.target == aten.select.int:
        return bounds[0], bounds[0] + 1 if bounds[0] != -1 else None
    start, end = [*bounds, None, None][:2]
    return start, None if end is None or (isinstance(end, int) and end == MAX) else end


def _positions(value: torch.Tensor, split: Split, start: Any, end: Any) -> torch.Tensor:
    """Positions [start, end) of the axis; negative ones count from its end."""
    if split.outer == 1:
        return aten.slice.Tensor(value, split.dim, start, end)
    rows = aten.slice.Tensor(value.unflatten(split.dim, (split.outer, -1)), split.dim + 1, start, end)
    return rows.flatten(split.dim, split.dim + 1)
