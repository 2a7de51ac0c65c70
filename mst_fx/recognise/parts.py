"""Weights that are tensors of tensors are taken apart: an op on such a weight reads its parts, which are plain tensors.

    y = linear(x, w)    becomes    codes, scale = w.codes, w.scale
                                   y = linear_on_parts(x, codes, scale)

The op puts the weight together again and runs as it did, so a trace of it shows what the weight's class computes.
Weights with a gradient stay whole: the gradient is that of the weight, and has its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from mst_fx.core.sizes import is_symbolic
from mst_fx.core.values import fake_value, is_fake, is_sharded, is_wrapper, tensors_of
from mst_fx.recognise.rebuild import rebuilt


@dataclass(frozen=True)
class _Given:
    """Stands for an operand, by its position."""

    position: int


@dataclass(frozen=True)
class _Whole:
    """Stands for a weight that is put together of operands.

    Attributes:
        kind: its class.
        parts: the names of its parts, and the positions of the operands for them.
        shape, stride: of the weight.
        told: what the class has besides, as text: it may be no key.
        context: the same as it is.
    """

    kind: type
    parts: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    told: str
    context: Any = field(compare=False)


def taken_apart(gm: GraphModule) -> GraphModule | None:
    """Return a copy of a graph whose ops read the parts of its weights; None where there is nothing to take apart."""
    if not any(_is_opened(node) for node in gm.graph.nodes):
        return None
    copy = rebuilt(gm, [])
    graph = copy.graph
    opened = [node for node in graph.nodes if _is_opened(node)]
    parts = {node: _parts(graph, node) for node in graph.find_nodes(op="placeholder") if _is_weight(node)}
    for node in opened:
        given: dict[Node, int] = {}
        for operand in node.all_input_nodes:
            for read in parts[operand].values() if operand in parts else (operand,):
                given.setdefault(read, len(given))
        args, kwargs = _with_stand_ins(node, parts, given)
        with graph.inserting_before(node):
            new = graph.call_function(_on_parts(node.target, args, kwargs), tuple(given))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    copy.recompile()
    return copy


def takes_part(node: Node) -> bool:
    """Return whether a node reads a part of a weight."""
    return node.target is getattr


def _is_weight(node: Node) -> bool:
    """Return whether a node is an input that is a tensor of plain tensors, without a gradient.

    A DTensor is none: its ops communicate. A nested tensor is none: its sizes depend on the data.
    """
    value = fake_value(node)
    if node.op != "placeholder" or not isinstance(value, torch.Tensor) or not is_wrapper(value):
        return False
    if value.is_nested or is_sharded(value):
        return False
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    sizes = (*value.shape, *value.stride())
    return (
        not value.requires_grad
        and all(is_fake(getattr(value, name)) for name in names)
        and not any(map(is_symbolic, sizes))
    )


def _is_opened(node: Node) -> bool:
    """Return whether a function reads such weights, and gives plain tensors."""
    if node.op != "call_function" or takes_part(node) or not any(map(_is_weight, node.all_input_nodes)):
        return False
    others = [x for operand in node.all_input_nodes if not _is_weight(operand) for x in tensors_of(operand)]
    return bool(tensors_of(node)) and all(map(is_fake, (*tensors_of(node), *others)))


def _parts(graph: Graph, weight: Node) -> dict[str, Node]:
    """Add the nodes that read the parts of a weight."""
    value = fake_value(weight)
    names, _ = value.__tensor_flatten__()
    last = graph.find_nodes(op="placeholder")[-1]
    found = {}
    with graph.inserting_after(last):
        for name in reversed(names):
            found[name] = graph.call_function(getattr, (weight, name))
            found[name].meta = {"example_value": getattr(value, name)}
    return {name: found[name] for name in names}


def _with_stand_ins(node: Node, parts: Mapping[Node, Mapping[str, Node]], given: Mapping[Node, int]) -> Any:
    """Return the arguments of a node with stand-ins for its operands."""

    def stand_in(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        if argument not in parts:
            return _Given(given[argument])
        value = fake_value(argument)
        _, context = value.__tensor_flatten__()
        positions = tuple((name, given[part]) for name, part in parts[argument].items())
        return _Whole(type(value), positions, tuple(value.shape), tuple(value.stride()), str(context), context)

    return map_aggregate((node.args, node.kwargs), stand_in)


def _on_parts(function: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
    """Return the function of the operands that the stand-ins name."""

    def run(*given: torch.Tensor) -> Any:
        def filled(argument: Any) -> Any:
            if isinstance(argument, _Given):
                return given[argument.position]
            if isinstance(argument, _Whole):
                inner = {name: given[position] for name, position in argument.parts}
                kind: Any = argument.kind
                return kind.__tensor_unflatten__(inner, argument.context, argument.shape, argument.stride)
            return argument

        own_args, own_kwargs = map_aggregate((args, kwargs), filled)
        return function(*own_args, **own_kwargs)

    run.__wrapped__ = function  # type: ignore[attr-defined]
    return run
