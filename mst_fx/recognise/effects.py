"""Effects of a torch-level node: the operands that it writes to, and gradients that come back from it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterator
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from mst_fx.capture.run_node import is_custom_function
from mst_fx.core.graph_modules import held_graph
from mst_fx.core.graph_walk import ancestors, walk
from mst_fx.core.values import fake_value, has_gradient, is_view, storages_of, storages_of_all

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_IN_PLACE_OPERATORS = frozenset(["setitem", *(f"i{name}" for name in _OPERATORS)])
_SIDE_EFFECTS = {
    "batch_norm": ("training", ("running_mean", "running_var")),
    "native_batch_norm": ("training", ("running_mean", "running_var")),
    "instance_norm": ("use_input_stats", ("running_mean", "running_var")),
    "embedding": ("max_norm", ("weight",)),
    "embedding_bag": ("max_norm", ("weight",)),
}
"""Functions that may update arguments: the argument that says whether they do, and the updated ones."""


DATA = frozenset(["_get_data_attr"])
"""Functions whose view shares no version with its base: autograd does not notice a write to it."""
REBINDS = frozenset(["set_", "_lower_version_count_by_1", "shallow_copy_data_"])
"""Methods, functions and, from torch 2.15, an op that Dynamo captures for `x.data = y`."""
SWITCHES_GRADIENTS = ("detach_", "requires_grad_")
"""Methods that change in place whether a value needs a gradient."""
DETACHED = DATA | {"detach"}
"""Functions and methods that give a view without a gradient."""


def writes(node: Node) -> bool:
    """Return whether a torch-level node writes to one of its operands, by its name and its schema."""
    return bool(written_by(node))


def written_by(node: Node) -> tuple[Node, ...]:
    """Return the operands that a torch-level node writes to, by its name and its schema."""
    found: list[Node] = []
    map_arg(tuple(_written(node)), found.append)
    for subgraph in subgraphs_of(node):
        found += _written_in(node, subgraph)
    return tuple(dict.fromkeys(found))


def _written_in(caller: Node, subgraph: GraphModule) -> list[Node]:
    """Return the operands of a higher-order operator that its subgraph writes to; all where that is not known."""
    targets = [target for inner in subgraph.graph.nodes for target in written_by(inner)]
    written, placeholders = storages_of_all(targets), subgraph.graph.find_nodes(op="placeholder")
    reached = ancestors(targets)  # torch 2.11 does not tell the values of gradients that come in
    is_known = all(fake_value(given) is not None for given in placeholders if given in reached)
    if not targets or (is_known and written.isdisjoint(storages_of_all(placeholders))):
        return []
    pairs = handed(caller, subgraph)
    if not is_known or any(storages_of(given) != storages_of(operand) for given, operand in pairs):
        return caller.all_input_nodes  # a custom backward reads what its forward has saved
    return [operand for given, operand in pairs if not written.isdisjoint(storages_of(given))]


def rebinds(node: Node) -> bool:
    """Return whether a node lets its operand lie in the memory of another value (`x.data = y`).

    It writes to no memory: of the values before it, only the operand itself changes, and no view of it.
    """
    return _name(node) in REBINDS


def used_by(node: Node) -> set[Node]:
    """Return the operands that a node reads; a custom function may be handed more than its forward reads."""
    if not is_custom_function(node):
        return set(node.all_input_nodes)
    pairs = handed(node, subgraphs_of(node)[0])
    return {operand for given, operand in pairs if given.users}


def sends_back(node: Node) -> bool:
    """Return whether a gradient may come back from a node: its value, or an operand that it writes (`out[0] = x`)."""
    return any(map(has_gradient, (node, *written_by(node))))


def gradients_in(graph: Graph) -> list[Node]:
    """Return the nodes that differentiate within the graph (`torch.autograd.grad` in the compiled function)."""
    return [node for node in graph.nodes if node.target is torch.autograd.grad]


def writes_data(node: Node) -> bool:
    """Return whether a node, or its subgraph, writes to a value of `.data`, or to a view of one."""
    if any(lies_behind(target, DATA) for target in written_by(node)):
        return True
    return any(writes_data(inner) for subgraph in subgraphs_of(node) for inner in subgraph.graph.nodes)


def leaves(node: Node, without: Node | None = None) -> bool:
    """Return whether the caller of the graph gets a value, or a view of it; views by way of `without` do not count."""

    def views(base: Node) -> list[Node]:
        return [user for user in base.users if user is not without and (user.op == "output" or is_view(user))]

    return any(reached.op == "output" for reached in walk([node], views))


def lies_behind(node: Node, names: Container[str]) -> bool:
    """Return whether a value is a view made by one of these functions or methods, or a view of such a view."""

    def viewed(view: Node) -> list[Node]:
        memory = storages_of(view) if is_view(view) else set()
        return [operand for operand in view.all_input_nodes if not memory.isdisjoint(storages_of(operand))]

    return any(is_view(view) and _name(view) in names for view in walk([node], viewed))


def subgraphs_of(node: Node) -> list[GraphModule]:
    """Return the subgraphs that a higher-order operator runs."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    return [module for module in map(held_graph, node.all_input_nodes) if module is not None]


def handed(caller: Node, subgraph: GraphModule) -> list[tuple[Node, Node]]:
    """Return pairs of a subgraph's placeholder and the operand for it: the last operands of the caller."""
    placeholders = subgraph.graph.find_nodes(op="placeholder")
    pairs = zip(reversed(placeholders), reversed(tree_leaves(caller.args)), strict=False)
    return [(given, operand) for given, operand in pairs if isinstance(operand, Node)]


def _written(node: Node) -> Iterator[Any]:
    """Yield the arguments that a node writes to: nodes, or lists of nodes."""
    if node.op not in ("call_function", "call_method"):
        return
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    name = _name(node)
    if name == "triton_kernel_wrapper_mutation":
        yield [*node.all_input_nodes]
    first = node.args[0] if node.args else node.kwargs.get("self", node.kwargs.get("input"))
    for argument in _mutable_arguments(_operator(node)):
        positional = node.args[argument.position] if argument.position < len(node.args) else None
        value = node.kwargs.get(argument.name, positional)
        if argument.is_list == _is_list(value):  # `sort` of a list is in place
            yield value
    tells_all = isinstance(node.target, _OPERATORS_OF_TORCH)
    if not tells_all and (name.endswith("_") or name in _IN_PLACE_OPERATORS):
        yield first
    given = _arguments(node, name)
    if given.get("inplace") is True:
        yield first
    told_by, updated = _SIDE_EFFECTS.get(name, ("", ()))
    if given.get(told_by):
        yield [given.get(argument) for argument in updated]


def _name(node: Node) -> str:
    """Return the name of the function, method or operator that a node calls; `imul` for `__imul__`."""
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.partition("::")[2]
    else:
        name = getattr(node.target, "__name__", "")
        if _is_operator(node.target):
            name = name.rstrip("_")  # `and_` is no in-place op
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def _is_operator(target: Any) -> bool:
    return getattr(target, "__module__", None) in ("_operator", "operator")


class _Mutable(NamedTuple):
    """An argument that an operator writes to; a keyword-only one has a position after all others."""

    position: int
    name: str
    is_list: bool


_OPERATORS_OF_TORCH = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _operator(node: Node) -> Any:
    """Return the operator that a node calls, by its name for methods and for functions of torch written in C++."""
    target: Any = node.target
    if node.op == "call_method" or (isinstance(target, BuiltinFunctionType) and not _is_operator(target)):
        target = getattr(torch.ops.aten, _name(node), None)
    return target if isinstance(target, _OPERATORS_OF_TORCH) else None


@functools.cache
def _mutable_arguments(called: Any) -> tuple[_Mutable, ...]:
    """Return the mutable arguments of an operator, or of all its overloads; none for None."""
    if called is None:
        return ()
    is_packet = isinstance(called, torch._ops.OpOverloadPacket)
    overloads = [getattr(called, name) for name in called.overloads()] if is_packet else [called]
    found: dict[_Mutable, None] = {}
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                place = sys.maxsize if argument.kwarg_only else position
                found[_Mutable(place, argument.name, isinstance(argument.type, torch.ListType))] = None
    return tuple(found)


def _is_list(given: Any) -> bool:
    return isinstance(fake_value(given) if isinstance(given, Node) else given, list | tuple)


def _arguments(node: Node, name: str) -> dict[str, Any]:
    """Return the arguments of a function that may write in place, by name, with the defaults where it tells them."""
    signature = _signature(node.target) if node.op == "call_function" else None
    if name in _SIDE_EFFECTS and (signature is None or _operator(node) is not None):
        names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if signature is None or not ("inplace" in signature.parameters or name in _SIDE_EFFECTS):
        return dict(node.kwargs)
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return dict(node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None
