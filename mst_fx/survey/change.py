"""What is changed in a captured graph before patterns are asked: loops take more of the graph that comes of it.

Ops on DTensors run on shards; checkpoints that large values cross are opened; returned logits are dropped, if the user
asks for that; pieces of logits are joined; cuts of logits move in front of the projection; fused projections are
parted.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from mst_fx.capture.decomposed import Decomposed
from mst_fx.core.config import Config
from mst_fx.core.faults import refusal_for
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import is_symbolic
from mst_fx.core.values import fake_value, has_gradient
from mst_fx.recognise.checkpoints import crossed, openable, opened
from mst_fx.recognise.discover import discover
from mst_fx.recognise.early_cut import CutHead, cut_heads
from mst_fx.recognise.fused_projections import FusedProjection, Parted, fused_projections
from mst_fx.recognise.joined_heads import JoinedHead, joined_heads
from mst_fx.recognise.local_shards import ON_SHARDS, has_shards, localised
from mst_fx.recognise.parts import taken_apart
from mst_fx.recognise.pattern import Pattern
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.rebuild import Edit, nodes_of, rebuilt
from mst_fx.recognise.region import Region
from mst_fx.report.entries import cut_head, dropped
from mst_fx.report.items import refused
from mst_fx.report.report import Report
from mst_fx.survey.wished import is_beneath_notice

JOINED = "Inductor joins products with the collectives beside them (_micro_pipeline_tp): no op on DTensors is looped"
JOINED_ADVICE = "Switch either off: a loop takes the products away from their collectives."


@dataclass(frozen=True)
class Changed:
    """A graph after all changes.

    Attributes:
        reader: of the graph.
        report: on early cuts and on logits that are dropped.
        sizes: those that the early cuts need fixed.
        apart: a refusal for each projection whose logits are read in pieces that cannot be joined.
        parted: the fused projections that were parted for the sake of a region.
    """

    reader: Reader
    report: Report
    sizes: tuple[Any, ...]
    apart: tuple[Refusal, ...]
    parted: tuple[Parted, ...]


@dataclass(frozen=True, eq=False)
class Change:
    """Changes the graphs of one compile.

    Attributes:
        config: the user's options.
        patterns: the patterns that recognise regions.
        marked: names of the sizes that have to vary.
        owner: the graph as it was captured: with the name of a node, it tells a projection from all others.
        left_alone: bodies of checkpoints that are not to be opened, and keys of projections that are not to be parted.
        known: decompositions of nodes of the compile; those of changed graphs are added.
        on_shards: what nodes of the compile do on shards (see `localised`).
    """

    config: Config
    patterns: Sequence[Pattern]
    marked: frozenset[str]
    owner: GraphModule
    left_alone: Collection[Hashable]
    known: dict[Hashable, Decomposed | None]
    on_shards: dict[Hashable, Any]

    def made_to(self, reader: Reader) -> Changed:
        """Return the changed graph; the graph of `reader` stays as it is."""
        reader, report = self._localised(reader)
        plain = taken_apart(reader.owner)
        reader = self._opened(reader if plain is None else self._changed(reader, plain))
        if self.config.returned_logits == "drop":
            reader, left_out = self._without_logits(reader)
            report = report.joined(left_out)
        reader, apart = self._joined(reader)
        reader, cuts, sizes = self._cut_early(reader)
        reader, parted, faults = self._parted(reader)
        return Changed(reader, report.joined(cuts).joined(faults), sizes, tuple(apart), parted)

    def _localised(self, reader: Reader) -> tuple[Reader, Report]:
        """Return a reader of the graph with ops on shards in place of ops on DTensors, and a report on errors."""
        if ON_SHARDS in self.left_alone:
            refusal = Refusal(Reason.SHARDED, None, JOINED, JOINED_ADVICE)
            return reader, Report(refusals=(refused("all", refusal),)) if has_shards(reader.owner) else Report()
        try:
            local = localised(reader.owner, self.owner, reader.outer, self.left_alone, self.on_shards)
        except Exception as error:
            refusal = refusal_for(error, None, "ops on shards", strict=self.config.strict)
            return reader, Report(refusals=(refused("all", refusal),))
        return (reader if local is None else self._changed(reader, local)), Report()

    def _opened(self, reader: Reader) -> Reader:
        """Return a reader of the graph with the checkpoints opened that large values of its regions cross."""
        bodies = openable(reader).difference(self.left_alone)
        while bodies:
            wide = self._changed(reader, opened(reader.owner, bodies))
            found = crossed(wide, self._regions(wide))
            if found == bodies:
                return wide
            bodies = found
        return reader

    def _regions(self, reader: Reader) -> list[Region]:
        discovered = discover(reader, self.patterns, strict=self.config.strict)
        return [found.outcome for found in discovered if isinstance(found.outcome, Region)]

    def _without_logits(self, reader: Reader) -> tuple[Reader, Report]:
        """Return a reader of the graph with None in place of the large outputs of regions with a loss, and a report."""
        training = (region for region in self._regions(reader) if _has_loss(region))
        leaving = {node: region for region in training for node in _leaving(reader, region)}
        report = Report(dropped=tuple(dropped(region, node) for node, region in leaving.items()))
        return (self._changed(reader, rebuilt(reader.owner, [], dropped=leaving)) if leaving else reader), report

    def _changed(self, reader: Reader, gm: GraphModule) -> Reader:
        """Return a reader of a graph that replaces the graph of `reader`."""
        return Reader(gm, self.known, reader.outer, reader.borders)

    def _joined(self, reader: Reader) -> tuple[Reader, list[Refusal]]:
        """Return a reader of the graph with the pieces of logits joined, and a refusal for those that stay apart."""
        found = list(joined_heads(reader, strict=self.config.strict))
        heads = [head for head in found if isinstance(head, JoinedHead) and head.bytes >= self.config.least_bytes]
        apart = [head for head in found if isinstance(head, Refusal)]
        joined, _ = self._replaced(reader, [(head.region, head.whole) for head in heads])
        return joined, apart

    def _replaced(
        self, reader: Reader, graphs: Sequence[tuple[Region, GraphModule]]
    ) -> tuple[Reader, list[list[Node]]]:
        """Return a reader of the graph with aten graphs in place of regions, and their outputs in it."""
        outputs: list[list[Node]] = []

        def put(owner: GraphModule, place: Node, node_of: Mapping[Node, Node], **what: Any) -> list[Node]:
            outputs.append(nodes_of(owner, place, node_of, **what))
            return outputs[-1]

        edits = [Edit(region, partial(put, region=region, lowered=lowered)) for region, lowered in graphs]
        return (self._changed(reader, rebuilt(reader.owner, edits)) if edits else reader), outputs

    def _cut_early(self, reader: Reader) -> tuple[Reader, Report, tuple[Any, ...]]:
        """Return a reader of the graph after its early cuts, the report on these, and the sizes that they fix."""
        report, sizes = Report(), dict[str, Any]()
        while True:
            heads = list(cut_heads(reader, self.marked, strict=self.config.strict))
            cut = [head for head in heads if isinstance(head, CutHead)]
            found = _apart([head for head in cut if self._is_worth_cutting(head)])
            if not found:
                faults = tuple(refused("cut", head) for head in heads if isinstance(head, Refusal))
                return reader, report.joined(Report(refusals=faults)), tuple(sizes.values())
            sizes.update((str(size), size) for head in found for size in head.sizes)
            report = report.joined(Report(cuts=tuple(map(cut_head, found))))
            reader, _ = self._replaced(reader, [(head.region, head.cut_first) for head in found])

    def _parted(self, reader: Reader) -> tuple[Reader, tuple[Parted, ...], Report]:
        """Return a reader of the graph with the fused projections parted of which a region needs some features alone.

        All their pieces are parted for a trial: it shows which region takes which piece.
        """
        regions = [region for region in self._regions(reader) if region.over == "tokens"]
        taken = {node for region in regions for node in region.nodes}
        found = list(fused_projections(reader, taken, strict=self.config.strict))
        faults = Report(refusals=tuple(refused("fused", each) for each in found if isinstance(each, Refusal)))
        fused = [each for each in found if isinstance(each, FusedProjection) and self._may_part(each)]
        if not fused:
            return reader, (), faults
        single = [(each, each.parts(range(len(each.pieces)))) for each in fused]
        trial, outputs = self._replaced(reader, [(each.region, each.parted(parts)) for each, parts in single])
        region_of = {node: region for region in self._regions(trial) for node in region.nodes}
        kinds = [[self._kind_of(piece, region_of.get(piece)) for piece in pieces] for pieces in outputs]
        worth = [(each, each.parts(of)) for each, of in zip(fused, kinds, strict=True) if len(set(of)) > 1]
        reader, outputs = self._replaced(reader, [(each.region, each.parted(parts)) for each, parts in worth])
        keys = [self._key(each) for each, _ in worth]
        return reader, tuple(Parted(key, tuple(pieces)) for key, pieces in zip(keys, outputs, strict=True)), faults

    def _kind_of(self, piece: Node, region: Region | None) -> object:
        """Return what tells the pieces that one projection may make; a region over heads needs all of them apart."""
        if region is None or is_beneath_notice(region, self.config):
            return None
        return piece if region.over == "heads" else region.nodes[0]

    def _may_part(self, fused: FusedProjection) -> bool:
        return fused.bytes >= self.config.least_bytes and self._key(fused) not in self.left_alone

    def _key(self, fused: FusedProjection) -> Hashable:
        return self.owner, fused.name

    def _is_worth_cutting(self, head: CutHead) -> bool:
        """Return whether the projection makes enough bytes, or may at another length: an early cut costs nothing."""
        varies = any(map(is_symbolic, fake_value(head.region.stream).shape))
        return head.bytes_before >= self.config.least_bytes or (varies and self.config.min_bytes is None)


def _apart(heads: Sequence[CutHead]) -> list[CutHead]:
    """Return the heads that share no node with an earlier one: of two projections joined before the cut, one waits."""
    chosen: list[CutHead] = []
    taken: set[Node] = set()
    for head in heads:
        if taken.isdisjoint(head.region.nodes):
            taken.update(head.region.nodes)
            chosen.append(head)
    return chosen


def _has_loss(region: Region) -> bool:
    """Return whether an output other than the large values that are returned carries gradients."""
    return any(has_gradient(node) for node in region.outputs if node not in region.returned)


def _leaving(reader: Reader, region: Region) -> Iterator[Node]:
    """Yield the large values of a region that the graph returns, as they are or as a reader of the same size."""
    for value in region.returned:
        for node in (value, *value.users):
            if reader.numel(node) == reader.numel(value) and any(user.op == "output" for user in node.users):
                yield node
