"""A captured graph is copied with regions and subgraphs replaced, and nodes left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node, map_arg

from mst_fx.core.graph_modules import is_held, layout_free, module_over
from mst_fx.recognise.region import Region

OPENED_FROM = "mst_fx_opened_from"
"""The key of a node's meta that holds the bodies of checkpoints that it was opened from (see `checkpoints`)."""

LOCAL = "mst_fx_local"
"""The key of a node's meta that holds the changes by which it runs on shards (see `local_shards`)."""
MARKS = (OPENED_FROM, LOCAL)
"""What the nodes of a region hand on to those that are put in their place."""


@dataclass(frozen=True)
class Edit:
    """One change of a copied graph.

    Attributes:
        region: the region to replace.
        make: adds nodes in front of a given node, and returns those that stand for the region's outputs. It takes the
            copied module, the given node, and a map from the original's nodes to the copy's.
        detached: values that the copy returns without a gradient.
    """

    region: Region
    make: Callable[[GraphModule, Node, Mapping[Node, Node]], Sequence[Node]]
    detached: tuple[Node, ...] = ()


def rebuilt(
    gm: GraphModule,
    edits: Sequence[Edit],
    children: Mapping[str, GraphModule] | None = None,
    dropped: Collection[Node] = (),
    dead: Collection[Node] = (),
) -> GraphModule:
    """Return a copy of the graph over the same attributes, with the edits.

    Args:
        gm: the original; it stays as it is.
        edits: changes of the copy, made in this order.
        children: new subgraphs of the copy, by attribute.
        dropped: values in place of which the copy returns None.
        dead: nodes to leave out: no other nodes read them.
    """
    graph = Graph()
    node_of: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, node_of)
    gone = [node_of[node] for node in dropped]
    graph.output(map_arg(output, lambda node: None if node in gone else node))
    for node in gone:
        if not node.users:  # only the caller has read it
            graph.erase_node(node)
    for node in sorted(dead, reverse=True):
        graph.erase_node(node_of[node])
    copy = module_over(gm, graph)
    copy.meta = dict(gm.meta)
    for name, child in (children or {}).items():
        setattr(copy, name, child)
    for edit, place in [(edit, _place(graph, edit.region, node_of)) for edit in edits]:
        values = edit.make(copy, place, node_of)
        graph.erase_node(place)
        _replace(graph, edit.region, values, node_of)
        _detach(graph, [node_of[node] for node in edit.detached])
    graph.lint()
    copy.recompile()
    return copy


def _place(graph: Graph, region: Region, node_of: Mapping[Node, Node]) -> Node:
    """Put a mark where the region's replacement goes; it stays when the nodes around it are replaced."""
    before = node_of[region.before]
    for node in region.moved_ahead:
        if before < node_of[node]:
            before.prepend(node_of[node])
    with graph.inserting_before(before):
        return graph.call_function(_place, ())


def nodes_of(
    owner: GraphModule, place: Node, node_of: Mapping[Node, Node], region: Region, lowered: GraphModule
) -> list[Node]:
    """Copy the nodes of a region's aten graph in front of `place`; arguments and return as for `Edit.make`."""
    env = live_ins_of(lowered.graph, region, node_of)
    marks = {key: frozenset[Any]().union(*(node.meta.get(key, ()) for node in region.nodes)) for key in MARKS}
    marks = {key: value for key, value in marks.items() if value}
    with owner.graph.inserting_before(place):
        for node in lowered.graph.nodes:
            if node.op == "call_function":
                env[node] = captured(owner.graph.node_copy(node, env.__getitem__), node)
                origin = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
                env[node].meta.update({**origin, **marks})
    returned: Any = lowered.graph.output_node().args[0]
    return [env[node] for node in returned]


def live_ins_of(lowered: Graph, region: Region, node_of: Mapping[Node, Node]) -> dict[Node, Node]:
    """Return the copy's node for each placeholder of a region's aten graph."""
    placeholders = (node for node in lowered.nodes if node.op == "placeholder")
    return {inner: node_of[outer] for inner, outer in zip(placeholders, region.live_ins, strict=True)}


def _replace(graph: Graph, region: Region, values: Sequence[Node], node_of: dict[Node, Node]) -> None:
    """Let the values stand for the region's outputs, for later edits, too, and erase the region's nodes."""
    erased = [node_of[node] for node in reversed(region.nodes)]
    for outer, value in zip(region.outputs, values, strict=True):
        value.meta = dict(outer.meta)
        node_of[outer].replace_all_uses_with(value)
        node_of[outer] = value
    for node in erased:
        if not (node.users and is_held(node)):  # what is held may be read elsewhere, too
            graph.erase_node(node)


def _detach(graph: Graph, values: Sequence[Node]) -> None:
    """Let the graph return these values, and what it makes of them for its caller alone, without a gradient."""
    returned = graph.output_node()
    for node in [node for value in values for node in (value, *value.users) if returned in node.users]:
        with graph.inserting_before(returned):
            detached = graph.call_method("detach", (node,))
        detached.meta = {"example_value": node.meta["example_value"].detach()}
        returned.replace_input_with(node, detached)


def captured(copy: Node, node: Node) -> Node:
    """Make a node copied from a traced graph a captured one: other key for its value, ops for any layout; return it."""
    copy.target = layout_free(copy.target)
    value: Any = node.meta.get("val")
    copy.meta = {"example_value": value} if value is not None else {}
    return copy
