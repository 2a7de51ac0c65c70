"""A region: the nodes that one loop replaces, closed and checked.

Terms
  live-in   a value that the region reads from outside
  stream    the live-in that carries the tokens; the split axis is one of its dims
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch.fx import GraphModule, Node

from mst_fx.core.graph_modules import held_by, is_held
from mst_fx.core.graph_walk import descendants, walk
from mst_fx.core.modes import Mode
from mst_fx.core.module_paths import common_path, module_path
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import depends_on_data
from mst_fx.core.values import fake_value, has_gradient, storages_of
from mst_fx.recognise.decomposed_nodes import strange_tensors
from mst_fx.recognise.effects import leaves, sends_back
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.write_checks import (
    forbid_gradients_behind_detach,
    forbid_later_changes,
    forbid_rebinding,
    forbid_writes_between,
    forbid_writes_to_saved,
    forbid_writes_to_shared,
)

Over: TypeAlias = Literal["tokens", "heads"]


@dataclass(frozen=True)
class Region:
    """Nodes, what they read from outside, and what the rest of the graph reads of them.

    Attributes:
        owner: the module whose graph holds the nodes.
        nodes: every node of the region, in graph order.
        outputs: the nodes whose values the rest of the graph reads.
        live_ins: values read from outside, in order of first use.
        stream: the live-in that carries the tokens.
        before: the node of the graph that the loop goes in front of.
        moved_ahead: nodes after that place that make live-ins, and move in front of it.
        modes: the mode of each node.
        returned: large values that the caller of the graph gets, made or read by the nodes.
        smaller: a smaller region to loop where this one cannot be, None where there is none.
        front: the nodes that make the stream of the recognised region (see `norm_in_front`).
        products: the nodes that multiply matrices.
        over: what the loop runs over. For "heads", the stream is a weight whose rows make them, and tokens are whole.
    """

    owner: GraphModule
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    live_ins: tuple[Node, ...]
    stream: Node
    before: Node
    moved_ahead: tuple[Node, ...]
    modes: Mapping[Node, Mode]
    returned: tuple[Node, ...] = ()
    smaller: Region | None = None
    front: frozenset[Node] = frozenset()
    products: tuple[Node, ...] = ()
    over: Over = "tokens"

    @property
    def last(self) -> Node:
        """The last node, whose source line stands for the region in reports."""
        return self.nodes[-1]

    @property
    def module(self) -> str:
        """The path of the innermost module that all its products are in; at the top, that of the last product.

        So a head has the path of its projection, wherever the loss is, and an MLP that of the module around its own.
        """
        paths = [module_path(node) for node in self.products or (self.last,)]
        return common_path(paths) or paths[-1]

    @property
    def name(self) -> str:
        """The path of its module, in words."""
        return self.module or "the top"


def close(
    reader: Reader,
    nodes: Collection[Node],
    stream: Node,
    returned: tuple[Node, ...] = (),
    smaller: Region | None = None,
    front: frozenset[Node] = frozenset(),
    over: Over = "tokens",
) -> Region:
    """Make a region of nodes, if one call can stand in their place.

    Args:
        reader: reads the graph.
        nodes: in any order.
        stream: the live-in that carries the tokens.
        returned: as in `Region`.
        smaller: as in `Region`.
        front: as in `Region`.
        over: as in `Region`.

    Raises:
        Refusal: a size depends on the data, a value leaves the nodes and comes back, no place is after all live-ins and
            before all readers, or a node writes to memory of the region in between.
    """
    inside = _without_foreign_items(with_items(nodes))
    inside |= {*held_by(inside)}
    inside = _without_shown_views(reader, sorted(inside, key=reader.order.__getitem__))
    ordered = tuple(sorted(inside, key=reader.order.__getitem__))
    outputs = tuple(node for node in ordered if not inside.issuperset(node.users) and not is_held(node))
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
    before, moved_ahead = _place(reader, ordered, outputs, live_ins)
    moved = {operand for node in moved_ahead for operand in (node, *node.all_input_nodes)}
    forbid_writes_between(reader, ordered, {*live_ins, *moved}, before, returned)
    forbid_writes_to_saved(reader, ordered)
    forbid_gradients_behind_detach(reader, ordered)
    forbid_later_changes(reader, ordered, live_ins)
    forbid_rebinding(reader, ordered, moved)
    forbid_writes_to_shared(reader, ordered, outputs)
    modes = {node: reader.modes[node] for node in ordered}
    place = (before, moved_ahead)
    products = tuple(filter(reader.multiplies, ordered))
    return Region(
        reader.owner, ordered, outputs, live_ins, stream, *place, modes, returned, smaller, front, products, over
    )


def _check_derivatives(reader: Reader, nodes: Iterable[Node]) -> None:
    """Raise a refusal for nodes that are differentiated otherwise than in the backward of the whole graph."""
    for node in nodes:
        if reader.modes[node].dual:
            raise Refusal(Reason.GRAD_MODE, node, f"{op_name(node)} is differentiated in forward mode")
    ends = [node for node in nodes if node in reader.differentiated]
    if ends:
        raise Refusal(Reason.GRAD_MODE, ends[-1], f"{op_name(ends[-1])} is differentiated within the graph")


def needs_gradient(node: Node, inside: Collection[Node]) -> bool:
    """Return whether a reader of the value outside can send a gradient back."""
    readers = (user for user in node.users if user not in inside)
    return has_gradient(node) and any(user.op == "output" or sends_back(user) for user in readers)


def with_items(nodes: Collection[Node]) -> set[Node]:
    """Return the nodes, and the items of those values that are tuples."""
    return descendants(nodes, _items)


def _items(node: Node) -> list[Node]:
    is_tuple = isinstance(fake_value(node), (tuple, list))
    return [user for user in node.users if is_tuple and user.target is operator.getitem]


def _without_foreign_items(nodes: set[Node]) -> set[Node]:
    """Return the nodes without the items of tuples that are made outside: each item is a live-in."""
    return {n for n in nodes if n.target is not operator.getitem or _is_item_inside(n, nodes)}


def _without_shown_views(reader: Reader, nodes: Sequence[Node]) -> set[Node]:
    """Return the nodes without the views that the graph's caller gets together with their base.

    The caller may write to one and read the other. So these views are made of the loop's result, outside of the region.
    """
    inside = set(nodes)
    for node in reversed(nodes):
        if inside.isdisjoint(node.users) and reader.is_view(node) and leaves(node):
            memory = storages_of(node)
            beside = (other for other in inside - {node} if not memory.isdisjoint(storages_of(other)))
            if any(leaves(other, without=node) for other in beside):
                inside.remove(node)
    return inside


def _is_item_inside(item: Node, nodes: Collection[Node]) -> bool:
    whole = item.all_input_nodes[0]
    return whole in nodes or not isinstance(fake_value(whole), (tuple, list))


def _place(
    reader: Reader, nodes: tuple[Node, ...], outputs: tuple[Node, ...], live_ins: tuple[Node, ...]
) -> tuple[Node, tuple[Node, ...]]:
    """Return the node that the loop goes in front of, and the nodes that move in front of it: later live-ins.

    No output has been read there, and no mode is in force but those of the nodes.
    """
    inside = set(nodes)
    readers = [user for node in outputs for user in node.users if user not in inside and user.op != "output"]
    first_reader = min([nodes[-1], *readers], key=reader.order.__getitem__)
    grad = any(reader.modes[node].grad for node in nodes)
    place = first_reader

    def is_foreign(mode: Mode) -> bool:  # no trace of a loop in inference mode, no forward-mode formula
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
    """Return the nodes that must move in front of `place`, so that the live-ins exist there, in graph order.

    Raises:
        Refusal: one of them does more than compute a value, or depends on the region (NOT_CONVEX).
    """

    def late(nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if reader.order[node] >= reader.order[place]]

    moved: list[Node] = []
    for node in walk(late(live_ins), lambda node: late(node.all_input_nodes)):
        moves = node.op == "get_attr" or (reader.is_pure(node) and reader.modes[node] == reader.modes[place])
        if not moves or any(operand in inside for operand in node.all_input_nodes):
            text = f"{op_name(first_reader)} reads a result of the region before {op_name(node)} makes an operand of it"
            raise Refusal(Reason.NOT_CONVEX, first_reader, text)
        moved.append(node)
    return tuple(sorted(moved, key=reader.order.__getitem__))
