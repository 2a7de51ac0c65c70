"""A growth begins at a node that makes a large value, and takes in all that is made of it; then it becomes a region.

Terms
  start     the node that makes the first large value: a widening contraction, or one that picks rows more than once
  stream    the operand of the start that carries the tokens
  large     more elements than the stream; a value that depends on the start and is not large is small again
  up        a contraction that makes a large value from one that is not
  sink      a contraction of a large value to one that is not (a down-projection)
  returned  a large value that the graph's caller gets, as it is, viewed or joined with others, so that it must exist
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch.fx import Node

from mst_fx.core.aten_ops import CONTRACTIONS, GROUPED_PRODUCTS, ONE_PRODUCT, SHOWN_TO_CALLERS
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import is_size, sure
from mst_fx.core.values import fake_value
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import with_items
from mst_fx.recognise.sorted_rows import required_by

PRODUCT_ADVICE = "Use an op that does not write the product: scaled_dot_product_attention."
MIXES_ADVICE = "Attention and scans need all tokens at once; an op that keeps them apart needs a placement rule."


@dataclass(frozen=True)
class Growth:
    """The nodes that grow from a start.

    Attributes:
        nodes: the start and all readers of large values: outside of them, nothing but the caller reads a large value.
        ups: the contractions among them that make large values from values that are not, in graph order.
        sinks: the contractions, and sums over experts, of large values to values that are not, in graph order.
        returned: the large values among them that the graph returns.
        obstacle: why a reader of a large value cannot be looped, None where there is no such reader.
    """

    nodes: frozenset[Node]
    ups: tuple[Node, ...]
    sinks: tuple[Node, ...]
    returned: tuple[Node, ...]
    obstacle: Refusal | None


def grow(reader: Reader, start: Node, stream: Node) -> Growth | None:
    """Take in all readers of large values, the other large values that these read, all writers, and nodes in between.

    Where that fails, and a contraction has narrowed a large value to one that is still larger than the stream (which is
    of low rank then), the search begins again: large is what has more elements than that value.

    Args:
        reader: reads the graph.
        start: the node to start from.
        stream: the operand of the start that carries the tokens.

    Returns:
        The growth, None where large values meet in a matrix product, as in attention, or are widened once more.
    """
    key = (grow, start, stream)  # every pattern asks for it
    if key not in reader.remembered:
        reader.remembered[key] = _grow(reader, start, stream)
    growth: Growth | None = reader.remembered[key]
    return growth


def _grow(reader: Reader, start: Node, stream: Node) -> Growth | None:
    limit: int | None = reader.numel(stream)
    while limit is not None and reader.numel(start) > limit:
        attempt = _Attempt(reader, start, stream, limit)
        growth = attempt.growth()
        if growth is not None:
            return growth
        assert attempt.failure is not None
        reader.unmatched.give_up(attempt.inside, attempt.failure, start)
        limit = attempt.narrowed
    return None


def within(reader: Reader, node: Node) -> Growth:
    """Return a node as a growth, where the large values are inside of it."""
    return Growth(frozenset([node]), (), (), (), reader.obstacle(node))


def grown_from(reader: Reader, start: Node) -> frozenset[Node]:
    """Return the nodes of the growths from a node that has been asked about, and the node itself."""
    asked = (key for key in reader.remembered if isinstance(key, tuple) and key[:2] == (grow, start))
    growths = (reader.remembered[key] for key in asked)
    return frozenset([start]).union(*(growth.nodes for growth in growths if growth is not None))


class _Attempt:
    """An attempt to grow with one limit: values with more elements are large.

    Attributes:
        failure: why it has failed: large values met in a product, were widened once more, or an obstacle joins them.
        narrowed: elements of the first large value that a contraction made of a larger one: the next limit to try.
    """

    def __init__(self, reader: Reader, start: Node, stream: Node, limit: int) -> None:
        self.reader, self.start, self.limit = reader, start, limit
        self.shape = fake_value(stream).shape
        self.inside: set[Node] = set()
        self.ups: list[Node] = []
        self.sinks: list[Node] = []
        self.returned: list[Node] = []
        self.obstacle: Refusal | None = None
        self.failure: Refusal | None = None
        self.narrowed: int | None = None
        self.projects = reader.widening(start) is not None

    def growth(self) -> Growth | None:
        """Take in nodes until no more are needed; return None where the attempt fails."""
        pending = [self.start]
        while pending:
            node = pending.pop()
            if node not in self.inside:
                self.inside.add(node)
                pending += self._operands(node) + self._readers(node)
            if self.failure is not None:
                return None
            if not pending:
                pending += required_by(self.reader, self.inside)
        order = self.reader.order.__getitem__
        ups, sinks = tuple(sorted(self.ups, key=order)), tuple(sorted(self.sinks, key=order))
        return Growth(frozenset(with_items(self.inside)), ups, sinks, tuple(self.returned), self.obstacle)

    def _is_large(self, node: Node) -> bool:
        return self.reader.numel(node) > self.limit

    def _readers(self, node: Node) -> list[Node]:
        """Return the users that come in with a node: the readers and the writers of a large value."""
        if not self._is_large(node):
            return []
        writers = [user for user in node.users if node in self.reader.written_by(user)]
        leaves = {user for user in node.users if user.op == "output" or self._is_shown(user)}
        self.returned += [node] if leaves else []
        return [user for user in node.users if user not in leaves] + writers

    def _is_shown(self, node: Node) -> bool:
        """Return whether a node gives large values to the caller; a small slice of one is an ordinary output."""
        return self._is_large(node) and only_returns(self.reader, node)

    def _operands(self, node: Node) -> list[Node]:
        """Return the large operands that come in with a node: the loop makes them, and does not read them."""
        contraction = self.reader.contraction(node)
        if contraction is not None and not self._is_large(contraction.activation):
            self.ups += [node] if self._is_large(node) else []
            return []
        if contraction is not None:
            self._record_contraction(node, contraction.activation)
            operands = [contraction.weight] if fake_value(contraction.weight).dim() > 2 else []
        elif self._adds_up_experts(node):
            self.sinks.append(node)
            operands = node.all_input_nodes
        else:
            if self.reader.multiplies(node) and not self._has_one_for_each_row(node):
                advice = PRODUCT_ADVICE if self.reader.is_one_product(node) else Reason.NO_GAIN.value
                self._fail(node, "multiplies large values with one another, as attention does", advice)
            self.obstacle = self.obstacle or self._obstacle_to(node)
            if self.obstacle is not None and _mixes(self.reader, self.obstacle):
                joins = sum(not self.reader.is_learnt(operand) for operand in self.reader.tensor_operands(node)) > 1
                text = f"{self.obstacle.text}{', and it joins several values' if joins else ''}"
                self.failure = self.failure or Refusal(self.obstacle.reason, self.obstacle.node, text, MIXES_ADVICE)
            operands = node.all_input_nodes if node is not self.start else []
        if self.obstacle is not None:
            return []
        return [operand for operand in operands if self._is_large(operand) and self._can_be_made(operand)]

    def _record_contraction(self, node: Node, activation: Node) -> None:
        """Record a contraction of a large value: a sink, a second widening, or one that narrows."""
        before, after = self.reader.numel(activation), self.reader.numel(node)
        if not self._is_large(node):
            self.sinks.append(node)
        elif self.projects and after > before:
            self._fail(node, "widens the large value once more")
        elif self.projects and after < before:
            self.narrowed = self.narrowed or after

    def _has_one_for_each_row(self, node: Node) -> bool:
        """Return whether each token, a row of the stream or some in a row, is multiplied by a matrix of its own."""
        decomposed = self.reader.decomposed(node)
        products = [op for op in decomposed.ops if op.target in CONTRACTIONS] if decomposed is not None else []
        if any(op.target in (*ONE_PRODUCT, *GROUPED_PRODUCTS) for op in products):
            return False
        dims = len(self.shape) - 1
        tokens = [prod(self.shape[:count]) for count in range(min(2, dims), dims + 1)]  # not the batch alone
        return all(any(sure(op.meta["val"].shape[0] == count) for count in tokens) for op in products)

    def _obstacle_to(self, node: Node) -> Refusal | None:
        one_each = self.reader.multiplies(node) and self._has_one_for_each_row(node)
        return self.reader.obstacle(node) if one_each else obstacle_to(self.reader, node)

    def _can_be_made(self, node: Node) -> bool:
        """Return whether the loop can make a large operand, and need not read it."""
        if node.op in ("placeholder", "get_attr"):
            return False
        return self.reader.widening(node) is not None or self._obstacle_to(node) is None

    def _adds_up_experts(self, node: Node) -> bool:
        """Return whether a node multiplies what experts make of tokens by the tokens' own shares, and adds it up."""
        large = [operand for operand in self.reader.tensor_operands(node) if self._is_large(operand)]
        products = (self.reader.contraction(each) for each in self.inside)
        is_sum = self.reader.multiplies(node) and len(large) == 1 and not self._is_large(node)
        return is_sum and any(product is not None and product.grouped for product in products)

    def _fail(self, node: Node, text: str, advice: str = "") -> None:
        self.failure = self.failure or Refusal(Reason.NO_PATTERN, node, f"{op_name(node)} {text}", advice)


def _mixes(reader: Reader, obstacle: Refusal) -> bool:
    """Return whether an obstacle is attention, or an unknown op of several tensors: a scan, ..."""
    opaque = obstacle.reason in (Reason.UNKNOWN_OP, Reason.RANDOM, Reason.AXIS_MIXED)
    return opaque and obstacle.node is not None and len(reader.tensor_operands(obstacle.node)) != 1


def only_returns(reader: Reader, node: Node) -> bool:
    """Return whether a node views or joins large values for the caller of the graph alone."""
    ops = (reader.ops(node) or set()) if all(user.op == "output" for user in node.users) else set()
    return bool(ops) and ops <= {*SHOWN_TO_CALLERS}


def obstacle_to(reader: Reader, node: Node) -> Refusal | None:
    """Return why a node that reads large values must not be in a region, None where it may."""
    if is_size(fake_value(node)):
        return None
    obstacle = reader.obstacle(node)
    if obstacle is None and reader.multiplies(node):
        return Refusal(Reason.ESCAPES, node, f"{op_name(node)} multiplies the large value once more")
    return obstacle
