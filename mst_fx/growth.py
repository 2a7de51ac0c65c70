"""From a head to the region of everything that is made of its logits.

Terms
  head      a contraction that makes a large value: one with more elements than what it is made from
  large     at least as many elements as the head's activation; what depends on a head and is smaller is a result
  returned  a large value that the graph's caller gets, itself, viewed or joined with others, so that it must exist
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from mst_fx.lower import fake_value, is_size
from mst_fx.provenance import op_name
from mst_fx.reading import Reader, written_by
from mst_fx.refusal import Reason, Refusal
from mst_fx.region import Region, close, has_gradient, needs_gradient, with_parts
from mst_fx.rules.view import FREE

aten = torch.ops.aten


@dataclass(frozen=True)
class Growth:
    """What grew from a head.

    Attributes:
        nodes: the head and what large values are made into, closed: no large value is read outside unless returned.
        returned: the large values among them that the graph returns.
        obstacle: why something that reads a large value cannot be looped, None where the nodes are closed.
    """

    nodes: frozenset[Node]
    returned: tuple[Node, ...]
    obstacle: Refusal | None


def grow(reader: Reader, head: Node, activation: Node) -> Growth | None:
    """Take in every reader of a large value, what other large values those read, who writes, and what lies in between.

    Args:
        reader: of the graph.
        head: the contraction to start from.
        activation: what the head projects.

    Returns:
        The growth, None where a large value is multiplied once more, as in an MLP or in attention: that is no head.
    """
    limit = reader.numel(activation)
    inside: set[Node] = set()
    returned: list[Node] = []
    obstacle: Refusal | None = None
    pending = [head]
    while pending:
        node = pending.pop()
        if node not in inside:
            inside.add(node)
            if reader.widening(node) is None:
                if reader.multiplies(node):
                    return None
                obstacle = obstacle or obstacle_to(reader, node)
                large = [operand for operand in node.all_input_nodes if reader.numel(operand) >= limit]
                pending += [operand for operand in large if obstacle is None and _can_be_made(reader, operand)]
            if reader.numel(node) >= limit:
                leaves = {user for user in node.users if user.op == "output" or only_returns(reader, user)}
                pending += [user for user in node.users if user not in leaves]
                returned += [node] if leaves else []
            pending += [user for user in node.users if written_by(user) is node]
        if not pending:
            pending += in_between(reader, inside)
    return Growth(frozenset(with_parts(inside)), tuple(returned), obstacle)


def region_of_growth(reader: Reader, growth: Growth, stream: Node) -> Region:
    """What to loop, the best first: up to one scalar; the large values alone; what stands behind returned logits.

    Raises:
        Refusal: none of these can be closed.
    """
    chain = [(growth.nodes, stream)]
    scalar = to_a_scalar(reader, growth)
    if scalar is not None and scalar != growth.nodes:
        chain.insert(0, (scalar, stream))
    if growth.returned:
        chain += _behind_returned(reader, scalar or growth.nodes, growth.returned)
    region, refusal = None, None
    for nodes, source in reversed(chain):
        try:
            region = close(reader, nodes, source, growth.returned, region)
        except Refusal as error:
            refusal = error
    if region is None:
        assert refusal is not None
        raise refusal
    return region


def only_returns(reader: Reader, node: Node) -> bool:
    """Whether a node views large values, or puts them together, for the caller of the graph and for nobody else."""
    opened = reader.opened(node) if all(user.op == "output" for user in node.users) else None
    if opened is None:
        return False
    ops = {op.target for op in opened.graph.nodes if op.op == "call_function"}
    return bool(ops) and ops <= {*FREE, aten.detach.default, aten.cat.default, aten.stack.default}


def in_between(reader: Reader, inside: set[Node]) -> list[Node]:
    """Nodes outside that depend on nodes inside and that nodes inside depend on."""
    first = min(map(reader.order.__getitem__, inside))
    dependent = set(inside)
    for node in reader.owner.graph.nodes:
        if reader.order[node] > first and not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return [o for node in inside for o in node.all_input_nodes if o in dependent and o not in inside]


def to_a_scalar(reader: Reader, growth: Growth) -> frozenset[Node] | None:
    """The nodes and what turns their results into one scalar, if that alone carries gradients to the rest of the graph.

    Values that must exist because they are returned do not count.
    """
    nodes = growth.nodes
    if not any(map(has_gradient, nodes)):
        return None
    grown, late = set(nodes), set[Node]()
    first = min(map(reader.order.__getitem__, nodes))
    scalars = []
    for node in reader.owner.graph.nodes:
        if reader.order[node] <= first or node.op == "output":
            continue
        if node not in nodes:
            operands = set(node.all_input_nodes)
            if operands.isdisjoint(grown | late):
                continue
            if not operands.isdisjoint(late) or obstacle_to(reader, node) is not None:
                late.add(node)
                continue
            grown.add(node)
        if reader.numel(node) == 1 and has_gradient(node):
            scalars.append(node)
    for scalar in scalars:
        part = with_parts(nodes | _ancestors(scalar, grown))
        ends = {node for node in part if needs_gradient(node, part)}
        if ends - {*growth.returned} == {scalar}:
            return frozenset(part)
    return None


def _behind_returned(
    reader: Reader, nodes: Iterable[Node], returned: tuple[Node, ...]
) -> list[tuple[frozenset[Node], Node]]:
    """The nodes that depend on returned values, with such a value (or a view of it) as their stream."""
    given, dependent = set(returned), set[Node]()
    for node in sorted(nodes, key=reader.order.__getitem__):
        operands = set(node.all_input_nodes)
        if node not in given and not operands.isdisjoint(given | dependent):
            (given if operands <= given and _is_view(reader, node) else dependent).add(node)
    streams = [o for node in dependent for o in node.all_input_nodes if o in given]
    return [(frozenset(dependent), max(streams, key=reader.numel))] if streams else []


def obstacle_to(reader: Reader, node: Node) -> Refusal | None:
    """Why a node that reads large values must not be in a region."""
    if is_size(fake_value(node)):
        return None
    obstacle = reader.obstacle(node)
    if obstacle is None and reader.multiplies(node):
        return Refusal(Reason.ESCAPES, node, f"{op_name(node)} multiplies the large value once more")
    return obstacle


def _can_be_made(reader: Reader, node: Node) -> bool:
    """Whether a large operand can be made in the loop as well, in place of being read by it."""
    if node.op in ("placeholder", "get_attr"):
        return False
    return reader.widening(node) is not None or obstacle_to(reader, node) is None


def _is_view(reader: Reader, node: Node) -> bool:
    operands = set().union(*map(reader.storages, node.all_input_nodes))
    return bool(reader.storages(node)) and reader.storages(node) <= operands


def _ancestors(node: Node, among: set[Node]) -> frozenset[Node]:
    found: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node in among and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return frozenset(found)
