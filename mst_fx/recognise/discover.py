"""Graph -> the regions that the patterns recognise, and what they refuse. A node belongs to one region at most."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from mst_fx.core.faults import refusal_for
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.recognise.pattern import Pattern
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region


@dataclass(frozen=True)
class Found:
    """What a pattern said of a node."""

    pattern: str
    outcome: Region | Refusal


def discover(reader: Reader, patterns: Sequence[Pattern], *, strict: bool = False) -> list[Found]:
    """Ask every pattern about every node, in graph order; the first pattern that takes a node has it.

    Args:
        reader: of the graph.
        patterns: in the order in which they are asked.
        strict: raise a pattern's exceptions; else they are refusals.
    """
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
                if (refusal.reason, refusal.node) not in refused:
                    refused.add((refusal.reason, refusal.node))
                    found.append((position, Found(pattern.name, refusal)))
                continue
            while region is not None and not taken.isdisjoint(region.nodes):
                region = region.smaller
            if region is not None:
                taken.update(region.nodes)
                found.append((position, Found(pattern.name, region)))
    return [entry for _, entry in sorted(found, key=lambda entry: entry[0])]


def _match(pattern: Pattern, reader: Reader, node: Node, failed: set[tuple[str, str]], strict: bool) -> Region | None:
    """What a pattern says of a node; that it fails in the same way again is told once.

    Raises:
        Refusal: the pattern does, or fails.
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
        name: of the attribute that holds it.
        module: the subgraph.
        callers: the nodes that run it.
        repeated: whether it is run again for backward (activation checkpointing).
        last: whether it is the last one of several that are, and others read what it gives.
    """

    name: str
    module: GraphModule
    callers: tuple[Node, ...]
    repeated: bool
    last: bool


def nested(owner: GraphModule) -> Iterator[Nested]:
    """The subgraphs that run as if they stood in the graph around them, gradients included."""
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
    """Who reads what a subgraph gives, but for the graph's own caller."""
    for user in caller.users:
        if user.target == operator.getitem:
            yield from _readers(user)
        elif user.op != "output":
            yield user


REPEATED = frozenset(["tag_activation_checkpoint", "wrap_activation_checkpoint"])
ENTERED = REPEATED | {"wrap", "invoke_subgraph", "wrap_with_set_grad_enabled"}
