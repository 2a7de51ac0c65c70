"""Writes that autograd does not look at: under no_grad, or through `.detach()` and `.data`.

Such a write changes what later ops read, and nothing else: the gradient goes where it went before. In a graph without
writes that is an op of two values, `overwritten(before, after)`: the value of `after`, with the gradient of `before`.

It is registered by `torch.library`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

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
    """Runs an aten graph under `functionalize`, and marks the values that autograd does not know to have changed.

    A write is such a one where a detach stands between what is written and the memory that it lies in.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, node: Node) -> Any:
        """As the base class does; what lies behind a detach keeps its gradient when it is written."""
        memory = _behind_detach(node)
        value = self.env[memory] if memory is not None else None
        if value is None or not value.is_floating_point():
            return super().run_node(node)
        before = value.clone()
        result = super().run_node(node)
        value.copy_(overwritten(before, value))
        return result


def _behind_detach(node: Node) -> Node | None:
    """What owns the memory that a node writes to, if a detach stands in between; else None."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    written: Any = node.args[0] if node.args else node.kwargs.get("self")
    for declared, given in zip(node.target._schema.arguments, node.args, strict=False):
        if declared.alias_info is not None and declared.alias_info.is_write:
            written = given
    written = node.kwargs.get("out", written)
    detached = False
    while isinstance(written, Node) and _shares_memory(written):
        detached |= written.target == aten.detach.default
        written = written.args[0]
    return written if detached and isinstance(written, Node) else None


def _shares_memory(node: Node) -> bool:
    """Whether a node's value lies in the memory of its first operand."""
    if node.target is operator.getitem:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(returned.alias_info is not None for returned in returns)
