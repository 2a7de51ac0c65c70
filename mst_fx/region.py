"""A region: the nodes that one loop replaces, closed and checked; and the walk back from a sink that finds an MLP's.

Terms
  sink      the node where the large values end (a down-projection)
  up        a contraction that makes a large value (an up-projection, a head)
  live-in   a value that the region reads from outside
  stream    the live-in that carries the tokens; the split axis is one of its dims
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import GraphModule, Node

from mst_fx.lower import fake_value
from mst_fx.modes import Mode
from mst_fx.provenance import op_name
from mst_fx.reading import Reader, written_by
from mst_fx.refusal import Reason, Refusal


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

    @property
    def last(self) -> Node:
        """The last node, which names the region in reports."""
        return self.nodes[-1]


def close(
    reader: Reader,
    nodes: Collection[Node],
    stream: Node,
    returned: tuple[Node, ...] = (),
    smaller: Region | None = None,
) -> Region:
    """Nodes -> a region, if one call can stand in their place.

    Raises:
        Refusal: a value leaves the nodes and comes back, no place is behind all live-ins and in front of all readers,
            or memory that the nodes read or make is written to in between.
    """
    inside = with_parts(nodes)
    ordered = tuple(sorted(inside, key=reader.order.__getitem__))
    outputs = tuple(node for node in ordered if not inside.issuperset(node.users))
    for node in outputs:
        if not isinstance(fake_value(node), torch.Tensor):
            raise Refusal(Reason.ESCAPES, node, f"{op_name(node)} gives what is no tensor to the rest of the graph")
    live_ins = tuple(dict.fromkeys(o for n in ordered for o in n.all_input_nodes if o not in inside))
    before, early = _place(reader, ordered, outputs, live_ins)
    last = max(before, ordered[-1], key=reader.order.__getitem__)
    _check_writes(reader, inside, (*live_ins, *early), ordered[0], last)
    modes = {node: reader.modes[node] for node in ordered}
    return Region(reader.owner, ordered, outputs, live_ins, stream, before, early, modes, returned, smaller)


def needs_gradient(node: Node, inside: Collection[Node]) -> bool:
    """Whether what reads the value outside can send a gradient back."""
    readers = (user for user in node.users if user not in inside)
    return has_gradient(node) and any(user.op == "output" or has_gradient(user) for user in readers)


def has_gradient(node: Node) -> bool:
    """Whether the value needed a gradient when it was captured; of several values, whether one did."""
    value = fake_value(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)


def with_parts(nodes: Collection[Node]) -> set[Node]:
    """The nodes, and the parts of their values that are tuples."""
    inside, pending = set(nodes), list(nodes)
    while pending:
        node = pending.pop()
        if isinstance(fake_value(node), (tuple, list)):
            parts = [user for user in node.users if user.target is operator.getitem and user not in inside]
            inside.update(parts)
            pending += parts
    return inside


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
    early = _made_after(reader, first_reader, live_ins)
    known = max((reader.order[node] for node in live_ins if node not in early), default=-1)
    grad = any(reader.modes[node].grad for node in nodes)
    place = first_reader
    while reader.order.get(place, -1) > known:
        if reader.modes[place].grad == grad and reader.modes[place].autocast in ((), reader.modes[nodes[0]].autocast):
            return place, early
        place = place.prev
    raise Refusal(Reason.GRAD_MODE, first_reader, f"{op_name(first_reader)} stands in another mode than the region")


def _made_after(reader: Reader, place: Node, live_ins: tuple[Node, ...]) -> tuple[Node, ...]:
    """What must be moved in front of `place` for the live-ins to be known there.

    Raises:
        Refusal: one of them is more than a plain computation.
    """
    late: set[Node] = set()
    pending = [node for node in live_ins if reader.order[node] >= reader.order[place]]
    while pending:
        node = pending.pop()
        if node in late:
            continue
        late.add(node)
        obstacle = reader.obstacle(node)
        moves = reader.modes[node] == reader.modes[place] and written_by(node) is None
        if not moves or (obstacle is not None and obstacle.reason is not Reason.UNKNOWN_OP):
            text = f"{op_name(place)} reads a result of the region before {op_name(node)} makes an operand of it"
            raise Refusal(Reason.NOT_CONVEX, place, text)
        pending += [operand for operand in node.all_input_nodes if reader.order[operand] >= reader.order[place]]
    return tuple(sorted(late, key=reader.order.__getitem__))


def _check_writes(reader: Reader, inside: set[Node], live_ins: Collection[Node], first: Node, last: Node) -> None:
    """The region runs late, as a whole: nothing may have changed what it reads, nor may it change what others read."""
    foreign = set().union(*map(reader.storages, live_ins))
    own = set().union(*map(reader.storages, inside)) - foreign
    node = first
    while node is not last.next:
        target = written_by(node)
        if target is not None:
            memory = reader.storages(target)
            if not memory.isdisjoint(foreign) or (node not in inside and not memory.isdisjoint(own)):
                raise Refusal(Reason.MUTATION, node, f"{op_name(node)} writes to its operand")
        node = node.next


@dataclass(frozen=True)
class Trunk:
    """What lies between a sink and the contractions that feed it.

    Attributes:
        ups: the contractions, in graph order.
        nodes: everything that depends on an up and leads to the sink, the sink excluded.
        obstacle: the first node on the way that no region may contain.
    """

    ups: tuple[Node, ...]
    nodes: tuple[Node, ...]
    obstacle: Refusal | None


def trunk_of(reader: Reader, top: Node) -> Trunk | None:
    """Walk back from `top` (the sink's large operand) to the contractions that made it.

    Gives up at a wide contraction that does not widen its activation, as a projection of attention.

    Args:
        reader: of the graph.
        top: the value to explain.

    Returns:
        The trunk, None where no contraction feeds `top`.
    """
    wide = reader.numel(top) // 2
    kinds: dict[Node, _Kind] = {}
    pending = [top]
    while pending:
        node = pending.pop()
        if node in kinds:
            continue
        kinds[node] = _kind(reader, node, wide)
        if kinds[node] is _Kind.ALIEN:
            return None
        if kinds[node] is _Kind.THROUGH:
            pending.extend(node.all_input_nodes)
    ups = {node for node, kind in kinds.items() if kind is _Kind.UP}
    if not ups:
        return None
    inside = set(ups)
    for node in sorted(kinds, key=reader.order.__getitem__):
        if kinds[node] is _Kind.THROUGH and not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    nodes = tuple(sorted(inside, key=reader.order.__getitem__))
    obstacles = (reader.obstacle(node) for node in nodes if node not in ups)
    return Trunk(
        ups=tuple(node for node in nodes if node in ups),
        nodes=nodes,
        obstacle=next((obstacle for obstacle in obstacles if obstacle is not None), None),
    )


class _Kind(Enum):
    """What a node is on the way back from a sink."""

    UP = "the contraction to find"
    THROUGH = "to be looked behind"
    LIVE_IN = "whatever lies behind it does not matter"
    ALIEN = "a sign that this is no such trunk"


def _kind(reader: Reader, node: Node, wide: int) -> _Kind:
    if node.op in ("placeholder", "get_attr"):
        return _Kind.LIVE_IN
    contraction = reader.contraction(node)
    if contraction is not None:
        if reader.numel(node) < wide:
            return _Kind.LIVE_IN
        return _Kind.UP if reader.numel(node) > reader.numel(contraction.activation) else _Kind.ALIEN
    obstacle = reader.obstacle(node)
    opaque = obstacle is not None and obstacle.reason in (Reason.UNKNOWN_OP, Reason.RANDOM)
    if reader.multiplies(node) or (opaque and len(reader.tensor_operands(node)) != 1):
        return _Kind.LIVE_IN  # attention, a scan, ...: whatever lies behind it belongs to something else
    return _Kind.THROUGH


def region_of(reader: Reader, trunk: Trunk, sink: Node) -> Region:
    """Close a trunk into a region that ends in `sink`, its one output.

    Raises:
        Refusal: a large value escapes, an op may not be inside, or one of `close`.
    """
    if trunk.obstacle is not None:
        raise trunk.obstacle
    nodes = (*trunk.nodes, sink)
    for node in trunk.nodes:
        for user in node.users:
            if user not in nodes:
                where = "is returned" if user.op == "output" else f"is also read by {op_name(user)}"
                raise Refusal(Reason.ESCAPES, user if user.op != "output" else node, f"{op_name(node)} {where}")
    first = reader.contraction(trunk.ups[0])
    assert first is not None
    return close(reader, nodes, first.activation)
