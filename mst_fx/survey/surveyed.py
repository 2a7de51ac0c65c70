"""What a survey of a graph finds, and what follows from that for the whole graph: its timeline and its device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch.fx import Node

from mst_fx.bodies.work import Work
from mst_fx.core.graph_walk import walk
from mst_fx.core.modes import TOP as TOP_MODE
from mst_fx.core.modes import Mode
from mst_fx.core.provenance import TOP as TOP_BORDERS
from mst_fx.core.provenance import Borders, op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import Hint, hint
from mst_fx.core.values import tensors_of
from mst_fx.plan.lengths import Terms
from mst_fx.predict.segments import resident_bytes, returned_bytes, segments_of
from mst_fx.predict.step_memory import Segment, Timeline
from mst_fx.predict.time import Device, device_of
from mst_fx.recognise.checkpoints import left_over
from mst_fx.recognise.discover import Nested
from mst_fx.recognise.fused_projections import Parted
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.rebuild import LOCAL
from mst_fx.recognise.region import Region
from mst_fx.recognise.write_checks import Overwritten, forbid_later_changes, written_when_run
from mst_fx.report.items import refused
from mst_fx.report.report import Report
from mst_fx.survey.side_by_side import side_by_side


@dataclass(frozen=True)
class Around:
    """What is around a graph.

    Attributes:
        repeated: whether it is in a checkpointed block, which backward recomputes in any case.
        saves_results: whether the results of its loops are saved nevertheless. In a row of checkpointed blocks each
            saves its inputs; the results of the last one are recomputed for their readers, a whole loop for one tensor.
        overwritten: what graphs around it write to after it has run.
        mode: the mode that it runs in.
        borders: where its inputs come from, and where its outputs go.
    """

    repeated: bool = False
    saves_results: bool = False
    overwritten: Overwritten = field(default_factory=dict)
    mode: Mode = TOP_MODE
    borders: Borders = TOP_BORDERS

    def inside(self, reader: Reader, child: Nested) -> Around:
        """Return the same for a subgraph of the graph.

        Raises:
            Refusal: the subgraph runs in several modes, or a value of it gets or loses its gradient after it has run.
        """
        first, *others = child.callers
        operands = {operand for caller in child.callers for operand in caller.all_input_nodes}
        forbid_later_changes(reader, child.callers, operands)
        for other in others:
            if reader.modes[other] != reader.modes[first]:
                raise Refusal(Reason.GRAD_MODE, other, f"{child.name} runs in several modes")
        overwritten = written_when_run(reader, child, self.overwritten)
        saves_results = self.saves_results or child.last
        within = "a checkpointed block" if child.repeated else f"the subgraph of {op_name(first)}"
        borders = Borders(within=within)
        return Around(self.repeated or child.repeated, saves_results, overwritten, reader.modes[first], borders)


TOP = Around()


@dataclass(frozen=True, eq=False)
class Site:
    """A region that can be looped.

    Attributes:
        pattern: name of the pattern that recognised it.
        region: its nodes, live-ins and outputs.
        work: what its loop has to do.
        around: what is around its graph.
        terms: what its chunk lengths are chosen by.
        unlooped: gives the bytes that it saves without a loop, and the most that backward needs besides, where its ops
            tell these better than its bodies: attention has memory of its own.
    """

    pattern: str
    region: Region
    work: Work
    around: Around
    terms: Terms
    unlooped: Callable[[Hint], tuple[int, int]] | None = None

    @property
    def recomputes(self) -> bool:
        """Whether its loop recomputes what would not be recomputed without it."""
        return self.work.backward == "recompute" and not self.around.repeated


@dataclass(frozen=True, eq=False)
class Surveyed:
    """What a survey finds in one graph.

    Attributes:
        reader: of the graph, in which heads project only the tokens that are read.
        sites: its regions that can be looped, in graph order.
        report: refusals, early cuts, and outputs dropped.
        children: its subgraphs, by the name of the attribute, each with the nodes that run it.
        around: what is around the graph.
        sizes: the sizes that its early cuts need fixed.
        parted: its fused projections that were parted for the sake of a region.
    """

    reader: Reader
    sites: tuple[Site, ...]
    report: Report
    children: dict[str, tuple[Surveyed, tuple[Node, ...]]]
    around: Around
    sizes: tuple[Any, ...] = ()
    parted: tuple[Parted, ...] = ()

    def all_sites(self) -> Iterator[Site]:
        """Yield the sites of the graph and of its subgraphs."""
        yield from self.sites
        for child, _ in self.children.values():
            yield from child.all_sites()

    def left_over(self, looped: Collection[Site]) -> set[Hashable]:
        """Return the changes of the graph that these loops do not need: `Change.left_alone` keeps them from it.

        They are opened checkpoints that the loops do not take as a whole (see `checkpoints`), the keys of parted
        projections of which they take nothing, and those of ops on shards of which they take none. What makes their
        tokens on shards is needed, too: without it, no pattern has these (a loss over logits that are returned).
        """
        regions = [site.region for site in self.sites if site in looped]
        taken = {node for region in regions for node in region.nodes}
        unneeded = {each.key for each in self.parted if taken.isdisjoint(each.features)}
        if looped:  # otherwise the graph stays as it was captured in any case
            nodes = self.reader.owner.graph.nodes
            behind = walk(
                (region.stream for region in regions), lambda node: node.all_input_nodes if _local(node) else ()
            )
            unneeded |= set().union(*map(_local, nodes)).difference(*map(_local, taken), *map(_local, behind))
        inner = (child.left_over(looped) for child, _ in self.children.values())
        return unneeded.union(left_over(self.reader, regions), *inner)

    def with_shards_of(self, before: Surveyed) -> Surveyed:
        """Return the same with what an earlier survey, of more ops on shards, has refused because of DTensors."""
        told = self.report.refusals
        more = (each for each in before.report.refusals if each.reason == Reason.SHARDED.name and each not in told)
        return replace(self, report=self.report.joined(Report(refusals=tuple(more))))

    def without(self, refusals: Mapping[Site, Refusal]) -> Surveyed:
        """Return the same for the graph with these regions refused."""
        left = tuple(site for site in self.sites if site not in refusals)
        added = tuple(
            refused(site.pattern, refusals[site], site.region.module) for site in self.sites if site in refusals
        )
        children = {name: (child.without(refusals), callers) for name, (child, callers) in self.children.items()}
        return replace(self, sites=left, report=self.report.joined(Report(refusals=added)), children=children)


def _local(node: Node) -> frozenset[Hashable]:
    """Return the changes by which a node runs on shards."""
    return frozenset(node.meta.get(LOCAL, ()))


def timeline_of(surveyed: Surveyed, at: Hint = hint, away: Callable[[Node], int] = lambda node: 0) -> Timeline:
    """Return the memory of the whole graph, at the sizes that `at` tells; regions are numbered as in `all_sites`.

    Args:
        surveyed: the graph.
        at: tells sizes that vary.
        away: gives the bytes that may go to the host, of what the block keeps that begins with a node.
    """
    numbers = {site: number for number, site in enumerate(surveyed.all_sites())}
    segments = tuple(_segments(surveyed, numbers, count(), at, away))
    return Timeline(resident_bytes(surveyed.reader, at), segments, returned_bytes(surveyed.reader, at))


def _segments(
    surveyed: Surveyed,
    numbers: dict[Site, int],
    fresh: Iterator[int],
    at: Hint,
    away: Callable[[Node], int],
) -> list[Segment]:
    regions = {node: numbers[site] for site in surveyed.sites for node in site.region.nodes}
    blocks: dict[Node, list[Segment]] = {}
    repeated = [each for child, callers in surveyed.children.values() for each in callers if child.around.repeated]
    beside = side_by_side(repeated) if not surveyed.around.repeated else {}
    number_of = {group: next(fresh) for group in beside.values()}
    for child, callers in surveyed.children.values():
        for caller in callers:
            inner = _segments(child, numbers, fresh, at, away)
            block = next(fresh) if child.around.repeated else None
            if caller in beside:
                inner = [replace(segment, beside=number_of[beside[caller]]) for segment in inner]
            blocks[caller] = [replace(segment, block=block) if segment.block is None else segment for segment in inner]
    return segments_of(surveyed.reader, regions, blocks, at, away=away)


def device_of_graph(surveyed: Surveyed) -> Device:
    """Return the device of the regions; the CPU where there are none."""
    site = next(surveyed.all_sites(), None)
    value: Any = site.work.stages.stream.meta["val"] if site is not None else torch.empty(0)
    return device_of(value.device)


def about_shapes(surveyed: Surveyed) -> tuple[str, ...]:
    """Return a note that tells which device a graph is explained for whose tensors are shapes alone."""
    inputs = (node for node in surveyed.reader.owner.graph.nodes if node.op in ("placeholder", "get_attr"))
    if all(x.device.type != "meta" for node in inputs for x in tensors_of(node)):
        return ()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "an H100 with 80 GB"
    return (
        f'tensors on the device "meta" stand for those of a GPU: its kernels of attention, and the rates of {name}',
    )
