"""One trace of a body -> the body of a chunk of any length.

A trace with a symbol for the length costs several times what one with numbers does, and each length would need a trace
of its own. So the trace runs at one length that stands for all: a large prime. In the traced graph every number that
depends on the length then is a multiple of the prime, or next to one, and no other number is; where a number may be
either, there is no such trace.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from mst_fx.capture.lower import MakeInputs, trace
from mst_fx.core.sizes import VARYING, any_length

log = logging.getLogger("mst_fx")
aten = torch.ops.aten

STAND_IN = 1_000_000_007
"""A prime near a billion: the sizes of tensors are smaller, and their numbers of elements are next to no multiple."""
NEAR = 64
"""How far from a multiple a number may be that is made of the length: with rows in front, or without the last ones."""
SMALL = 1 << 24
"""Numbers up to this one do not depend on the length."""
ENDLESS = 1 << 62
"""Ends of slices that take all there is."""
PLAIN = 1e4
"""Fractions between this and 1 over this do not depend on the length: one over the length, or a multiple, is not."""


class _UnclearError(Exception):
    """A number may depend on the length, or not."""


def traced_at_stand_in(
    function: Callable[..., Any], make_inputs: MakeInputs, literals: Collection[float]
) -> GraphModule | None:
    """Trace a body for all lengths; `with_length` makes it one of some length. None where a length needs its own trace.

    Args:
        function: as for `trace`.
        make_inputs: as for `trace`.
        literals: numbers that stand in what the function runs: they do not depend on the length.
    """
    try:
        module = trace(function, make_inputs, STAND_IN)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                raise _UnclearError(f"{node.target} holds a constant")
            _mapped((node.args, node.kwargs), lambda number: _checked(number, literals))
            node.meta.pop("tensor_meta", None)
        if _place_of_length(module) is None:
            raise _UnclearError("no operand has the length among its sizes")
    except Exception as error:  # an op may not take a size like this one
        log.debug("mst_fx: a body is traced for each length: %s", error)
        return None
    return module


def with_length(module: GraphModule, length: int | None) -> None:
    """Put a length in place of the one that stands for it; this changes the module, and does not recompile it.

    Args:
        module: copy of a module that `traced_at_stand_in` has made.
        length: positions of the chunk; None for a body that takes any number of them.
    """
    value = any_length(_fake_mode(module).shape_env) if length is None else length
    lengths = _Lengths(module, length)
    for node in module.graph.nodes:
        if node in lengths.made:
            continue
        node.args, node.kwargs = _mapped((node.args, node.kwargs), lengths.of)
        known = node.meta.pop("val", None)
        if known is not None and (length is not None or node.op == "placeholder"):
            node.meta["val"] = _resized(known, value)  # else nobody asks for it, and it would take long to make


class _Lengths:
    """Makes the numbers of a graph that depend on the length.

    Args:
        module: holds the graph.
        length: the length, None where the graph reads it off an operand.
    """

    def __init__(self, module: GraphModule, length: int | None) -> None:
        self.module, self.length, self._place = module, length, _place_of_length(module)
        self.made: dict[Node, tuple[int, int]] = {}
        self._node_of: dict[tuple[int, int], Node] = {}

    def of(self, number: float) -> Any:
        """Return what stands in the graph for a number."""
        parts = _parts(number)
        if parts is None:
            return number
        return self._node(*parts) if self.length is None else _number(parts, self.length)

    def _node(self, times: int, more: int) -> Node:
        if (times, more) not in self._node_of:
            self._node_of[times, more] = self._make(times, more)
            self.made[self._node_of[times, more]] = times, more
        return self._node_of[times, more]

    def _make(self, times: int, more: int) -> Node:
        graph = self.module.graph
        if more:
            before, call = self._node(times, 0), (operator.add, more)
        elif times != 1:
            before, call = self._node(1, 0), (operator.mul, times)
        else:
            assert self._place is not None
            last = [node for node in graph.nodes if node.op == "placeholder"][-1]
            with graph.inserting_after(last):
                return graph.call_function(aten.sym_size.int, self._place)
        with graph.inserting_after(before):
            return graph.call_function(call[0], (before, call[1]))


def _resized(value: Any, length: Any) -> Any:
    """Return the value of a node for a length."""

    def resized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        parts = list(map(_parts, (*value.shape, *value.stride())))
        if not any(parts):
            return value
        pairs = zip((*value.shape, *value.stride()), parts, strict=True)
        sizes = [size if part is None else _number(part, length) for size, part in pairs]
        with value.fake_mode:  # type: ignore[attr-defined]
            shape, strides = sizes[: value.dim()], sizes[value.dim() :]
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    return type(value)(map(resized, value)) if isinstance(value, tuple | list) else resized(value)


def _place_of_length(module: GraphModule) -> tuple[Node, int] | None:
    """Return an input and its dim that is as long as the chunk; None where a size is known at run time alone."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    sizes = [(node, dim, size) for node in inputs for dim, size in enumerate(node.meta["val"].shape)]
    if any(isinstance(size, VARYING) for _, _, size in sizes):
        return None
    return next(((node, dim) for node, dim, size in sizes if size == STAND_IN), None)


def _fake_mode(module: GraphModule) -> Any:
    return next(node.meta["val"].fake_mode for node in module.graph.nodes if node.op == "placeholder")


def _mapped(arguments: Any, change: Callable[[float], Any]) -> Any:
    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    return map_aggregate(arguments, changed)


def _checked(number: float, literals: Collection[float]) -> float:
    """Return a number of which it is clear whether it depends on the length.

    Raises:
        _UnclearError: it is not.
    """
    if isinstance(number, float):
        plain = not number or 1 / PLAIN < abs(number) < PLAIN
        clear = plain or number in literals or not math.isfinite(number)
    else:
        clear = abs(number) <= SMALL or abs(number) >= ENDLESS or number in literals or _parts(number) is not None
    if not clear:
        raise _UnclearError(f"{number} may depend on the length")
    return number


def _parts(number: float) -> tuple[int, int] | None:
    """Return a and b where a number is a times the length plus b; None where it does not depend on the length."""
    if not isinstance(number, int) or not SMALL < number < ENDLESS:
        return None
    times, more = divmod(number + NEAR, STAND_IN)
    is_multiple = 0 < times < STAND_IN // 2  # a square of the length is none
    return (times, more - NEAR) if is_multiple and more <= 2 * NEAR else None


def _number(parts: tuple[int, int], length: Any) -> Any:
    times, more = parts
    return times * length + more


def literals_of(nodes: Iterable[Node]) -> set[float]:
    """Return the numbers that stand in the arguments of nodes."""
    found: set[float] = set()
    for node in nodes:
        _mapped((node.args, node.kwargs), found.add)
    return found
