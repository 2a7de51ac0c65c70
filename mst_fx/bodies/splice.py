"""One call of `mini_sequence`, with prologue and epilogue, replaces the nodes of a region."""

from __future__ import annotations

import operator
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from mst_fx.bodies.body import Body
from mst_fx.bodies.call import Call
from mst_fx.core.aten_ops import DRAWS
from mst_fx.core.graph_walk import ancestors
from mst_fx.core.sizes import hint
from mst_fx.core.values import bytes_made, fake_value, has_gradient, storages_of, storages_of_all
from mst_fx.placement.partition import Stages
from mst_fx.recognise.rebuild import captured, live_ins_of
from mst_fx.recognise.region import Region
from mst_fx.runtime.mini_sequence import mini_sequence, with_gradients

aten = torch.ops.aten


@dataclass(frozen=True)
class Replacement:
    """Everything that goes into the graph for one region.

    Attributes:
        region: the region to replace.
        stages: its aten graph, partitioned.
        call: bodies and literals; regions that are alike share one.
        saves_results: whether the results are saved for backward although the block around them is recomputed.
    """

    region: Region
    stages: Stages
    call: Call
    saves_results: bool = False


BODY_NAMES = ("forward", "forward_tail", "backward", "backward_tail")


def loop(owner: GraphModule, place: Node, node_of: Mapping[Node, Node], replacement: Replacement) -> list[Node]:
    """Add the call of the loop with its prologue and epilogue; arguments and return as for `Edit.make`."""
    region, stages, graph = replacement.region, replacement.stages, owner.graph
    env = live_ins_of(stages.graph, region, node_of)
    with graph.inserting_before(place):
        remade = _remade(stages, replacement.call.spec.wanted, env)
        for node in stages.prologue:
            env[node] = captured(graph.node_copy(node, env.__getitem__), node)
            if node in remade:
                env[node].meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}
        bodies = [_body(owner, name, body) for name, body in zip(BODY_NAMES, replacement.call.bodies, strict=True)]
        _project(graph, stages, env)
        leaves = [env[node] for node in stages.leaves]
        spec = replacement.call.spec._replace(saves_results=replacement.saves_results)
        call = graph.call_function(mini_sequence, (*bodies, tuple(spec), *leaves))
        call.meta = {key: value for key, value in region.last.meta.items() if key != "example_value"}
        env.update(_items(graph, call, stages.results))
        for node in stages.behind:
            env[node] = captured(graph.node_copy(node, env.__getitem__), node)
        if stages.sums:
            read = [env[stages.ends[i]] for i in (*spec.differentiable, *spec.reused)]
            sums = graph.call_function(with_gradients, (*bodies[2:], tuple(spec), *read, *leaves))
            sums.meta = dict(call.meta)
            env.update(_items(graph, sums, [stages.ends[i] for i in spec.differentiable]))
        for node in stages.epilogue:
            env[node] = captured(graph.node_copy(node, env.__getitem__), node)
    return [env[node] for node in stages.outputs]


def _items(graph: Graph, call: Node, nodes: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """Yield, for each of these nodes of a region's aten graph, itself and the value that a call gives for it."""
    for position, node in enumerate(nodes):
        result = graph.call_function(operator.getitem, (call, position))
        yield node, captured(_laid_out_like(result, node.meta["val"]), node)


def _project(graph: Graph, stages: Stages, env: dict[Node, Node]) -> None:
    """Add the projections, for their derivatives: nobody reads their values, so that a compiler drops them.

    Those that multiply the same tokens are made by one function, where they are plain products.
    """
    if stages.projecting:
        from mst_fx.ops.projected import projected  # late: torch takes 5 ms to register its op

    plain = [node for node in stages.projections if node.target == aten.mm.default]
    tokens = {node: _spelled(node.args[0]) for node in plain}
    for node in stages.projecting:
        alike = [other for other in plain if tokens[other] == tokens.get(node)]
        if len(alike) < 2:
            env[node] = captured(graph.node_copy(node, env.__getitem__), node)
        elif node is alike[-1]:
            factors: list[Any] = [node.args[0], *(other.args[1] for other in alike)]
            env.update(_items(graph, graph.call_function(projected, tuple(env[factor] for factor in factors)), alike))


def _spelled(node: Any) -> str:
    """Return what tells a node from one that computes something else: views of one value are alike."""
    return f"{node.target}{node.args}{node.kwargs}" if node.op == "call_function" else str(node)


def _remade(stages: Stages, wanted: Container[int], live_in_of: Mapping[Node, Node]) -> set[Node]:
    """Return the nodes of the prologue to run again in the backward, as under activation checkpointing.

    They make an operand without a gradient: of parameters, which exist anyway (a weight in few bits), or of values that
    have no gradient and fewer bytes (an unpacked weight).

    Args:
        stages: of the region.
        wanted: positions of the leaves that get a gradient.
        live_in_of: the node in the graph for each placeholder of the stages.
    """
    remade: set[Node] = set()
    if not stages.prologue:
        return remade
    kept = _in_parameters(live_in_of.values())
    for position, operand in enumerate(stages.operands):
        made = ancestors([operand])
        sources = made.intersection(live_in_of)
        given = [live_in_of[source] for source in sources]
        if position in wanted or operand not in stages.prologue or any(node.target in DRAWS for node in made):
            continue
        grown = not any(map(has_gradient, given)) and bytes_made(operand) > sum(map(bytes_made, sources))
        if grown or (given and kept.issuperset(given)):
            remade |= made - sources
    return remade


def _in_parameters(live_ins: Collection[Node]) -> set[Node]:
    """Return the values that lie in parameters, which exist as long as the model does."""
    inputs = next(iter(live_ins)).graph.find_nodes(op="placeholder") if live_ins else []
    kept = storages_of_all(given for given in inputs if isinstance(fake_value(given), torch.nn.Parameter))
    return {node for node in live_ins if storages_of(node) <= kept}


def _laid_out_like(result: Node, value: torch.Tensor) -> Node:
    """Return a result of the loop, which is contiguous, with the dims in memory as in the captured value.

    Its readers were captured for that layout: not every view of one layout is a view of another.
    """
    strides = [hint(stride) for stride in value.stride()]
    matter = [stride for stride, size in zip(strides, value.shape, strict=True) if stride and hint(size) != 1]
    if matter == sorted(matter, reverse=True):
        return result
    dims = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    inverse = [dims.index(dim) for dim in range(len(dims))]
    graph = result.graph
    for target, arguments in (("permute", (dims,)), ("contiguous", ()), ("permute", (inverse,))):
        result = graph.call_method(target, (result, *arguments))
    return result


def _body(owner: GraphModule, name: str, body: Body | None) -> Node | None:
    """Make a body an attribute of the module, if it is none yet; return a node that reads it."""
    if body is None:
        return None
    prefix = f"mini_sequence_{name}_"
    bodies = {module: child for child, module in owner.named_children() if child.startswith(prefix)}
    attribute = bodies.get(body.module)
    if attribute is None:
        attribute = f"{prefix}{len(bodies)}"
        owner.add_submodule(attribute, body.module)
    return owner.graph.get_attr(attribute)
