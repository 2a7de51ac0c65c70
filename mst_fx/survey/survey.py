"""Graph -> its regions, each with all that the planner needs to know. Subgraphs are surveyed in the same way.

The analysis of one node or region serves all that are alike.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from mst_fx.bodies.body import Body
from mst_fx.bodies.call import Call, assembled
from mst_fx.bodies.work import Work, analysed
from mst_fx.capture.decomposed import Decomposed
from mst_fx.core.config import Config
from mst_fx.core.faults import refusal_for
from mst_fx.core.refusal import Refusal
from mst_fx.core.sizes import Hint, hint
from mst_fx.core.values import fake_value
from mst_fx.plan.chunk_length import several, terms_of
from mst_fx.plan.lengths import Lengths, Terms
from mst_fx.plan.offer import Offer
from mst_fx.predict.extent import extent_of
from mst_fx.predict.region_memory import RegionMemory, memory_of, memory_unlooped, temporary_bytes, written_after
from mst_fx.predict.segments import bytes_unlooped
from mst_fx.predict.time import cost_of
from mst_fx.recognise.checkpoints import is_opened
from mst_fx.recognise.dead_code import without_dead_code
from mst_fx.recognise.decomposed_nodes import STAYS, moves_shards, strange_tensors
from mst_fx.recognise.discover import discover, nested
from mst_fx.recognise.fragments import cut_off
from mst_fx.recognise.norm_in_front import with_front
from mst_fx.recognise.parts import takes_part
from mst_fx.recognise.pattern import Pattern
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region
from mst_fx.recognise.write_checks import forbid_late_writes
from mst_fx.report.items import RefusedRegion, refused
from mst_fx.report.report import Report
from mst_fx.survey import messages
from mst_fx.survey.agreement import forbid_disagreement
from mst_fx.survey.change import Change
from mst_fx.survey.surveyed import TOP, Around, Site, Surveyed
from mst_fx.survey.wished import is_beneath_notice, wish_for

if TYPE_CHECKING:
    from mst_fx.verify.verify import Verified


@dataclass(frozen=True, eq=False)
class Surveyor:
    """Surveys the graphs of one compile.

    Attributes:
        config: the user's options.
        patterns: the patterns that recognise regions.
        marked: names of the sizes that have to vary.
        left_alone: changes of graphs that are not to be made (see `Change`).
    """

    config: Config
    patterns: Sequence[Pattern]
    marked: frozenset[str] = frozenset()
    left_alone: set[Hashable] = field(default_factory=set)
    _decomposed: dict[Hashable, Decomposed | None] = field(default_factory=dict)
    _on_shards: dict[Hashable, Any] = field(default_factory=dict)
    _works: dict[Hashable, Work] = field(default_factory=dict)
    _bodies: dict[Hashable, Body] = field(default_factory=dict)
    _calls: dict[tuple[Work, Lengths], Call] = field(default_factory=dict)
    _memories: dict[tuple[Work, Lengths | None, Hint], RegionMemory] = field(default_factory=dict)
    _verified: dict[tuple[Work, Lengths], Verified | Refusal] = field(default_factory=dict)

    def survey(self, gm: GraphModule, around: Around = TOP) -> Surveyed:
        """Find the regions of a captured graph, and of its subgraphs."""
        change = Change(self.config, self.patterns, self.marked, gm, self.left_alone, self._decomposed, self._on_shards)
        changed = change.made_to(without_dead_code(gm, self._decomposed, around.mode, around.borders))
        reader = changed.reader
        sites, refusals = self._sites(reader, around, changed.sizes)
        children, unentered = self._children(reader, around)
        report = changed.report.joined(_strange(reader)).joined(refusals).joined(unentered)
        looped = {node.name for site in sites for node in site.region.nodes}
        apart = [each for each in changed.apart if each.node is not None and each.node.name not in looped]
        report = report.joined(Report(refusals=tuple(refused("head", each) for each in apart)))
        return Surveyed(reader, tuple(sites), report, children, around, changed.sizes, changed.parted)

    def _sites(self, reader: Reader, around: Around, sizes: tuple[Any, ...]) -> tuple[list[Site], Report]:
        """Return the regions of a graph that can be looped, and a report on the others."""
        sites, refusals = list[Site](), list[RefusedRegion]()
        discovered = discover(reader, self.patterns, strict=self.config.strict)
        taken = {node for found in discovered if isinstance(found.outcome, Region) for node in found.outcome.nodes}
        graph = _Graph(reader, around, taken, sizes)
        for found in discovered:
            if isinstance(found.outcome, Region) and is_beneath_notice(found.outcome, self.config):
                continue
            try:
                if isinstance(found.outcome, Refusal):
                    raise found.outcome
                candidate = self._best_candidate(graph, found.outcome)
                its_own = replace(around, repeated=around.repeated or is_opened(candidate.region))
                nodes = candidate.region.nodes
                unlooped = partial(bytes_unlooped, reader, nodes) if candidate.region.over == "heads" else None
                site = Site(found.pattern, candidate.region, candidate.work, its_own, candidate.terms, unlooped)
                messages.tell_found(site)
                sites.append(site)
            except Exception as error:
                module = found.outcome.module if isinstance(found.outcome, Region) else None
                refusal = self._refusal(reader, error, found.outcome)
                messages.tell_refused(found.pattern, refusal, found.outcome)
                refusals.append(refused(found.pattern, refusal, module))
        refusals += [refused("projection", refusal) for refusal in cut_off(reader, taken)]
        return sites, Report(refusals=tuple(refusals))

    def _children(self, reader: Reader, around: Around) -> tuple[dict[str, tuple[Surveyed, tuple[Node, ...]]], Report]:
        """Return the subgraphs of a graph, and a report on those that are not entered."""
        children: dict[str, tuple[Surveyed, tuple[Node, ...]]] = {}
        refusals = []
        for child in nested(reader.owner):
            try:
                children[child.name] = (self.survey(child.module, around.inside(reader, child)), child.callers)
            except Refusal as refusal:
                reader.unmatched.refuse(child.callers, refusal)
                messages.tell_refused("subgraph", refusal)
                refusals.append(refused("all", refusal))
        return children, Report(refusals=tuple(refusals))

    def _best_candidate(self, graph: _Graph, region: Region) -> _Candidate:
        """Return the largest region that can be looped; if large values are returned, the one that leaves fewest bytes.

        The candidates are the region and the smaller ones inside it.

        Raises:
            Refusal: none of them can be looped.
        """
        candidates: list[_Candidate] = []
        refusal: Refusal | None = None
        left: Region | None = region
        while left is not None and (left.returned or not candidates):
            try:
                looped, work = self._with_front(graph, left) or (left, self._analysed(graph, left))
                terms = self._terms(looped, work, hint)
                forbid_disagreement(graph.reader, looped, work, terms.wish, self.config)
                candidates.append(_Candidate(looped, work, terms))
            except Refusal as error:
                refusal = refusal or error
            left = left.smaller
        if not candidates:
            assert refusal is not None
            raise refusal
        return min(candidates, key=lambda each: written_after(each.work, each.terms.lengths.chunk, hint))

    def _with_front(self, graph: _Graph, region: Region) -> tuple[Region, Work] | None:
        """Return the region with its front, and its work; None unless the longest dim of tokens can then be split."""
        whole = with_front(graph.reader, region, graph.taken) if region.over == "tokens" else None
        if whole is None:
            return None
        try:
            work = self._analysed(graph, whole)
        except Refusal:
            return None
        longest = max(map(hint, fake_value(whole.stream).shape[:-1]), default=0)
        return (whole, work) if hint(work.stages.length) >= longest else None

    def _analysed(self, graph: _Graph, region: Region) -> Work:
        try:
            again = graph.around.repeated or is_opened(region)
            work = analysed(region, self.config, self._works, self.marked, graph.sizes, again=again)
            if work.backward != "none":
                recomputes = work.backward == "recompute"
                forbid_late_writes(graph.reader, region, graph.around.overwritten, recomputes=recomputes)
            return work
        except Refusal:
            raise
        except Exception as error:
            raise self._fault(error, region) from error

    def _refusal(self, reader: Reader, error: Exception, outcome: Region | Refusal) -> Refusal:
        """Return what the report says of an outcome that is a refusal, or a region that ends in one or in an error."""
        if isinstance(outcome, Refusal):
            return outcome
        refusal = error if isinstance(error, Refusal) else self._fault(error, outcome)
        reader.unmatched.refuse(outcome.nodes, refusal)
        return refusal

    def _fault(self, error: Exception, region: Region) -> Refusal:
        return refusal_for(error, region.last, f"a region at {region.name}", strict=self.config.strict)

    def _terms(self, region: Region, work: Work, at: Hint) -> Terms:
        wish = wish_for(region, self.config)
        recomputes = work.backward == "recompute"
        return terms_of(extent_of(work, at, region.over), wish, self.config.accumulate, recomputes=recomputes)

    def call(self, work: Work, lengths: Lengths) -> Call:
        """Return the call with bodies for these lengths; regions that are alike share it."""
        key = (work, lengths)
        if key not in self._calls:
            self._calls[key] = self._assembled(work, lengths, tails=True)
        return self._calls[key]

    def _assembled(self, work: Work, lengths: Lengths, *, tails: bool) -> Call:
        known = len(self._bodies)
        call = assembled(work, lengths.chunk, lengths.forward, self.config.accumulate, self._bodies, tails)
        if len(self._bodies) > known:
            messages.tell_bodies(work, lengths)
        return call

    def verified(self, site: Site, lengths: Lengths) -> Verified | Refusal | None:
        """Return the outcome of running the loop (option `verify`), the same for regions alike; None without it."""
        if not self.config.verify:
            return None
        from mst_fx.verify.verify import verified

        key = (site.work, lengths)
        if key not in self._verified:
            try:
                self._verified[key] = verified(site.region, site.work, self.call(site.work, lengths), self.config)
            except Refusal as refusal:
                self._verified[key] = refusal
        found = self._verified[key]
        return Refusal(found.reason, site.region.last, found.text) if isinstance(found, Refusal) else found

    def offer(self, site: Site, at: Hint = hint, *, due: bool = False) -> Offer:
        """Return what the planner has to know of a region.

        Args:
            site: the region.
            at: tells sizes that vary.
            due: as in `Offer`.
        """
        work, around = site.work, site.around
        terms = site.terms if at is hint else self._terms(site.region, work, at)
        written = temporary_bytes(work.stages, terms.extent.length, at)
        if written < self.config.least_bytes and not (due or terms.wish.loop):
            memory = self._memory(work, None, at)  # no need to trace its bodies
        else:
            memory = self._memory(work, several(terms, demanded=True), at)  # sums of one chunk would be smaller
        if site.unlooped is not None:
            memory = memory.unlooped_as(*site.unlooped(at))
        cost = cost_of(work, memory, terms.extent, at)
        return Offer(
            terms,
            memory,
            cost,
            recomputes_nothing=work.backward != "recompute",
            repeated=around.repeated,
            saves_results=around.saves_results,
            due=due,
            communicates=work.communicates,
        )

    def _memory(self, work: Work, lengths: Lengths | None, at: Hint) -> RegionMemory:
        key = (work, lengths, at)
        if key not in self._memories:
            call = self._assembled(work, lengths, tails=False) if lengths is not None else None
            self._memories[key] = memory_of(work, call, at) if call is not None else memory_unlooped(work, at)
        return self._memories[key]


@dataclass(frozen=True, eq=False)
class _Graph:
    """What a survey knows of a graph before it analyses its regions.

    Attributes:
        reader: of the graph.
        around: what is around the graph.
        taken: the nodes of its regions.
        sizes: the sizes that its early cuts need fixed.
    """

    reader: Reader
    around: Around
    taken: Collection[Node]
    sizes: tuple[Any, ...]


@dataclass(frozen=True)
class _Candidate:
    """A region that can be looped, its work, and the terms that its chunk lengths are chosen by."""

    region: Region
    work: Work
    terms: Terms


def _strange(reader: Reader) -> Report:
    """Return a report with a refusal for ops on DTensors, and one for ops on other tensors of tensors: the first."""
    calls = [node for node in reader.owner.graph.nodes if node.op.startswith("call_") and not takes_part(node)]
    callers = {caller for child in nested(reader.owner) for caller in child.callers}
    computing = [node for node in calls if not (moves_shards(node) or node in callers or node.meta.get(STAYS) == "")]
    found = [strange for strange in map(strange_tensors, computing) if strange is not None]
    first = {strange.reason: strange for strange in reversed(found)}
    refusals = []
    for reason, strange in first.items():
        count = sum(other.reason == reason for other in found)
        refusals.append(Refusal(reason, strange.node, f"{strange.text}, as {count} op(s) of the graph do"))
    return Report(refusals=tuple(refused("all", refusal) for refusal in refusals))
