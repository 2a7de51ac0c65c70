"""Graph -> the regions that the patterns recognise, and what they refuse. A node belongs to one region at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from mst_fx.pattern import Pattern
from mst_fx.reading import Reader
from mst_fx.refusal import Reason, Refusal
from mst_fx.region import Region


@dataclass(frozen=True)
class Found:
    """What a pattern said of a node."""

    pattern: str
    outcome: Region | Refusal


def discover(reader: Reader, patterns: Sequence[Pattern]) -> list[Found]:
    """Ask every pattern about every node, in graph order; the first pattern that takes a node has it."""
    taken: set[Node] = set()
    refused: set[tuple[Reason, Node | None]] = set()
    found: list[tuple[int, Found]] = []
    for pattern in patterns:
        for position, node in enumerate(reader.owner.graph.nodes):
            if node in taken or node.op in ("placeholder", "get_attr", "output"):
                continue
            try:
                region = pattern.match(reader, node)
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


def nested(owner: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The graph modules that higher-order operators of the graph call (activation checkpointing, ...), by attribute."""
    for node in owner.graph.nodes:
        if node.op == "get_attr" and "." not in str(node.target):
            child = getattr(owner, str(node.target), None)
            if isinstance(child, GraphModule) and all(_enters(user) for user in node.users):
                yield str(node.target), child


def _enters(user: Node) -> bool:
    """Whether the operator runs its subgraph as if it stood in the graph around it, gradients included."""
    return str(user.target) in ENTERED


ENTERED = frozenset(
    ["tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph", "wrap_with_set_grad_enabled"]
)
