"""A region: the nodes that one loop replaces. Grown backward from a sink, closed, checked.

Terms
  sink      the node where the large values end (a down-projection, a loss); the region's one output
  up        a contraction that makes a large value (an up-projection, a head)
  live-in   a value that the region reads from outside
  stream    the live-in that carries the tokens; the split axis is one of its dims
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from torch.fx import GraphModule, Node

from mst_fx.provenance import op_name
from mst_fx.reading import Reader, writes
from mst_fx.refusal import Reason, Refusal


@dataclass(frozen=True)
class Region:
    """Nodes in graph order, what they read from outside, and what they give back.

    Attributes:
        owner: the module whose graph holds the nodes.
        nodes: every node of the region; the last one is the sink.
        live_ins: values read from outside, in order of first use.
        stream: the live-in that carries the tokens.
        autocast: arguments of the autocast blocks of the graph that the region stands in, outermost first.
    """

    owner: GraphModule
    nodes: tuple[Node, ...]
    live_ins: tuple[Node, ...]
    stream: Node
    autocast: tuple[tuple[object, ...], ...] = ()

    @property
    def sink(self) -> Node:
        """The node whose value the rest of the graph reads."""
        return self.nodes[-1]


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


def trunk_of(reader: Reader, top: Node, *, amplifying: bool) -> Trunk | None:
    """Walk back from `top` (the sink's large operand) to the contractions that made it.

    Args:
        reader: of the graph.
        top: the value to explain.
        amplifying: give up at a wide contraction that does not widen its activation, as a projection of attention.

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
        kinds[node] = _kind(reader, node, wide, amplifying)
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


def _kind(reader: Reader, node: Node, wide: int, amplifying: bool) -> _Kind:
    if node.op in ("placeholder", "get_attr"):
        return _Kind.LIVE_IN
    contraction = reader.contraction(node)
    if contraction is not None:
        if reader.numel(node) < wide:
            return _Kind.LIVE_IN
        if amplifying and reader.numel(node) <= reader.numel(contraction.activation):
            return _Kind.ALIEN
        return _Kind.UP
    obstacle = reader.obstacle(node)
    opaque = obstacle is not None and obstacle.reason in (Reason.UNKNOWN_OP, Reason.RANDOM)
    if reader.multiplies(node) or (opaque and len(reader.tensor_operands(node)) != 1):
        return _Kind.LIVE_IN  # attention, a scan, ...: whatever lies behind it belongs to something else
    return _Kind.THROUGH


def region_of(reader: Reader, trunk: Trunk, sink: Node) -> Region:
    """Close a trunk into a region that ends in `sink`.

    Raises:
        Refusal: a large value escapes, an op writes to memory or changes the grad mode, or an op may not be inside.
    """
    if trunk.obstacle is not None:
        raise trunk.obstacle
    nodes = (*trunk.nodes, sink)
    inside = set(nodes)
    for node in trunk.nodes:
        for user in node.users:
            if user not in inside:
                where = "is returned" if user.op == "output" else f"is also read by {op_name(user)}"
                raise Refusal(Reason.ESCAPES, user if user.op != "output" else node, f"{op_name(node)} {where}")
    _check_span(reader, nodes, inside)
    first = reader.contraction(trunk.ups[0])
    assert first is not None
    return Region(
        owner=reader.owner,
        nodes=nodes,
        live_ins=tuple(dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside)),
        stream=first.activation,
        autocast=_autocast_at(reader, nodes[0]),
    )


def _check_span(reader: Reader, nodes: tuple[Node, ...], inside: Iterable[Node]) -> None:
    """Between the first node and the sink nothing may write to memory or change a mode: the loop runs at the sink."""
    node = nodes[0]
    while node is not nodes[-1]:
        name = getattr(node.target, "__name__", "")
        if name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast"):
            raise Refusal(Reason.GRAD_MODE, node, f"{op_name(node)} stands between the region's nodes")
        if writes(node):
            raise Refusal(Reason.MUTATION, node, f"{op_name(node)} writes to its operand")
        node = node.next
    if writes(nodes[-1]):
        raise Refusal(Reason.MUTATION, nodes[-1], f"{op_name(nodes[-1])} writes to its operand")


def _autocast_at(reader: Reader, node: Node) -> tuple[tuple[object, ...], ...]:
    """The graph's own autocast blocks that are open at `node`."""
    blocks: list[tuple[Node, tuple[object, ...]]] = []
    for earlier in reader.owner.graph.nodes:
        if earlier is node:
            break
        name = getattr(earlier.target, "__name__", "")
        if name == "_enter_autocast":
            blocks.append((earlier, tuple(earlier.args)))
        elif name == "_exit_autocast":
            blocks = [block for block in blocks if block[0] is not earlier.args[0]]
    return tuple(arguments for _, arguments in blocks)
