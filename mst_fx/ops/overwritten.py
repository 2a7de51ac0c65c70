"""Writes that autograd does not see: under no_grad, or through `.detach()` and `.data`.

Such a write changes what later ops read, and nothing else: the gradient goes where it went before. A graph without
writes holds the op `overwritten(before, after)` for it: the op gives the value of `after`, and passes its gradient to
`before`. `torch.library` registers the op.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node, map_arg

aten = torch.ops.aten

_library = torch.library.Library("mst_fx", "FRAGMENT")
_library.define("overwritten(Tensor before, Tensor after) -> Tensor")


def _value(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return after.clone()


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad, None


_library.impl("overwritten", _value, "CompositeExplicitAutograd")
torch.library.register_autograd("mst_fx::overwritten", _gradient, lib=_library)
overwritten = torch.ops.mst_fx.overwritten.default


class WithoutWrites(Interpreter):
    """Runs an aten graph under `functionalize`, and marks the values that change without autograd seeing it.

    Autograd does not see a write where a detach stands between the written value and the memory that it lies in.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, node: Node) -> Any:
        """Run the node as the base class does; a write behind a detach leaves the owner's gradient as it was."""
        values = [self.env[owner] for owner in map(_behind_detach, _written(node)) if owner is not None]
        hidden = [value for value in values if value.is_floating_point()]
        before = [value.clone() for value in hidden]
        result = super().run_node(node)
        for value, old in zip(hidden, before, strict=True):
            value.copy_(overwritten(old, value))
        return result


def _written(node: Node) -> list[Node]:
    """Return the operands that an aten node writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[Node] = []
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
            map_arg(given, found.append)
    return found


def _behind_detach(node: Node) -> Node | None:
    """Return the owner of a value's memory, if a detach stands between the two; else None."""
    detached = False
    while _shares_memory(node):
        detached |= node.target == aten.detach.default
        node = node.all_input_nodes[0]
    return node if detached else None


def _shares_memory(node: Node) -> bool:
    """Return whether a node's value, or one of its values, lies in the memory of its first operand."""
    if node.target is operator.getitem:
        return _shares_memory(node.all_input_nodes[0])
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(returned.alias_info is not None for returned in returns)
