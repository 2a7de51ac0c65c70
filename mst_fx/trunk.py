"""From a sink back to the contractions that made its large operand: the region of an MLP.

Terms
  sink   the node where the large values end (a down-projection)
  up     a contraction that makes a large value (an up-projection)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch.fx import Node

from mst_fx.provenance import op_name
from mst_fx.reading import Reader
from mst_fx.refusal import Reason, Refusal
from mst_fx.region import Region, close


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
