"""Numbers that are only known at run time -> tensors without dims, which a loop reads like any other operand.

A program that is compiled for any value (`dynamic=True`) holds its floats, such as a norm's epsilon, as symbols; so are
its ints and all that it computes from a length. Where an op takes only a number, an overload that takes a tensor
replaces it, if there is one. Otherwise the value is fixed: a float's here, an int's (a number of classes, a shift)
later, where a loop turns out to read it (see `partition`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node, map_arg

from mst_fx.capture.lower import tracing
from mst_fx.core.aten_ops import FILL_VALUES
from mst_fx.core.graph_walk import ancestors
from mst_fx.core.sizes import is_size, seen
from mst_fx.core.values import HALF, fake_value

aten = torch.ops.aten


def as_tensors(lowered: GraphModule, live_ins: Sequence[Node], forbid: Callable[[Node, Any], None]) -> tuple[int, ...]:
    """Put tensors in place of the numbers that ops of a region read as operands.

    Args:
        lowered: the region in aten; this changes it.
        live_ins: the region's live-ins, one for each placeholder.
        forbid: raises a refusal for a node and a number that it takes, where the number must not be fixed.

    Returns:
        The positions of the live-ins whose value now stands in the graph, as some op takes only a number. This region,
        and all that share the graph, have to fix it.

    Raises:
        Refusal: such a value must not be fixed (NUMBER).
    """
    if not any(map(_is_number, lowered.graph.nodes)):
        return ()
    with tracing([*map(fake_value, live_ins)]):
        for node in list(lowered.graph.nodes):
            if _makes_tensor(node) and any(map(_is_number, node.all_input_nodes)):
                _take_tensors(node)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    fixed: set[Node] = set()
    for number in [node for node in lowered.graph.nodes if isinstance(node.meta.get("val"), torch.SymFloat)]:
        if any(_needs_number(number, user) for user in number.users):
            _write(number, forbid)
            fixed |= ancestors([number]).intersection(placeholders)
    lowered.recompile()
    return tuple(position for position, node in enumerate(placeholders) if node in fixed)


def _operands(node: Node) -> list[int]:
    """Return the positions of a node's arguments that may be tensors, and are numbers only known at run time."""
    target: Any = node.target
    arguments = zip(node.args, target._schema.arguments, strict=False)
    return [
        position
        for position, (given, declared) in enumerate(arguments)
        if _is_number(given) and _is_tensor_type(declared.type)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.SymInt | torch.SymFloat)


def _makes_tensor(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and isinstance(node.meta.get("val"), torch.Tensor)


def _take_tensors(node: Node) -> None:
    """Put tensors in place of the numbers that an op takes, if it has an overload that takes tensors there."""
    if node.target == aten.scalar_tensor.default:
        number: Any = node.args[0]
        with node.graph.inserting_before(node):
            node.replace_all_uses_with(_tensor(node, number, node.meta["val"].dtype))
        node.graph.erase_node(node)
        return
    if node.target in FILL_VALUES:
        _fill_with_tensor(node)
    elif _is_number(node.kwargs.get("alpha")) and node.target in (aten.add.Tensor, aten.sub.Tensor):
        left, right = node.args[:2]
        with node.graph.inserting_before(node):
            scaled = node.graph.call_function(aten.mul.Tensor, (right, node.kwargs["alpha"]))
        scaled.meta = {**node.meta, "val": right.meta["val"].to(node.meta["val"].dtype)}  # type: ignore[union-attr]
        node.args, node.kwargs = (left, scaled), {}
        _read_tensors(scaled, [1])
    elif (form := _tensor_form(node)) is not None:
        _change_overload(node, form)
    positions = _operands(node)
    if positions:
        _read_tensors(node, positions)


def _change_overload(node: Node, form: OpOverload) -> None:
    """Call another overload with the same arguments; where it takes a tensor for a number, make one."""
    given = _given(node)
    node.target = form
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    with node.graph.inserting_before(node):
        for argument in form._schema.arguments:
            value = given.get(argument.name, argument.default_value)
            if _is_tensor_type(argument.type) and isinstance(value, int | float):
                value = _literal(node, value)
            if not argument.kwarg_only:
                args.append(value)
            elif argument.name in given:
                kwargs[argument.name] = value
    node.args, node.kwargs = tuple(args), kwargs


def _given(node: Node) -> dict[str, Any]:
    """Return the arguments that a node gives, by name."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _fill_with_tensor(node: Node) -> None:
    """Replace a fill with a number: expand a tensor of the number, or write it over memory of the shape."""
    position = FILL_VALUES[node.target]
    value = node.args[position]
    if not isinstance(value, Node) or not _is_number(value):
        return
    with node.graph.inserting_before(node):
        tensor = _tensor(node, value, node.meta["val"].dtype)
        if node.target == aten.full_like.default:
            memory = node.graph.call_function(aten.empty_like.default, node.args[:1], dict(node.kwargs))
            memory.meta = dict(node.meta)
            node.target, node.args = aten.fill.Tensor, (memory, tensor)
        else:
            node.target, node.args = aten.expand.default, (tensor, node.args[position - 1])
    node.kwargs = {}


def _tensor_form(node: Node) -> OpOverload | None:
    """Return the overload that takes tensors where the node gives numbers; None where there is none."""
    target: Any = node.target
    own = target._schema.arguments
    varying = {name for name, value in _given(node).items() if _is_number(value)}
    varying = {name for name in varying if not _is_tensor_type(_type_of(own, name))}
    for name in target.overloadpacket.overloads() if varying else ():
        form: OpOverload = getattr(target.overloadpacket, name)
        arguments = form._schema.arguments
        same = not form._schema.is_mutable and [a.name for a in arguments] == [a.name for a in own]
        if same and all(_is_tensor_type(_type_of(arguments, number)) for number in varying):
            return form
    return None


def _type_of(arguments: Sequence[Any], name: str) -> Any:
    return next((argument.type for argument in arguments if argument.name == name), None)


def _is_tensor_type(declared: Any) -> bool:
    optional = isinstance(declared, torch.OptionalType)
    return isinstance(declared.getElementType() if optional else declared, torch.TensorType)


def _literal(reader: Node, value: float) -> Node:
    """Make a tensor of a number that does not vary, for an overload that takes tensors only."""
    dtype = reader.meta["val"].dtype
    tensor = reader.graph.call_function(aten.full.default, ([], value))
    tensor.kwargs = {"dtype": dtype, "device": reader.meta["val"].device}
    tensor.meta = {**reader.meta, "val": torch.full((), value, dtype=dtype, device=reader.meta["val"].device)}
    return tensor


def _read_tensors(node: Node, positions: Sequence[int]) -> None:
    """Let a node read tensors at these positions, and compute the same as with numbers.

    Arithmetic in half precision with a number rounds only the result, not the number.
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
    """Make a tensor of a number, for a node that reads it.

    A product makes it, as torch compiles products with floats for any value; in other ops it fixes the value.
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
    """Return whether a user that gives tensors needs the number itself, and not the tensor of `_tensor`."""
    made = user.op == "call_function" and not is_size(user.meta.get("val"))
    return made and not (user.target == _AS_TENSOR and user.args[1] is number)


def _write(number: Node, forbid: Callable[[Node, Any], None]) -> None:
    """Put the captured value in place of a number, in the ops that need the number itself."""
    value = seen(number.meta["val"])
    for user in [user for user in number.users if _needs_number(number, user)]:
        forbid(user, number.meta["val"])
        user.args, user.kwargs = map_arg(
            (user.args, user.kwargs), lambda operand: value if operand is number else operand
        )
