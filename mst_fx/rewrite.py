"""Plan + bodies -> the region's nodes are replaced by one call of `mini_sequence`, with its prologue and epilogue."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.fx import Graph, GraphModule, Node

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
        detached: values that the graph shall return without a gradient.
    """

    region: Region
    stages: Stages
    bodies: tuple[GraphModule | None, GraphModule | None, GraphModule | None, GraphModule | None]
    spec: CallSpec
    detached: tuple[Node, ...] = ()


Edit: TypeAlias = Callable[..., None]
"""A change of a copied graph; takes the copy as `owner`, and `node_of`, a map from the original's nodes to its own."""


def rebuilt(gm: GraphModule, edits: Sequence[Edit], children: Mapping[str, GraphModule] | None = None) -> GraphModule:
    """A copy of the graph over the same attributes, with the edits and other subgraphs in it."""
    graph = Graph()
    node_of: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, node_of)
    graph.output(output)
    copy = GraphModule(gm, graph, gm.__class__.__name__)
    copy.meta = dict(gm.meta)
    for name, child in (children or {}).items():
        setattr(copy, name, child)
    for edit in edits:
        edit(owner=copy, node_of=node_of)
    graph.lint()
    copy.recompile()
    return copy


BODY_NAMES = ("forward", "forward_tail", "backward", "backward_tail")


def splice(owner: GraphModule, replacement: Replacement, node_of: Mapping[Node, Node]) -> None:
    """Put the loop in place of the region.

    Args:
        owner: the module to change; a copy of the region's owner.
        replacement: what to put in.
        node_of: maps nodes of the region's graph to nodes of `owner`'s.
    """
    region, stages, graph = replacement.region, replacement.stages, owner.graph
    placeholders = (node for node in stages.graph.nodes if node.op == "placeholder")
    env: dict[Node, Node] = {inner: node_of[outer] for inner, outer in zip(placeholders, region.live_ins, strict=True)}
    for node in region.early:
        node_of[region.before].prepend(node_of[node])
    with graph.inserting_before(node_of[region.before]):
        for node in stages.prologue:
            env[node] = _copied(graph.node_copy(node, env.__getitem__), node)
        bodies = [_body(owner, name, body) for name, body in zip(BODY_NAMES, replacement.bodies, strict=True)]
        operands = [env[node] for node in stages.operands]
        call = graph.call_function(mini_sequence, (*bodies, tuple(replacement.spec), *operands))
        call.meta = {key: value for key, value in region.last.meta.items() if key != "example_value"}
        for position, node in enumerate(stages.results):
            env[node] = _copied(graph.call_function(operator.getitem, (call, position)), node)
        for node in stages.epilogue:
            env[node] = _copied(graph.node_copy(node, env.__getitem__), node)
    values = [env[node] for node in stages.outputs]
    made = dict(zip(region.outputs, values, strict=True))
    _replace(owner, region, values, node_of)
    _detach(owner, [made.get(node) or node_of[node] for node in replacement.detached])


def splice_nodes(owner: GraphModule, region: Region, graph: Graph, node_of: Mapping[Node, Node]) -> None:
    """Put the nodes of an aten graph in place of the region; arguments as above."""
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    env: dict[Node, Node] = {inner: node_of[outer] for inner, outer in zip(placeholders, region.live_ins, strict=True)}
    for node in region.early:
        node_of[region.before].prepend(node_of[node])
    with owner.graph.inserting_before(node_of[region.before]):
        for node in graph.nodes:
            if node.op == "call_function":
                env[node] = _copied(owner.graph.node_copy(node, env.__getitem__), node)
                origin = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
                env[node].meta.update(origin)
    returned: Any = graph.output_node().args[0]
    _replace(owner, region, [env[node] for node in returned], node_of)


def _detach(owner: GraphModule, values: Sequence[Node]) -> None:
    """The graph returns these values, and what is joined of them, without a gradient."""
    returned = owner.graph.output_node()
    for node in [node for value in values for node in (value, *value.users) if returned in node.users]:
        with owner.graph.inserting_before(returned):
            detached = owner.graph.call_method("detach", (node,))
        detached.meta = {"example_value": node.meta["example_value"].detach()}
        returned.replace_input_with(node, detached)


def _replace(owner: GraphModule, region: Region, values: Sequence[Node], node_of: Mapping[Node, Node]) -> None:
    for outer, value in zip(region.outputs, values, strict=True):
        value.meta = dict(outer.meta)
        node_of[outer].replace_all_uses_with(value)
    for node in reversed(region.nodes):
        owner.graph.erase_node(node_of[node])


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
