"""Nodes that come into a region with its nodes: those in between, writes, and the sorts that permute its rows.

Terms
  key           the value that is sorted: the expert of each row
  permutation   an integer value that the sort makes, one number for each row
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import SORTS
from mst_fx.core.graph_walk import ancestors, descendants
from mst_fx.core.values import fake_value, storages_of, storages_of_all
from mst_fx.recognise.reader import Reader


def required_by(reader: Reader, inside: set[Node]) -> list[Node]:
    """Return outside nodes that must come in: nodes in between, writes, and new memory that is made for a write.

    They are in graph order.
    """
    users = {user for node in inside for user in node.users if user not in inside}
    writers = [
        user for user in users if not inside.isdisjoint(reader.written_by(user)) and _is_seen(reader, user, inside)
    ]
    fills = [o for node in inside for o in node.all_input_nodes if o not in inside and reader.fills(reader.unviewed(o))]
    written = [o for o in fills if inside.issuperset(o.users) or any(o in reader.written_by(user) for user in o.users)]
    dependent = reader.made_before(max(inside, key=reader.order.__getitem__), inside)
    between = [o for node in inside for o in node.all_input_nodes if o in dependent and o not in inside]
    return sorted({*between, *writers, *written}, key=reader.order.__getitem__)


def _is_seen(reader: Reader, write: Node, inside: set[Node]) -> bool:
    """Return whether a write to a value of the region changes what the region reads, or another output of it.

    A write after all reads of the region writes to the loop's result, as to any value.
    """
    memory = storages_of_all(reader.written_by(write))
    given = read = 0
    for node in inside:
        later = reader.order[node] > reader.order[write]
        foreign = [o for o in node.all_input_nodes if later or o not in inside]
        read += any(not memory.isdisjoint(storages_of(operand)) for operand in foreign)
        given += not memory.isdisjoint(storages_of(node)) and not inside.issuperset(node.users)
    return read > 0 or given > 1


def with_permutations(reader: Reader, nodes: frozenset[Node], stream: Node) -> set[Node]:
    """Return the nodes, all nodes between them and the keys of their rows, and the nodes that restore the rows.

    Each chunk has a permutation of its own: the region must make it inside, and must give no permuted rows.
    """
    inside = set(nodes)
    sorts = _sorts_behind(reader, nodes, stream)
    if not sorts:
        return inside
    keys = {reader.unviewed(sort.all_input_nodes[0]) for sort in sorts}
    permutations = {node for node in descendants(sorts) if _is_permutation(reader, node, sorts)}
    while True:
        later = descendants(inside)
        back = {node for node in later if not permutations.isdisjoint(set(node.all_input_nodes) - later)}
        more = {*back, *required_by(reader, inside | keys)} - inside - keys
        if not more:
            return inside
        inside |= more


def _sorts_behind(reader: Reader, nodes: frozenset[Node], stream: Node) -> set[Node]:
    """Return the sorts that lead to the nodes, by way of values smaller than the stream: permutations are smaller."""
    large = reader.numel(stream)
    behind = ancestors(nodes, stop=lambda node: node in nodes or reader.numel(node) >= large) - nodes
    return {node for node in behind if reader.does(node, SORTS)}


def is_picked_by_top_k(node: Node) -> bool:
    """Return whether a captured value is the indices of a top-k along the last dim."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    (pick,) = node.all_input_nodes
    named = getattr(pick.target, "__name__", pick.target) == "topk"
    dim = pick.kwargs.get("dim", pick.args[2] if len(pick.args) > 2 else -1)
    return named and isinstance(dim, int) and dim % fake_value(node).dim() == fake_value(node).dim() - 1


def _is_permutation(reader: Reader, node: Node, sorts: set[Node]) -> bool:
    value = fake_value(node)
    rows = min(reader.numel(sort.all_input_nodes[0]) for sort in sorts)
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return whole and reader.numel(node) >= rows
