"""From a value that is larger than what it is made from to the region of everything that is made of it.

Terms
  start     what makes the first large value: a contraction that widens the stream, or rows picked more than once
  source    what the start reads: the stream
  large     more elements than the source; what depends on the start and is not large is a result
  up        a contraction that makes a large value from one that is not
  sink      a contraction that makes a result from a large value (a down-projection)
  returned  a large value that the graph's caller gets, itself, viewed or joined with others, so that it must exist
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from mst_fx.core.aten_ops import SHOWN_TO_CALLERS
from mst_fx.core.graph_walk import ancestors
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import is_size
from mst_fx.core.values import fake_value, has_gradient, is_view
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close, needs_gradient, with_parts
from mst_fx.recognise.sorted_rows import company, with_orders


@dataclass(frozen=True)
class Growth:
    """What grew from a start.

    Attributes:
        nodes: the start and what large values are made into, closed: no large value is read outside unless returned.
        ups: the contractions among them that make large values from values that are not large, in graph order.
        sinks: those that make values that are not large from large ones, in graph order.
        returned: the large values among them that the graph returns.
        obstacle: why something that reads a large value cannot be looped, None where the nodes are closed.
    """

    nodes: frozenset[Node]
    ups: tuple[Node, ...]
    sinks: tuple[Node, ...]
    returned: tuple[Node, ...]
    obstacle: Refusal | None


def grow(reader: Reader, start: Node, source: Node) -> Growth | None:
    """Take in every reader of a large value, what other large values those read, who writes, and what lies in between.

    Where that fails, and a contraction narrowed a large value to one that is still larger than the source (which is of
    low rank), that size is the limit of what is large.

    Args:
        reader: of the graph.
        start: the node to start from.
        source: what it reads.

    Returns:
        The growth, None where large values meet in a matrix product, as in attention, or are widened once more.
    """
    key = (grow, start, source)  # every pattern asks
    if key not in reader.remembered:
        reader.remembered[key] = _grow(reader, start, source)
    growth: Growth | None = reader.remembered[key]
    return growth


def _grow(reader: Reader, start: Node, source: Node) -> Growth | None:
    limit: int | None = reader.numel(source)
    while limit is not None and reader.numel(start) > limit:
        attempt = _Attempt(reader, start, limit)
        growth = attempt.growth()
        if growth is not None:
            return growth
        limit = attempt.narrowed
    return None


class _Attempt:
    """Growing with one limit of what is large.

    Attributes:
        alien: whether it failed: large values met in a product, or were widened once more.
        narrowed: the size of the first large value that a contraction made of a larger one: the next limit to try.
    """

    def __init__(self, reader: Reader, start: Node, limit: int) -> None:
        self.reader, self.start, self.limit = reader, start, limit
        self.inside: set[Node] = set()
        self.ups: list[Node] = []
        self.sinks: list[Node] = []
        self.returned: list[Node] = []
        self.obstacle: Refusal | None = None
        self.alien = False
        self.narrowed: int | None = None
        self.projects = reader.widening(start) is not None

    def growth(self) -> Growth | None:
        """Take in nodes until none has to come along any more; None where the attempt failed."""
        pending = [self.start]
        while pending:
            node = pending.pop()
            if node not in self.inside:
                self.inside.add(node)
                pending += self._operands(node) + self._readers(node)
            if self.alien:
                return None
            if not pending:
                pending += company(self.reader, self.inside)
        order = self.reader.order.__getitem__
        ups, sinks = tuple(sorted(self.ups, key=order)), tuple(sorted(self.sinks, key=order))
        return Growth(frozenset(with_parts(self.inside)), ups, sinks, tuple(self.returned), self.obstacle)

    def _is_large(self, node: Node) -> bool:
        return self.reader.numel(node) > self.limit

    def _readers(self, node: Node) -> list[Node]:
        """Who has to come along with a node: readers of a large value, and whoever writes to it."""
        if not self._is_large(node):
            return []
        writers = [user for user in node.users if node in self.reader.written_by(user)]
        leaves = {user for user in node.users if user.op == "output" or self._is_shown(user)}
        self.returned += [node] if leaves else []
        return [user for user in node.users if user not in leaves] + writers

    def _is_shown(self, node: Node) -> bool:
        """Whether a node gives large values to the caller; a small part of one is a result like others."""
        return self._is_large(node) and only_returns(self.reader, node)

    def _operands(self, node: Node) -> list[Node]:
        """The large operands that come along with a node: made in the loop, in place of being read by it."""
        contraction = self.reader.contraction(node)
        if contraction is not None and not self._is_large(contraction.activation):
            self.ups += [node] if self._is_large(node) else []
            return []
        if contraction is not None:
            self._weigh(node, contraction.activation)
            operands = [contraction.weight] if fake_value(contraction.weight).dim() > 2 else []
        else:
            self.alien |= self.reader.multiplies(node)
            self.obstacle = self.obstacle or obstacle_to(self.reader, node)
            self.alien |= self.obstacle is not None and _mixes(self.reader, self.obstacle)
            operands = node.all_input_nodes if node is not self.start else []
        if self.obstacle is not None:
            return []
        return [operand for operand in operands if self._is_large(operand) and _can_be_made(self.reader, operand)]

    def _weigh(self, node: Node, activation: Node) -> None:
        """Tell what a contraction of a large value is."""
        before, after = self.reader.numel(activation), self.reader.numel(node)
        if not self._is_large(node):
            self.sinks.append(node)
        elif self.projects and after > before:
            self.alien = True
        elif self.projects and after < before:
            self.narrowed = self.narrowed or after


def _mixes(reader: Reader, obstacle: Refusal) -> bool:
    """Whether an obstacle is an op of several tensors that nobody knows: attention, a scan, ..."""
    opaque = obstacle.reason in (Reason.UNKNOWN_OP, Reason.RANDOM)
    return opaque and obstacle.node is not None and len(reader.tensor_operands(obstacle.node)) != 1


def region_of_head(reader: Reader, growth: Growth, stream: Node) -> Region:
    """What to loop of a head, the best first: up to one scalar; large values alone; what stands behind returned logits.

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


def region_of_mlp(reader: Reader, growth: Growth, stream: Node) -> Region:
    """Everything that grew, as one region whose outputs are the results.

    Raises:
        Refusal: there is an obstacle, a large value is returned, or one of `close`.
    """
    if growth.obstacle is not None:
        raise growth.obstacle
    for node in growth.returned:
        raise Refusal(Reason.ESCAPES, node, f"{op_name(node)} is returned")
    nodes = with_orders(reader, growth.nodes, stream)
    while stream in nodes and stream.all_input_nodes:  # picked in an order: the rows that it was picked from
        stream = stream.all_input_nodes[0]
    return close(reader, nodes, stream)


def only_returns(reader: Reader, node: Node) -> bool:
    """Whether a node views large values, or puts them together, for the caller of the graph and for nobody else."""
    ops = (reader.ops(node) or set()) if all(user.op == "output" for user in node.users) else set()
    return bool(ops) and ops <= {*SHOWN_TO_CALLERS}


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
        part = with_parts(nodes | ancestors([scalar], stop=lambda node: node not in grown))
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
            (given if operands <= given and is_view(node) else dependent).add(node)
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
