"""All patterns are asked about all nodes of a graph, for regions and refusals. A node is in one region at most."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from mst_fx.core.faults import refusal_for
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.recognise.growth import grown_from
from mst_fx.recognise.obstacles import REPEATED
from mst_fx.recognise.pattern import Pattern
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region


@dataclass(frozen=True)
class Found:
    """A pattern's answer about a node."""

    pattern: str
    outcome: Region | Refusal


def discover(reader: Reader, patterns: Sequence[Pattern], *, strict: bool = False) -> list[Found]:
    """Ask every pattern about every node, in graph order; the first pattern that takes a node has it.

    Args:
        reader: reads the graph.
        patterns: in the order in which they are asked.
        strict: raise a pattern's exceptions; otherwise they become refusals.

    Returns:
        Regions and refusals, in graph order of the nodes that were asked about. The reader remembers them.
    """
    key = (discover, strict, *patterns)
    if key not in reader.remembered:
        reader.remembered[key] = _discovered(reader, patterns, strict)
    found: list[Found] = reader.remembered[key]
    return found


def _discovered(reader: Reader, patterns: Sequence[Pattern], strict: bool) -> list[Found]:
    taken: set[Node] = set()
    refused: set[tuple[Reason, Node | None]] = set()
    failed: set[tuple[str, str]] = set()
    found: list[tuple[int, Found]] = []
    for pattern in patterns:
        for position, node in enumerate(reader.owner.graph.nodes):
            if node in taken or node.op in ("placeholder", "get_attr", "output"):
                continue
            try:
                region = _match(pattern, reader, node, failed, strict)
            except Refusal as refusal:
                reader.unmatched.refuse(grown_from(reader, node), refusal)
                if (refusal.reason, refusal.node) not in refused:
                    refused.add((refusal.reason, refusal.node))
                    found.append((position, Found(pattern.name, refusal)))
                continue
            whole = region
            while region is not None and not taken.isdisjoint(region.nodes):
                region = region.smaller
            if whole is not None and region is None:
                text = f"a region of {pattern.name} at {op_name(node)} needs nodes of another one, which has them"
                reader.unmatched.give_up(whole.nodes, Refusal(Reason.TAKEN, node, text))
            if region is not None:
                taken.update(region.nodes)
                found.append((position, Found(pattern.name, region)))
    return [entry for _, entry in sorted(found, key=lambda entry: entry[0])]


def _match(pattern: Pattern, reader: Reader, node: Node, failed: set[tuple[str, str]], strict: bool) -> Region | None:
    """Ask a pattern about a node; None, too, where it fails again with an exception of the same type.

    Raises:
        Refusal: the pattern raises it, or fails for the first time.
    """
    try:
        return pattern.match(reader, node)
    except Refusal:
        raise
    except Exception as error:
        kind = (pattern.name, type(error).__name__)
        if kind in failed:
            return None
        failed.add(kind)
        raise refusal_for(error, node, f"the pattern {pattern.name!r}", strict=strict) from error


@dataclass(frozen=True)
class Nested:
    """A subgraph that a higher-order operator of the graph runs.

    Attributes:
        name: the attribute that holds it.
        module: the subgraph.
        callers: the nodes that run it.
        repeated: whether it runs again in the backward (activation checkpointing).
        last: whether it is the last one of several repeated ones, and nodes of the graph read its outputs.
    """

    name: str
    module: GraphModule
    callers: tuple[Node, ...]
    repeated: bool
    last: bool


def nested(owner: GraphModule) -> Iterator[Nested]:
    """Yield the subgraphs that run as if they stood in the graph around them, gradients included."""
    repeated = [node for node in owner.graph.nodes if str(node.target) in REPEATED]
    last = repeated[-1] if len(repeated) > 1 and any(_readers(repeated[-1])) else None
    callers_of: dict[str, list[Node]] = {}
    for node in owner.graph.nodes:
        if node.op == "get_attr":
            callers_of.setdefault(str(node.target), []).extend(node.users)
    for name, callers in callers_of.items():
        child = getattr(owner, name, None)
        if isinstance(child, GraphModule) and callers and all(str(caller.target) in ENTERED for caller in callers):
            is_repeated = not set(callers).isdisjoint(repeated)
            yield Nested(name, child, tuple(callers), is_repeated, last in callers)


def _readers(caller: Node) -> Iterator[Node]:
    """Yield the nodes that read a subgraph's outputs, without the output of the graph."""
    for user in caller.users:
        if user.target == operator.getitem:
            yield from _readers(user)
        elif user.op != "output":
            yield user


ENTERED = REPEATED | {"wrap", "invoke_subgraph", "wrap_with_set_grad_enabled"}
