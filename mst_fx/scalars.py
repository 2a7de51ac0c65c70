"""Numbers that are only known at run time -> tensors without dims, which a loop reads like any other operand.

A program that is compiled for any value (`dynamic=True`) gives its floats, such as a norm's epsilon, as symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node, map_arg

from mst_fx.body import HALF
from mst_fx.lower import fake_value, seen, tracing
from mst_fx.refusal import Reason, Refusal

aten = torch.ops.aten


def as_tensors(lowered: GraphModule, live_ins: Sequence[Node]) -> tuple[int, ...]:
    """Put tensors in place of the numbers that tensor operands of a region's ops stand for.

    Args:
        lowered: the region in aten; it is changed.
        live_ins: of the region, one for each placeholder.

    Returns:
        The positions of the live-ins whose value has become a part of the graph, as some op takes it as a number only.
        It has to be fixed, for this region and for all that share the graph.

    Raises:
        Refusal: such a value depends on the data.
    """
    if not any(map(_is_number, lowered.graph.nodes)):
        return ()
    reading = {node: found for node in lowered.graph.nodes if (found := _operands(node))}
    with tracing([*map(fake_value, live_ins)]):
        for node, positions in reading.items():
            _read_tensors(node, positions)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    fixed: set[Node] = set()
    for number in [node for node in lowered.graph.nodes if isinstance(node.meta.get("val"), torch.SymFloat)]:
        if any(_needs_number(number, user) for user in number.users):
            _write(number)
            fixed |= _ancestors(number).intersection(placeholders)
    lowered.recompile()
    return tuple(position for position, node in enumerate(placeholders) if node in fixed)


def _operands(node: Node) -> list[int]:
    """The positions of a node's arguments that may be tensors, and are numbers only known at run time."""
    if not isinstance(node.target, OpOverload) or not isinstance(node.meta.get("val"), torch.Tensor):
        return []
    arguments = zip(node.args, node.target._schema.arguments, strict=False)
    return [
        position
        for position, (given, declared) in enumerate(arguments)
        if isinstance(given, Node) and _is_number(given) and isinstance(declared.type, torch.TensorType)
    ]


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat)


def _read_tensors(node: Node, positions: Sequence[int]) -> None:
    """Let a node read tensors at these positions, and compute what it computes with numbers.

    With a number, arithmetic in half precision rounds its result alone, and not the number.
    """
    tensors = [operand for operand in node.all_input_nodes if not _is_number(operand)]
    given, made = tensors[0].meta["val"].dtype, node.meta["val"].dtype
    whole = isinstance(node.args[positions[0]].meta["val"], torch.SymInt)  # type: ignore[union-attr]
    dtype = made if made != torch.bool else torch.result_type(torch.empty(1, dtype=given), 1 if whole else 1.0)
    wide = torch.float32 if made in HALF else dtype
    args: list[Any] = list(node.args)
    with node.graph.inserting_before(node):
        for position, operand in enumerate(args):
            if position in positions:
                args[position] = _tensor(node, operand, wide)
            elif wide != dtype and operand in tensors and operand.meta["val"].dtype == dtype:
                args[position] = _cast(node, operand, wide)
    node.args = tuple(args)
    if wide == dtype:
        return
    node.meta["val"] = node.meta["val"].to(wide)
    with node.graph.inserting_after(node):
        back = _cast(node, node, dtype)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _tensor(reader: Node, number: Node, dtype: torch.dtype) -> Node:
    """A number as a tensor, for a node that reads it.

    As a product, as torch compiles products with floats for any value of them; what it does not, it fixes.
    """
    value = torch.ones((), dtype=dtype, device=reader.meta["val"].device)
    graph = reader.graph
    one = graph.call_function(aten.ones.default, ([],), {"dtype": dtype, "device": value.device})
    tensor = graph.call_function(_AS_TENSOR, (one, number))
    for node in (one, tensor):
        node.meta = {**reader.meta, "val": value}
    return tensor


_AS_TENSOR = aten.mul.Tensor


def _cast(reader: Node, operand: Node, dtype: torch.dtype) -> Node:
    cast = reader.graph.call_function(aten._to_copy.default, (operand,), {"dtype": dtype})
    cast.meta = {**reader.meta, "val": operand.meta["val"].to(dtype)}
    return cast


def _needs_number(number: Node, user: Node) -> bool:
    """Whether a user that gives a tensor takes the number as a number, and not as `_tensor` does."""
    return isinstance(user.meta.get("val"), torch.Tensor) and not (user.target == _AS_TENSOR and user.args[1] is number)


def _write(number: Node) -> None:
    """Write the value that was seen where a number is needed."""
    value = seen(number.meta["val"])
    for user in [user for user in number.users if _needs_number(number, user)]:
        if value is None:
            raise Refusal(Reason.NUMBER, user, f"{user.target} takes a number that depends on the data")
        user.args, user.kwargs = map_arg(
            (user.args, user.kwargs), lambda operand: value if operand is number else operand
        )


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        found.add(node)
        pending += [operand for operand in node.all_input_nodes if operand not in found]
    return found
