"""A fused projection makes features of several kinds at once, such as those of attention and of an MLP: it is parted.

`qkv, h = linear(x, w).split([q, f], -1)` becomes `qkv, h = linear(x, w_q), linear(x, w_f)`, where `w_q` and `w_f` are
split from `w`. A loop can then take the features of one kind and all that is made of them.

Terms
  fused    of a projection: its features are read in pieces alone
  piece    a slice of the features
  part     consecutive pieces that one projection makes
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.lower import apart, executed, lower, retraced, set_current_meta
from mst_fx.capture.run_node import brings_gradients
from mst_fx.core.aten_ops import SLICES
from mst_fx.core.faults import refusal_for
from mst_fx.core.graph_walk import between, descendants, walk
from mst_fx.core.refusal import Refusal
from mst_fx.core.sizes import expression, is_size, is_symbolic
from mst_fx.core.values import bytes_of, fake_value
from mst_fx.placement.placement import Split, same_shape
from mst_fx.placement.propagate import Unequal, origins, propagate
from mst_fx.placement.rules import Demand, Spans, args_of, shape_of
from mst_fx.placement.run_on_chunk import run_resized
from mst_fx.recognise.effects import leaves
from mst_fx.recognise.heads import attention_of
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close
from mst_fx.recognise.revalued import revalued

COPY = torch.ops.aten.clone.default
"""What follows a slice that is written as a list of positions (see `execute`)."""


@dataclass(frozen=True, eq=False)
class FusedProjection:
    """A projection whose features are read in pieces.

    Attributes:
        region: the nodes from the projection to the pieces, which are its outputs.
        pieces: the first feature of each piece, and the one after its last, in the order of the region's outputs.
        bytes: bytes of the largest piece.
    """

    region: Region
    pieces: tuple[tuple[int, int], ...]
    bytes: int
    _lowered: GraphModule
    _way: _Way
    _examples: Sequence[Any]

    @property
    def name(self) -> str:
        """The name of the node whose value is cut into the pieces."""
        return self.region.nodes[0].name

    def parts(self, kinds: Sequence[object]) -> list[list[int]]:
        """Return the numbers of the pieces of each part: those side by side that are of one kind."""
        along = sorted(range(len(self.pieces)), key=self.pieces.__getitem__)
        return [list(part) for _, part in groupby(along, key=kinds.__getitem__)]

    def parted(self, parts: Sequence[Sequence[int]]) -> GraphModule:
        """Return the aten graph of the region with a projection for each part."""
        way, lowered = self._way, self._lowered
        widths = [[end - start for start, end in map(self.pieces.__getitem__, part)] for part in parts]

        def run(*values: Any) -> Any:
            env = executed(lowered, values, way.whole.__contains__)
            found: dict[int, Any] = {}
            made = way.on_parts(env, list(map(sum, widths)))
            for part, own, value in zip(parts, widths, made, strict=True):
                found.update(zip(part, value.split(own, way.dim) if len(part) > 1 else [value], strict=True))
            return [found[piece] for piece in range(len(self.pieces))]

        module = retraced(run, self._examples)
        _read_once(module)
        return revalued(module, self.region, self._examples)


@dataclass(frozen=True)
class Parted:
    """A fused projection that was parted.

    Attributes:
        key: tells it from others of the compile, however often the graph is changed anew.
        features: the values that it makes.
    """

    key: Hashable
    features: tuple[Node, ...]


@dataclass(frozen=True)
class _Way:
    """The nodes of an aten graph that make the features.

    Attributes:
        uncut: makes the value that is cut.
        dim: the dim of its features.
        starts: the weights and biases, and how the features lie in each.
        placements: how the features lie in each node.
        whole: the nodes that are not made of the starts.
        split: those that are: values with features, and sizes of these.
    """

    uncut: Node
    dim: int
    starts: Mapping[Node, Split]
    placements: Mapping[Node, Any]
    whole: frozenset[Node]
    split: tuple[Node, ...]

    def on_parts(self, env: Mapping[Node, Any], sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the features of each part, of so many features each.

        Each start is split once: in the backward, the gradients of its parts are joined once.
        """
        parts_of = {
            start: env[start].split([size * split.inner for size in sizes], split.dim)
            for start, split in self.starts.items()
        }
        for part, size in enumerate(sizes):
            short = {**env, **{start: parts[part] for start, parts in parts_of.items()}}
            for node in self.split:
                with set_current_meta(node):
                    short[node] = run_resized(node, self.placements[node], size, short)
            yield short[self.uncut]


def fused_projections(
    reader: Reader, taken: Collection[Node], *, strict: bool = False
) -> Iterator[FusedProjection | Refusal]:
    """Yield the fused projections with a piece that is wide itself, or that attention is made of, and refusals.

    There is a refusal for each exception.

    Args:
        reader: reads the graph.
        taken: the nodes of regions that need no projection parted.
        strict: raise exceptions, and make no refusals of them.
    """
    met = set[Node](taken)
    for node in reader.owner.graph.nodes:
        if node in met:
            continue
        try:
            fused = _fused(reader, node)
        except (Refusal, Spans, Demand, Unequal):
            continue  # it stays as it was
        except Exception as error:
            yield refusal_for(error, node, "a fused projection", strict=strict)
            continue
        if fused is not None and met.isdisjoint(fused.region.nodes):
            met.update(fused.region.nodes)
            yield fused


def _fused(reader: Reader, node: Node) -> FusedProjection | None:
    """Return the fused projection that begins at a node; None where it makes none, or no piece is wide or attended to.

    Raises:
        Refusal: it cannot be lowered, or its features cannot be placed.
        Spans: only a factor of the features can be split.
        Demand: a value with features is whole.
        Unequal: two sizes have to be made equal first.
    """
    contraction = reader.widening(node)
    uncut = _uncut(reader, node) if contraction is not None else None
    if contraction is None or uncut is None:
        return None
    pieces = [piece for cut in uncut.users for piece in _pieces_of(cut)]
    widest = max(map(reader.numel, pieces), default=0)
    wide = widest > reader.numel(contraction.activation) or _is_attended_to(reader, pieces)
    if len(pieces) < 2 or not wide or any(map(leaves, pieces)):
        return None
    makers = _makers(reader, uncut)
    if any(map(brings_gradients, makers)) or not all(map(reader.is_pure, makers)):
        return None
    region = close(reader, {*makers, *uncut.users, *pieces}, contraction.activation)
    examples = apart([fake_value(live_in) for live_in in region.live_ins])
    lowered = lower(reader.owner, region.nodes, region.live_ins, region.outputs, region.modes, examples=examples)
    way = _way(lowered, region.live_ins.index(region.stream))
    bounds = _bounds(lowered, way) if way is not None else []
    if way is None or not bounds:
        return None
    most = max(bytes_of(fake_value(piece)) for piece in pieces)
    return FusedProjection(region, tuple(bounds), most, lowered, way, examples)


def _is_attended_to(reader: Reader, pieces: Sequence[Node]) -> bool:
    """Return whether attention is made of pieces, before any other product with weights."""
    behind = walk(pieces, lambda node: [] if reader.contraction(node) is not None else list(node.users))
    return any(attention_of(reader, node) is not None for node in behind)


def _read_once(module: GraphModule) -> None:
    """Read each size of the first value that has it: a trace reads it of the last, which may be of another part."""
    known: dict[Any, Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and is_size(node.meta.get("val")):
            node.replace_all_uses_with(known.setdefault(expression(node.meta["val"]), node))
    module.graph.eliminate_dead_code()


def _uncut(reader: Reader, node: Node) -> Node | None:
    """Return the value that a projection makes, alone or with other operands, and that is read in slices alone."""
    while True:
        readers = list(node.users)
        if readers and all(_slices(reader, user) for user in readers):
            return node
        computes = len(readers) == 1 and readers[0].op.startswith("call_") and not reader.multiplies(readers[0])
        if not computes or reader.obstacle(readers[0]) is not None or reader.numel(readers[0]) != reader.numel(node):
            return None
        (node,) = readers


def _slices(reader: Reader, node: Node) -> bool:
    ops = reader.ops(node) or set()
    cuts = not ops.isdisjoint((*SLICES, operator.getitem))
    return cuts and ops <= {*SLICES, COPY, operator.getitem} and len(node.all_input_nodes) == 1


def _pieces_of(cut: Node) -> list[Node]:
    return [cut] if isinstance(fake_value(cut), torch.Tensor) else list(cut.users)


def _makers(reader: Reader, uncut: Node) -> set[Node]:
    """Return the nodes that make a value for no other reader, back to the contractions, an adapter's among them."""

    def made_for_it(node: Node) -> list[Node]:
        operands = reader.tensor_operands(node) if reader.contraction(node) is None else []
        return [each for each in operands if each.op.startswith("call_") and len(each.users) == 1]

    return set(walk([uncut], made_for_it))


def _way(lowered: GraphModule, position: int) -> _Way | None:
    """Return the nodes that make the features, None where these do not come from whole weights and biases alone.

    Args:
        lowered: the aten graph of the region; its outputs are the pieces.
        position: of the stream among its placeholders.
    """
    uncuts = {_cut_from(piece) for piece in lowered.graph.output_node().all_input_nodes}
    uncut = uncuts.pop()
    if uncuts or not isinstance(uncut.meta["val"], torch.Tensor):  # a split into pieces of a size that varies
        return None
    dims = {_cut_dim(piece, uncut) for piece in lowered.graph.output_node().all_input_nodes}
    dim = dims.pop()
    if dims or dim is None:
        return None
    axis = Split(dim)
    starts = origins(uncut, axis)
    placements = propagate(lowered.graph, starts, until=next(iter(uncut.users))).of
    stream = [node for node in lowered.graph.nodes if node.op == "placeholder"][position]
    alone = all(start.op == "placeholder" and s.outer == 1 for start, s in starts.items())
    if not alone or stream in starts or placements.get(uncut) != axis:
        return None
    nodes, dependent = between(starts, uncut), descendants(starts)
    split = tuple(node for node in nodes if node in dependent)
    return _Way(uncut, dim, starts, placements, frozenset(nodes).difference(split), split)


def _cut_from(piece: Node) -> Node:
    while _is_cut(piece):
        piece = piece.all_input_nodes[0]
    return piece


def _is_cut(node: Node) -> bool:
    picks = node.target is operator.getitem and node.all_input_nodes[0].target in SLICES
    return picks or (node.target in (*SLICES, COPY) and len(node.all_input_nodes) == 1)


def _cut_dim(piece: Node, uncut: Node) -> int | None:
    """Return the one dim along which a piece is shorter than the value that it is cut from."""
    pairs = zip(shape_of(piece), shape_of(uncut), strict=True)
    shorter = [dim for dim, sizes in enumerate(pairs) if not same_shape(*([size] for size in sizes))]
    return shorter[0] if len(shorter) == 1 and not is_symbolic(shape_of(uncut)[shorter[0]]) else None


def _bounds(lowered: GraphModule, way: _Way) -> list[tuple[int, int]]:
    """Return the features of each piece, [start, end); none where the pieces are not all features, each once."""
    returned: Any = lowered.graph.output_node().args[0]
    bounds = []
    for piece in returned:
        features = _features(piece, way).flatten()
        first, count = int(features[0]), features.numel()
        if not torch.equal(features, torch.arange(first, first + count)):
            return []
        bounds.append((first, first + count))
    ordered = sorted(bounds)
    whole = ordered[0][0] == 0 and ordered[-1][1] == shape_of(way.uncut)[way.dim]
    return bounds if whole and all(a[1] == b[0] for a, b in pairwise(ordered)) else []


def _features(piece: Node, way: _Way) -> Any:
    """Return the numbers of the features that a piece takes: its cuts, of a value with one token."""
    if piece is way.uncut:
        shape = [1] * len(shape_of(piece))
        shape[way.dim] = -1
        return torch.arange(shape_of(piece)[way.dim]).view(shape)
    target: Any = piece.target
    return target(_features(piece.all_input_nodes[0], way), *args_of(piece)[1:])
