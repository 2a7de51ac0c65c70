"""The front of a region, a norm in most cases, joins the region if only the region reads it.

In the loop, the front's value and its gradient never exist at the whole length. The forward saves what the norm reads,
which the backward would need in any case.

Terms
  stream  the live-in that carries the tokens
  front   nodes that make the stream from an earlier value of its shape, and that only the region reads
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from mst_fx.core.refusal import Refusal
from mst_fx.core.values import fake_value
from mst_fx.placement.placement import same_shape
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close


def with_front(reader: Reader, region: Region, taken: Collection[Node]) -> Region | None:
    """Return the region with its front, None where it has none.

    Args:
        reader: reads the graph.
        region: as recognised.
        taken: nodes that belong to regions.
    """
    found = _front(reader, region, taken)
    if found is None:
        return None
    front, stream = found
    try:
        return close(reader, {*region.nodes, *front}, stream, region.returned, region.smaller, front)
    except Refusal:
        return None


def _front(reader: Reader, region: Region, taken: Collection[Node]) -> tuple[frozenset[Node], Node] | None:
    """Return the longest front and the stream that it reads, None where there is no front.

    The search goes back from the region's stream, last node first, and takes every node that may be in a front. The
    nodes so far are a front if they read one value as large as the stream, and otherwise only values that no front
    could make.
    """
    inside, front = set(region.nodes), set[Node]()
    made, given = {region.stream}, set[Node]()
    found = None
    while made:
        node = max(made, key=reader.order.__getitem__)
        made.remove(node)
        if node in taken or not _belongs(reader, node, inside):
            given.add(node)
        else:
            front.add(node)
            inside.add(node)
            operands = reader.tensor_operands(node)
            given.update(operand for operand in operands if operand.op in ("placeholder", "get_attr"))
            made.update(set(operands) - given)
        large = [end for end in (*made, *given) if reader.numel(end) >= reader.numel(region.stream)]
        if front and len(large) == 1 and made <= {*large} and _is_like(large[0], region.stream):
            found = frozenset(front), large[0]
    return found


def _belongs(reader: Reader, node: Node, inside: set[Node]) -> bool:
    """Return whether a node computes a value for the region alone, token by token as far as its ops can tell."""
    if not node.op.startswith("call_") or not inside.issuperset(node.users):
        return False
    if not all(isinstance(fake_value(value), torch.Tensor) for value in (node, *reader.tensor_operands(node))):
        return False  # a tuple, or an item of one
    computes = reader.is_pure(node) and not reader.multiplies(node) and reader.obstacle(node) is None
    return computes and not any(reader.written_by(user) for user in node.users)


def _is_like(value: Node, stream: Node) -> bool:
    """Return whether a loop may read a value in place of the stream, for no more memory."""
    a, b = fake_value(value), fake_value(stream)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return same_shape(a.shape, b.shape) and a.itemsize <= b.itemsize and a.is_floating_point()
