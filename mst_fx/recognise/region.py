"""A region: the nodes that one loop replaces, closed and checked.

Terms
  live-in   a value that the region reads from outside
  stream    the live-in that carries the tokens; the split axis is one of its dims
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from mst_fx.core.graph_walk import descendants, walk
from mst_fx.core.modes import Mode
from mst_fx.core.provenance import module_path, op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import depends_on_data
from mst_fx.core.values import fake_value, has_gradient, is_view, storages_of
from mst_fx.recognise.effects import leaves, sends_back
from mst_fx.recognise.opening import strange_tensors
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.write_checks import (
    forbid_gradients_behind_detach,
    forbid_writes_between,
    forbid_writes_to_saved,
    forbid_writes_to_shared,
)


@dataclass(frozen=True)
class Region:
    """Nodes in graph order, what they read from outside, and what they give back.

    Attributes:
        owner: the module whose graph holds the nodes.
        nodes: every node of the region.
        outputs: the nodes whose values the rest of the graph reads.
        live_ins: values read from outside, in order of first use.
        stream: the live-in that carries the tokens.
        before: the node of the graph that the loop is put in front of.
        early: nodes behind that place that make live-ins, and are moved in front of it.
        modes: of the nodes.
        returned: large values that the caller of the graph gets, made by the nodes or read by them.
        smaller: a part of the region to loop where the whole cannot be, None where there is none.
        front: nodes among them that make the stream of the recognised region (see `norm_in_front`).
    """

    owner: GraphModule
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    live_ins: tuple[Node, ...]
    stream: Node
    before: Node
    early: tuple[Node, ...]
    modes: Mapping[Node, Mode]
    returned: tuple[Node, ...] = ()
    smaller: Region | None = None
    front: frozenset[Node] = frozenset()

    @property
    def last(self) -> Node:
        """The last node, which names the region in reports."""
        return self.nodes[-1]

    @property
    def name(self) -> str:
        """The path of the module that its last node belongs to."""
        return module_path(self.last) or "the top"


def close(
    reader: Reader,
    nodes: Collection[Node],
    stream: Node,
    returned: tuple[Node, ...] = (),
    smaller: Region | None = None,
    front: frozenset[Node] = frozenset(),
) -> Region:
    """Nodes -> a region, if one call can stand in their place.

    Raises:
        Refusal: a size depends on the data, a value leaves the nodes and comes back, no place is behind all live-ins
            and in front of all readers, or memory that the nodes read or make is written to in between.
    """
    inside = _without_foreign_parts(with_parts(nodes))
    inside = _without_shown_views(sorted(inside, key=reader.order.__getitem__))
    ordered = tuple(sorted(inside, key=reader.order.__getitem__))
    outputs = tuple(node for node in ordered if not inside.issuperset(node.users))
    if not outputs:
        last = max(nodes, key=reader.order.__getitem__)
        raise Refusal(Reason.UNREAD, last, f"nobody reads the result of {op_name(last)}")
    for node in ordered:
        if (strange := strange_tensors(node)) is not None:
            raise strange
    for node in outputs:
        if not isinstance(fake_value(node), torch.Tensor):
            raise Refusal(Reason.ESCAPES, node, f"{op_name(node)} gives what is no tensor to the rest of the graph")
    if any(map(depends_on_data, fake_value(stream).shape)):
        raise Refusal(
            Reason.DATA_DEPENDENT, ordered[0], f"the sizes of {list(fake_value(stream).shape)} depend on data"
        )
    live_ins = tuple(dict.fromkeys(o for n in ordered for o in n.all_input_nodes if o not in inside))
    if stream not in live_ins:
        raise Refusal(Reason.MUTATION, stream, f"{op_name(stream)} makes memory that the tokens are written to")
    for node in live_ins:
        if isinstance(fake_value(node), (tuple, list)):
            (user, *_) = (user for user in node.users if user in inside)
            text = f"{op_name(user)} reads several values at once, which {op_name(node)} makes outside of the region"
            raise Refusal(Reason.UNKNOWN_OP, user, text)
    _check_derivatives(reader, ordered)
    before, early = _place(reader, ordered, outputs, live_ins)
    moved = {operand for node in early for operand in (node, *node.all_input_nodes)}
    forbid_writes_between(reader, ordered, {*live_ins, *moved}, before, returned)
    forbid_writes_to_saved(reader, ordered)
    forbid_gradients_behind_detach(reader, ordered)
    forbid_writes_to_shared(reader, ordered, outputs)
    modes = {node: reader.modes[node] for node in ordered}
    return Region(reader.owner, ordered, outputs, live_ins, stream, before, early, modes, returned, smaller, front)


def _check_derivatives(reader: Reader, nodes: Iterable[Node]) -> None:
    """A loop has one kind of derivative, in the backward of the whole graph."""
    for node in nodes:
        if reader.modes[node].dual:
            raise Refusal(Reason.GRAD_MODE, node, f"{op_name(node)} is differentiated in forward mode")
    ends = [node for node in nodes if node in reader.differentiated]
    if ends:
        raise Refusal(Reason.GRAD_MODE, ends[-1], f"{op_name(ends[-1])} is differentiated within the graph")


def needs_gradient(node: Node, inside: Collection[Node]) -> bool:
    """Whether what reads the value outside can send a gradient back."""
    readers = (user for user in node.users if user not in inside)
    return has_gradient(node) and any(user.op == "output" or sends_back(user) for user in readers)


def with_parts(nodes: Collection[Node]) -> set[Node]:
    """The nodes, and the parts of their values that are tuples."""
    return descendants(nodes, _parts)


def _parts(node: Node) -> list[Node]:
    is_tuple = isinstance(fake_value(node), (tuple, list))
    return [user for user in node.users if is_tuple and user.target is operator.getitem]


def _without_foreign_parts(nodes: set[Node]) -> set[Node]:
    """The nodes but the parts of tuples that are made outside: the region reads these, each by itself."""
    return {n for n in nodes if n.target is not operator.getitem or _is_part_inside(n, nodes)}


def _without_shown_views(nodes: Sequence[Node]) -> set[Node]:
    """The nodes but views that the graph's caller gets beside what they are views of.

    Who writes to one of them finds it in the other: they are made of the loop's result, as they were of the region's.
    """
    inside = set(nodes)
    for node in reversed(nodes):
        if is_view(node) and leaves(node) and inside.isdisjoint(node.users):
            memory = storages_of(node)
            beside = (other for other in inside - {node} if not memory.isdisjoint(storages_of(other)))
            if any(leaves(other, without=node) for other in beside):
                inside.remove(node)
    return inside


def _is_part_inside(part: Node, nodes: Collection[Node]) -> bool:
    source = part.all_input_nodes[0]
    return source in nodes or not isinstance(fake_value(source), (tuple, list))


def _place(
    reader: Reader, nodes: tuple[Node, ...], outputs: tuple[Node, ...], live_ins: tuple[Node, ...]
) -> tuple[Node, tuple[Node, ...]]:
    """Where the loop goes: the node to put it in front of, and the nodes to move in front of it.

    No output has been read there, and no mode is in force that is not the nodes' own. Live-ins that are made later are
    moved up.
    """
    inside = set(nodes)
    readers = [user for node in outputs for user in node.users if user not in inside and user.op != "output"]
    first_reader = min([nodes[-1], *readers], key=reader.order.__getitem__)
    grad = any(reader.modes[node].grad for node in nodes)
    place = first_reader

    def is_foreign(mode: Mode) -> bool:  # a loop cannot be traced in inference mode, and has no forward-mode formula
        autocast = ((), reader.modes[nodes[0]].autocast)
        return mode.grad != grad or mode.inference or mode.dual or mode.autocast not in autocast

    while is_foreign(reader.modes[place]):
        place = place.prev
        if place not in reader.modes:
            text = f"{op_name(first_reader)} stands in another mode than the region"
            raise Refusal(Reason.GRAD_MODE, first_reader, text)
    return place, _made_after(reader, place, first_reader, live_ins, inside)


def _made_after(
    reader: Reader, place: Node, first_reader: Node, live_ins: tuple[Node, ...], inside: Collection[Node]
) -> tuple[Node, ...]:
    """What must be moved in front of `place` for the live-ins to be known there.

    Raises:
        Refusal: one of them is more than a plain computation, or depends on the region.
    """

    def late(nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if reader.order[node] >= reader.order[place]]

    moved: list[Node] = []
    for node in walk(late(live_ins), lambda node: late(node.all_input_nodes)):
        moves = node.op == "get_attr" or (reader.is_pure(node) and reader.modes[node] == reader.modes[place])
        if not moves or node in inside:
            text = f"{op_name(first_reader)} reads a result of the region before {op_name(node)} makes an operand of it"
            raise Refusal(Reason.NOT_CONVEX, first_reader, text)
        moved.append(node)
    return tuple(sorted(moved, key=reader.order.__getitem__))
