"""The partitioner of joint graphs under the option `offload`: what checkpoints keep for backward goes to the host.

The graph is divided as it would be without; then values that the forward saves are replaced by handles
(see `offload_ops`). Decisions depend only on the graph and on what the plan says (`Offload`), which caches are told.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.core.faults import words_of
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import hint, long_hint, sure
from mst_fx.core.torch_private.partition import (
    CustomPartitionerFn,
    Partition,
    checkpoint_of,
    default_partition,
    recomputed_with,
)
from mst_fx.runtime import offload_ops as offload_ops
from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.coming_back import ask_late
from mst_fx.runtime.loop_operator import mini_sequence_loop
from mst_fx.runtime.offload import Offload, planned_now

ops = torch.ops.mst_fx
log = logging.getLogger("mst_fx")


class OffloadPartition(CustomPartitionerFn):
    """A partitioner around the user's own, or around the default one.

    Args:
        own: the user's own, None where there is none.
    """

    def __init__(self, own: Any = None) -> None:
        self.own = own

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **how: Any) -> tuple[GraphModule, GraphModule]:
        """Divide a joint graph; arguments and result are those of any partitioner."""
        divide: Partition = self.own or default_partition
        forward, backward = divide(gm, joint_inputs, **how)
        offload = planned_now()
        if offload is None:
            return forward, backward
        try:
            _Divided(forward, backward, how["num_fwd_outputs"], how.get("static_lifetime_input_indices")).send(offload)
        except Exception as error:
            if offload.strict:
                raise
            log.warning("mst_fx: nothing goes to the host, offload failed: %s", words_of(error), exc_info=error)
            return divide(gm, joint_inputs, **how)
        return forward, backward

    def uuid(self) -> Any:
        """Return a name for what this does to the graph that is compiled now; None if the user's own has none."""
        own = self.own.uuid() if self.own is not None else ""
        offload = planned_now()
        return None if own is None else (VERSION, own, offload.name() if offload is not None else "")


@dataclass(frozen=True)
class _Value:
    """A value that goes to the host.

    Attributes:
        made: the node of the forward.
        saved: the placeholder of the backward.
        nodes: those nodes of the forward, in order, that the block which reads it first in backward runs again.
    """

    made: Node
    saved: Node
    nodes: tuple[Node, ...]


class _Divided:
    """A graph that is divided into forward and backward.

    Args:
        forward, backward: as a partitioner gives them.
        returned: number of the forward's outputs that are not for backward.
        static: positions of the inputs that are parameters, or stay where they are for another reason.
    """

    def __init__(
        self, forward: GraphModule, backward: GraphModule, returned: int, static: Iterable[int] | None
    ) -> None:
        self.forward, self.backward, self._count = forward, backward, returned
        self._primals = forward.graph.find_nodes(op="placeholder")
        self._order = {node: place for place, node in enumerate(forward.graph.nodes)}
        outputs: Any = forward.graph.output_node().args[0]
        self._saved = {node.name: node for node in outputs[returned:] if isinstance(node, Node)}
        self._kept = {_unviewed(node) for node in outputs[:returned] if isinstance(node, Node)}
        self._static = {self._primals[index] for index in static or () if index < len(self._primals)}
        self._kept |= {node.args[0] for node in forward.graph.nodes if _writes(node)}

    def send(self, offload: Offload) -> None:
        """Replace the values that are to be sent by handles, in both graphs."""
        values = self._values(offload)
        blocks = list(dict.fromkeys(value.nodes for value in values))[: offload.blocks]
        handles: dict[Node, Node] = {}
        back: dict[tuple[Node, ...], list[Node]] = {}
        for value in values:
            if value.nodes in blocks:
                handles[value.made] = self._sent(value, offload.least, new=value.nodes not in back)
                arrived = _bring_back(self.backward.graph, value, handles[value.made])
                back.setdefault(value.nodes, []).append(arrived)
        if not handles:
            return
        ask_late(self.backward.graph, [*back.values()][::-1])
        output = self.forward.graph.output_node()
        given: Any = output.args[0]
        saved = (handles.get(node, node) if isinstance(node, Node) else node for node in given[self._count :])
        output.args = ((*given[: self._count], *saved),)
        for gm in (self.forward, self.backward):
            gm.graph.lint()
            gm.recompile()

    def _values(self, offload: Offload) -> list[_Value]:
        """Return the values that may leave, those of the first block in forward first."""
        graded = self._with_gradient() & self._not_learnt(offload)
        run_by: dict[int | None, list[Node]] = {}
        for node in self.forward.graph.nodes:
            if _tensor(node) is not None and node.op == "call_function":
                run_by.setdefault(checkpoint_of(node), []).append(node)
        found = []
        for placeholder in self.backward.graph.find_nodes(op="placeholder"):
            made = self._saved.get(placeholder.name)
            if made is None or made not in graded or not self._may_leave(made, offload):
                continue
            numbers = [number for node in _readers(placeholder) if (number := recomputed_with(node)) is not None]
            nodes = run_by.get(max(numbers, default=None), []) if numbers else self._loops(made, placeholder, offload)
            if nodes:
                found.append(_Value(made, placeholder, tuple(nodes)))
        return sorted(found, key=lambda value: self._order[value.nodes[0]])

    def _with_gradient(self) -> set[Node]:
        """Return the values of the forward that gradients pass through."""
        gradients: Any = self.backward.graph.output_node().args[0]
        return descendants(node for node, grad in zip(self._primals, gradients, strict=False) if grad is not None)

    def _not_learnt(self, offload: Offload) -> set[Node]:
        """Return the values of the forward that are not made of parameters alone."""
        return descendants(node for node in self._primals if not self._is_learnt(node, offload))

    def _is_learnt(self, primal: Node, offload: Offload) -> bool:
        value = _tensor(primal)
        return primal in self._static or (
            value is not None and any(_is_like(value, *parameter) for parameter in offload.parameters)
        )

    def _may_leave(self, node: Node, offload: Offload) -> bool:
        value, base = _tensor(node), _unviewed(node)
        if value is None or not value.is_floating_point() or not _is_dense(node):
            return False
        if base in self._kept or (base is not node and (base in self._primals or base.name in self._saved)):
            return False
        return long_hint(value.numel()) * value.element_size() >= offload.least

    def _loops(self, made: Node, placeholder: Node, offload: Offload) -> list[Node]:
        """Return the results of the loop in place of a checkpoint that reads a value; none where there is no such."""
        loops = [node for node in _readers(placeholder) if node.target is mini_sequence_loop]
        if not any(node.args[2] in offload.loops for node in loops):
            return []
        readers = [node for node in _readers(made) if node.target is mini_sequence_loop]
        return [item for node in readers for item in node.users if _tensor(item) is not None]

    def _sent(self, value: _Value, least: int, *, new: bool) -> Node:
        """Send a value where its block begins, and return the handle that the forward saves where the block ends."""
        graph, order = self.forward.graph, _dims_in_memory(value.made)
        first = _whole(value.nodes[0])
        place = max(value.made, first, key=self._order.__getitem__)
        with graph.inserting_after(place) if place is value.made else graph.inserting_before(place):
            handle = _call(graph, ops.to_host.default, (value.made, order, new, least), value.made)
        with graph.inserting_after(value.nodes[-1]):
            saved = _call(graph, ops.on_host.default, (handle, value.made, value.nodes[-1]), value.made)
        return saved


def _bring_back(graph: Graph, value: _Value, handle: Node) -> Node:
    """Let the backward take a handle, and read the value in front of its first reader; return the node that does."""
    old = value.saved
    example = _tensor(old)
    assert example is not None
    first = next(node for node in graph.nodes if node in old.users)
    with graph.inserting_before(old):
        given = graph.placeholder(handle.name)
    given.meta = {**old.meta, "val": handle.meta["val"]}
    given.meta.pop("tensor_meta", None)
    with graph.inserting_before(first):
        how = (_dims_in_memory(old), example.dtype, example.device, True)
        back = _call(graph, ops.to_device.default, (given, _arriving(graph, first), *how), old)
    old.replace_all_uses_with(back)
    graph.erase_node(old)
    return back


def _arriving(graph: Graph, place: Node) -> Node | None:
    """Return the value, made last before a place in the backward, that backward reads behind it: a gradient.

    A compiler may move what depends on handles alone to the front; then all values would come back at once.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    found = None
    for node in graph.nodes:
        if node is place:
            return found
        if node.op == "call_function" and _tensor(node) is not None and recomputed_with(node) is None:
            readers = [user for user in _readers(node) if user.op != "output"]
            if not _is_view(node) and any(order[user] > order[place] for user in readers):
                found = node
    return found


def _call(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    """Put a call into a graph, where it is inserting, with the value that it gives."""
    node = graph.call_function(target, args)
    example = _tensor(like)
    assert example is not None
    node.meta = {key: like.meta[key] for key in TOLD if key in like.meta}
    with example.fake_mode:
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        node.meta["val"] = target(*values)
    return node


TOLD = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "partitioner_tag")
"""What a node tells of the place that it comes from."""


def _tensor(node: Node) -> Any:
    """Return the fake value of a node that gives one tensor, None for other nodes."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _is_like(value: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether a value has a shape, whatever the sizes that vary, and a dtype."""
    return value.dtype == dtype and value.dim() == len(shape) and all(map(_surely_equal, value.shape, shape))


def _surely_equal(one: Any, other: int) -> bool:
    return bool(sure(one == other))


def _readers(node: Node) -> list[Node]:
    """Return the nodes that read a value or a view of it."""
    shown = descendants([node], lambda value: filter(_is_view, value.users))
    return [user for value in shown for user in value.users]


def _is_view(node: Node) -> bool:
    return bool(getattr(node.target, "is_view", False))


def _whole(node: Node) -> Node:
    """Return the node of which a node takes one of several results; the node itself where it does not."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _unviewed(node: Node) -> Node:
    """Return the node that makes the memory which a value lies in."""
    while _is_view(_whole(node)):
        node = _whole(node).all_input_nodes[0]
    return node


def _writes(node: Node) -> bool:
    return node.target is torch.ops.aten.copy_.default


def _dims_in_memory(node: Node) -> list[int]:
    """Return the dims of a node's value as they lie in memory, the outermost first."""
    value: Any = _tensor(node)
    return sorted(range(value.dim()), key=lambda dim: -hint(value.stride(dim)))


def _is_dense(node: Node) -> bool:
    """Return whether a value fills its memory, its dims in some order."""
    value, expected = _tensor(node), 1
    for dim in reversed(_dims_in_memory(node)):
        if not (sure(value.stride(dim) == expected) or sure(value.shape[dim] == 1)):
            return False
        expected = expected * value.shape[dim]
    return True
