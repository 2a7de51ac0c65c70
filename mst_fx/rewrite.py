"""Plan + bodies -> the region's nodes are replaced by one call of `mini_sequence`, with its prologue and epilogue."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from mst_fx.mini_sequence import CallSpec, mini_sequence
from mst_fx.region import Region
from mst_fx.stages import Stages


@dataclass(frozen=True)
class Replacement:
    """Everything that goes into the graph for one region.

    Attributes:
        region: what is replaced.
        stages: its aten graph, cut.
        bodies: forward, forward tail, backward, backward tail; None where not needed.
        spec: of the call.
    """

    region: Region
    stages: Stages
    bodies: tuple[GraphModule | None, GraphModule | None, GraphModule | None, GraphModule | None]
    spec: CallSpec


BODY_NAMES = ("forward", "forward_tail", "backward", "backward_tail")


def splice(owner: GraphModule, replacement: Replacement, node_of: Mapping[Node, Node]) -> None:
    """Put the loop in place of the region.

    Args:
        owner: the module to change; a copy of the region's owner.
        replacement: what to put in.
        node_of: maps nodes of the region's graph to nodes of `owner`'s.
    """
    region, stages, graph = replacement.region, replacement.stages, owner.graph
    sink = node_of[region.sink]
    placeholders = (node for node in stages.graph.nodes if node.op == "placeholder")
    env: dict[Node, Node] = {inner: node_of[outer] for inner, outer in zip(placeholders, region.live_ins, strict=True)}
    with graph.inserting_before(sink):
        for node in stages.prologue:
            env[node] = _copied(graph.node_copy(node, env.__getitem__), node)
        bodies = [_body(owner, name, body) for name, body in zip(BODY_NAMES, replacement.bodies, strict=True)]
        operands = [env[node] for node in stages.operands]
        call = graph.call_function(mini_sequence, (*bodies, tuple(replacement.spec), *operands))
        call.meta = {key: value for key, value in sink.meta.items() if key != "example_value"}
        for position, node in enumerate(stages.results):
            env[node] = _copied(graph.call_function(operator.getitem, (call, position)), node)
        for node in stages.epilogue:
            env[node] = _copied(graph.node_copy(node, env.__getitem__), node)
    (output,) = stages.outputs
    env[output].meta = dict(sink.meta)
    sink.replace_all_uses_with(env[output])
    for node in reversed(region.nodes):
        graph.erase_node(node_of[node])


def _body(owner: GraphModule, name: str, body: GraphModule | None) -> Node | None:
    if body is None:
        return None
    number = sum(1 for child, _ in owner.named_children() if child.startswith(f"mini_sequence_{name}_"))
    attribute = f"mini_sequence_{name}_{number}"
    owner.add_submodule(attribute, body)
    return owner.graph.get_attr(attribute)


def _copied(copy: Node, node: Node) -> Node:
    """Captured graphs keep values under another name than traced ones."""
    value: Any = node.meta.get("val")
    copy.meta = {"example_value": value} if value is not None else {}
    return copy
