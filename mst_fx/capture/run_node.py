"""Runs one node of a captured graph on values: as it is, in a no_grad block, or with the gradients that it brings."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch.autograd.graph import Node as Step
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mst_fx.core.clean_room import without_autocast
from mst_fx.core.graph_modules import operands_read
from mst_fx.core.values import fake_value, has_gradient, tensors_of
from mst_fx.ops.own_gradients import own_gradients, upstream
from mst_fx.placement.rules import rule_for


def execute(owner: GraphModule, node: Node, env: Mapping[Node, Any]) -> Any:
    """Run one node on the values of its operands; a node that holds a subgraph gives the subgraph.

    Raises:
        ValueError: the node is no call.
    """
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: env[operand])
    if node.target is operator.setitem and isinstance(args[2], int | float):
        args = (*args[:2], torch.full((), args[2], dtype=args[0].dtype, device=args[0].device))
    if node.target is operator.getitem and isinstance(args[0], torch.Tensor):
        sliced = _as_slices(args[1])
        return args[0][args[1]] if sliced is None else args[0][sliced].clone()
    if node.op == "call_function":
        function: Any = node.target
        return function(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return owner.get_submodule(str(node.target))(*args, **kwargs)
    held = getattr(owner, str(node.target), None) if node.op == "get_attr" else None
    if isinstance(held, GraphModule):
        return held
    raise ValueError(f"cannot run {node.op} {node.target}")


def _as_slices(index: Any) -> Any:
    """Return an index with a slice in place of its one list of positions that follow one another; None for another."""
    entries = index if isinstance(index, tuple) else (index,)
    lists = [place for place, entry in enumerate(entries) if isinstance(entry, list)]
    if len(lists) != 1 or not all(each is None or isinstance(each, slice | list | EllipsisType) for each in entries):
        return None
    (place,) = lists
    positions = entries[place]
    if not positions or not all(type(each) is int for each in positions):
        return None
    first, end = positions[0], positions[-1] + 1
    if positions != list(range(first, end)) or first < 0 < end:
        return None
    return (*entries[:place], slice(first, end or None), *entries[place + 1 :])


def execute_unrecorded(owner: GraphModule, node: Node, env: Mapping[Node, Any]) -> Any:
    """Run one node of a no_grad block: a new result passes no gradient back to the operands.

    An op in place returns its operand, with the gradient that it had.
    """
    given: dict[int, torch.Tensor] = {}

    def detached(value: torch.Tensor) -> torch.Tensor:
        alias = value.detach() if value.is_floating_point() or value.is_complex() else value
        given[id(alias)] = value
        return alias

    operands = {operand: tree_map_only(torch.Tensor, detached, env[operand]) for operand in node.all_input_nodes}
    result = execute(owner, node, operands)
    return tree_map_only(torch.Tensor, lambda value: given.get(id(value), value), result)


def execute_with_own_gradients(owner: GraphModule, node: Node, env: Mapping[Node, Any]) -> Any:
    """Run one node that brings gradients of its own, and its backward; their ops meet in `own_gradients`."""
    leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def leaf(value: Any, captured: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        needs = isinstance(captured, torch.Tensor) and captured.requires_grad
        if id(value) not in leaves:
            leaves[id(value)] = (value, value.detach().requires_grad_() if needs else value)
        return leaves[id(value)][1]

    operands = {operand: tree_map(leaf, env[operand], fake_value(operand)) for operand in operands_read(node)}
    operands |= {held: env[held] for held in node.all_input_nodes if held not in operands}
    with torch.enable_grad():
        result = execute(owner, node, operands)
    ends = {id(x): x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad}
    values = [end.detach() for end in ends.values()]
    wanted = [(value, own) for value, own in leaves.values() if own.requires_grad]
    with without_autocast():  # as in the backward of a program
        given = torch.autograd.grad(
            list(ends.values()), [own for _, own in wanted], list(map(upstream, values)), allow_unused=True
        )
    pairs = [(value, grad) for (value, _), grad in zip(wanted, given, strict=True) if grad is not None]
    given_values = (
        own_gradients(values, [value for value, _ in pairs], [grad for _, grad in pairs]) if pairs else values
    )
    results = dict(zip(ends, given_values, strict=True))
    return tree_map_only(torch.Tensor, lambda x: results[id(x)] if id(x) in results else x.detach(), result)


def brings_gradients(node: Node) -> bool:
    """Return whether a node's gradients are not the derivative of what it computes, but its own.

    It is a custom autograd function, or calls one: autograd of the captured value goes through a function of Python.
    """
    if node.op != "call_function" or not has_gradient(node):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator) or _is_of_torch(node.target):
        return is_custom_function(node)
    if _has_rule(node.target):
        return False  # the op runs on one chunk, with the gradient that its library has registered
    return any(isinstance(step, torch.autograd.function.BackwardCFunction) for step in _steps(node))


def _has_rule(target: Any) -> bool:
    """Return whether a node calls an op of which each overload has a placement rule."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return all(rule_for(getattr(target, overload)) is not None for overload in target.overloads())
    return rule_for(target) is not None


def _is_of_torch(target: Any) -> bool:
    """Return whether a function is one of torch's own, whose gradients are derivatives."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False  # its library may have registered any gradient
    module = getattr(target, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator") and not module.startswith("torch._dynamo")


def is_custom_function(node: Node) -> bool:
    """Return whether a node is a custom autograd function whose graphs Dynamo has captured."""
    is_operator = isinstance(node.target, torch._ops.HigherOrderOperator)
    return is_operator and getattr(node.target, "__name__", "") == "autograd_function_apply"


def _steps(node: Node) -> Iterator[Step]:
    """Yield the steps of autograd from a node's captured value back to its operands."""
    ends = {x.grad_fn for operand in node.all_input_nodes for x in tensors_of(operand)}
    pending: list[Step | None] = [x.grad_fn for x in tensors_of(node)]
    met: set[Step | None] = {None, *ends}
    while pending:
        step = pending.pop()
        if step is not None and step not in met:
            met.add(step)
            yield step
            pending += [before for before, _ in step.next_functions]
