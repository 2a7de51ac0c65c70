"""Keys that are equal for two nodes, or two regions, that trace alike: they hold all that tracing depends on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from mst_fx.capture.run_node import brings_gradients
from mst_fx.core.graph_modules import held_graph, is_held, makes_settings
from mst_fx.core.sizes import VARYING, seen
from mst_fx.core.values import fake_value, has_gradient, tensors_of


def likeness_of_node(node: Node) -> Hashable:
    """Return a key that is equal for nodes that do the same with operands of the same shapes."""
    operands = node.all_input_nodes
    number = {operand: position for position, operand in enumerate(operands)}
    leaves = [leaf for operand in operands for leaf in tensors_of(operand)] if brings_gradients(node) else []
    given = (tuple(map(like, operands)), _same(operands), tuple(leaf.requires_grad for leaf in leaves))
    return (node.op, _target(node), given, like(node.args, number), like(node.kwargs, number))


def likeness_of_nodes(nodes: Sequence[Node], live_ins: Sequence[Node]) -> Hashable:
    """Return a key that is equal for sequences of nodes that compute the same from live-ins of the same shapes.

    Args:
        nodes: in graph order.
        live_ins: the values that the nodes read from outside.
    """
    number: dict[Node, int] = {node: position for position, node in enumerate((*live_ins, *nodes))}
    given = tuple((like(node), has_gradient(node)) for node in live_ins)
    return (given, tuple((n.op, _target(n), like(n.args, number), like(n.kwargs, number)) for n in nodes))


def _same(nodes: Sequence[Node]) -> Hashable:
    """Number the tensors of several nodes, the same tensor alike: a vector and its `flatten` may be one in a trace."""
    number: dict[int, int] = {}
    leaves = [leaf for node in nodes for leaf in tree_leaves(fake_value(node))]
    return tuple(number.setdefault(id(leaf), len(number)) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _target(node: Node) -> Hashable:
    """Return a key of what a node calls or holds: subgraphs and closures that are alike have equal keys."""
    target: Any = node.target
    if (subgraph := held_graph(node)) is not None:
        return (GraphModule, likeness_of_nodes(list(subgraph.graph.nodes), []))
    if node.op in ("call_module", "get_attr"):
        return (target, id(node.graph))  # a name that belongs to the graph
    if node.op in ("placeholder", "output"):
        return None
    if isinstance(target, FunctionType) and target.__closure__ is not None:
        return (target.__code__, tuple(like(cell.cell_contents) for cell in target.__closure__))
    return target


def _held(node: Node) -> Hashable:
    """Return a key of a subgraph, or of settings."""
    return (_target(node), like(node.args), like(node.kwargs)) if makes_settings(node) else _target(node)


def like(value: Any, number: Mapping[Node, int] | None = None) -> Any:
    """Return a key that is equal for arguments of equal shapes and values.

    Args:
        value: an argument of a node; a node in it stands for its captured value.
        number: nodes that stand for themselves, by number.
    """
    if isinstance(value, Node):
        if number and value in number:
            return (Node, number[value])
        return _held(value) if is_held(value) else like(fake_value(value))
    if isinstance(value, torch.Tensor):
        lazy = (value.is_conj(), value.is_neg())
        return (_like_sizes(value.shape), _like_sizes(value.stride()), value.dtype, value.device, lazy)
    if isinstance(value, (tuple, list)):
        return tuple(like(item, number) for item in value)
    if isinstance(value, dict):
        return tuple((name, like(item, number)) for name, item in value.items())
    if isinstance(value, slice):
        return (slice, *(like(bound, number) for bound in (value.start, value.stop, value.step)))
    if isinstance(value, torch.SymFloat) and seen(value) is not None:
        return (type(value), seen(value))  # a loop reads it, or each region fixes it (see `scalar_operands`)
    if isinstance(value, VARYING) or not isinstance(value, Hashable):
        return (type(value), str(value))  # hashing a symbol would guard on it
    if isinstance(value, float):
        return (type(value), value.hex())  # 0.0 and -0.0 are equal, but not alike
    return (type(value), value)  # 1, 1.0 and True are equal, but not alike


def _like_sizes(sizes: Sequence[Any]) -> Hashable:
    return tuple(sizes) if all(type(size) is int for size in sizes) else tuple(map(like, sizes))
