"""Plan + bodies -> the region's nodes are replaced by one call of `mini_sequence`, with its prologue and epilogue."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from mst_fx.assembly import Call
from mst_fx.body import Body
from mst_fx.lower import hint, layout_free, module_over
from mst_fx.mini_sequence import mini_sequence
from mst_fx.region import Region
from mst_fx.stages import Stages


@dataclass(frozen=True)
class Replacement:
    """Everything that goes into the graph for one region.

    Attributes:
        region: what is replaced.
        stages: its aten graph, cut.
        call: bodies and literals; regions that are alike share one.
        kept: whether the results are kept for backward although what is around them is computed again.
    """

    region: Region
    stages: Stages
    call: Call
    kept: bool = False


@dataclass(frozen=True)
class Edit:
    """A change of a copied graph.

    Attributes:
        region: what is replaced.
        make: puts nodes in front of a given one, and returns those that stand for the region's outputs. It takes the
            copied module, that node, and a map from the original's nodes to the copy's.
        detached: values that the graph shall return without a gradient.
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
    """A copy of the graph over the same attributes.

    Args:
        gm: stays as it is.
        edits: to be made in the copy.
        children: other subgraphs for it, by attribute.
        dropped: values in place of which it returns None.
        dead: nodes that it does without: nobody reads them but each other.
    """
    graph = Graph()
    node_of: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, node_of)
    gone = [node_of[node] for node in dropped]
    graph.output(map_arg(output, lambda node: None if node in gone else node))
    for node in gone:
        if not node.users:  # a view for the caller alone
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
    """A mark where the region's replacement goes, which stays when the nodes around it are replaced."""
    before = node_of[region.before]
    for node in region.early:
        if before < node_of[node]:
            before.prepend(node_of[node])
    with graph.inserting_before(before):
        return graph.call_function(_place, ())


BODY_NAMES = ("forward", "forward_tail", "backward", "backward_tail")


def loop(owner: GraphModule, place: Node, node_of: Mapping[Node, Node], replacement: Replacement) -> list[Node]:
    """The call of the loop, with what runs before and after it; arguments as for `Edit.make`."""
    region, stages, graph = replacement.region, replacement.stages, owner.graph
    env = _live_ins(stages.graph, region, node_of)
    with graph.inserting_before(place):
        for node in stages.prologue:
            env[node] = _copied(graph.node_copy(node, env.__getitem__), node)
        bodies = [_body(owner, name, body) for name, body in zip(BODY_NAMES, replacement.call.bodies, strict=True)]
        operands = [env[node] for node in stages.operands]
        spec = replacement.call.spec._replace(keeps=replacement.kept)
        call = graph.call_function(mini_sequence, (*bodies, tuple(spec), *operands))
        call.meta = {key: value for key, value in region.last.meta.items() if key != "example_value"}
        for position, node in enumerate(stages.results):
            result = graph.call_function(operator.getitem, (call, position))
            env[node] = _copied(_laid_out_like(result, node.meta["val"]), node)
        for node in stages.epilogue:
            env[node] = _copied(graph.node_copy(node, env.__getitem__), node)
    return [env[node] for node in stages.outputs]


def _laid_out_like(result: Node, value: torch.Tensor) -> Node:
    """A result of the loop, which is contiguous, with its dims in memory in the order of the captured value's.

    What reads it was captured for that order: not every view of one is a view of another.
    """
    strides = [hint(stride) for stride in value.stride()]
    matter = [stride for stride, size in zip(strides, value.shape, strict=True) if stride and hint(size) != 1]
    if matter == sorted(matter, reverse=True):
        return result
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    inverse = [order.index(dim) for dim in range(len(order))]
    graph = result.graph
    for target, arguments in (("permute", (order,)), ("contiguous", ()), ("permute", (inverse,))):
        result = graph.call_method(target, (result, *arguments))
    return result


def nodes_of(
    owner: GraphModule, place: Node, node_of: Mapping[Node, Node], region: Region, lowered: GraphModule
) -> list[Node]:
    """The nodes of an aten graph; arguments as for `Edit.make`."""
    env = _live_ins(lowered.graph, region, node_of)
    with owner.graph.inserting_before(place):
        for node in lowered.graph.nodes:
            if node.op == "call_function":
                env[node] = _copied(owner.graph.node_copy(node, env.__getitem__), node)
                origin = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
                env[node].meta.update(origin)
    returned: Any = lowered.graph.output_node().args[0]
    return [env[node] for node in returned]


def _live_ins(lowered: Graph, region: Region, node_of: Mapping[Node, Node]) -> dict[Node, Node]:
    placeholders = (node for node in lowered.nodes if node.op == "placeholder")
    return {inner: node_of[outer] for inner, outer in zip(placeholders, region.live_ins, strict=True)}


def _replace(graph: Graph, region: Region, values: Sequence[Node], node_of: dict[Node, Node]) -> None:
    """The values stand for the region's outputs, for later edits as well."""
    erased = [node_of[node] for node in reversed(region.nodes)]
    for outer, value in zip(region.outputs, values, strict=True):
        value.meta = dict(outer.meta)
        node_of[outer].replace_all_uses_with(value)
        node_of[outer] = value
    for node in erased:
        graph.erase_node(node)


def _detach(graph: Graph, values: Sequence[Node]) -> None:
    """The graph returns these values, and what is made of them for its caller alone, without a gradient."""
    returned = graph.output_node()
    for node in [node for value in values for node in (value, *value.users) if returned in node.users]:
        with graph.inserting_before(returned):
            detached = graph.call_method("detach", (node,))
        detached.meta = {"example_value": node.meta["example_value"].detach()}
        returned.replace_input_with(node, detached)


def _body(owner: GraphModule, name: str, body: Body | None) -> Node | None:
    """A body as an attribute of the module; one that is there already is not put there again."""
    if body is None:
        return None
    prefix = f"mini_sequence_{name}_"
    bodies = {module: child for child, module in owner.named_children() if child.startswith(prefix)}
    attribute = bodies.get(body.module)
    if attribute is None:
        attribute = f"{prefix}{len(bodies)}"
        owner.add_submodule(attribute, body.module)
    return owner.graph.get_attr(attribute)


def _copied(copy: Node, node: Node) -> Node:
    """Captured graphs keep values under another name than traced ones, and are run on any layout."""
    copy.target = layout_free(copy.target)
    value: Any = node.meta.get("val")
    copy.meta = {"example_value": value} if value is not None else {}
    return copy
