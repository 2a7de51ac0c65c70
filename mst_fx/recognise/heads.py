"""Attention with the projections that make its queries, keys and values, and the views behind it: a region over heads.

    q, k, v = heads(x wq), heads(x wk), heads(x wv)        each head has rows of wq, and shares rows of wk and wv
    y = joined(attention(rotated(q), rotated(k), v))

The stream of such a region is a weight: its rows make the heads, and the tokens are whole for each of them.
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.core.aten_ops import ATTENTIONS, PERMUTES, PRODUCTS_PLUS, RESHAPES, aten
from mst_fx.core.graph_walk import ancestors, descendants, walk
from mst_fx.core.values import has_gradient
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close


def heads_region(reader: Reader, node: Node) -> Region | None:
    """Return the region around an attention op; None where the node is none, or where no weight makes its heads.

    Raises:
        Refusal: the nodes cannot be closed (see `close`).
    """
    if not reader.does(node, ATTENTIONS):
        return None
    projections = _projections(reader, node)
    if not projections:
        return None
    inside = descendants(projections) & ancestors([node], stop=projections.__contains__)
    behind = _views(reader, node)
    narrow = min(projections, key=lambda each: (reader.numel(each), reader.order[each]))  # of keys: the fewest heads
    contraction = reader.contraction(narrow)
    assert contraction is not None
    nodes = {*projections, *inside, node, *behind}
    region = close(reader, nodes, contraction.weight, over="heads")
    joined = _joined(reader, (node, *behind)[-1])
    return close(reader, nodes | joined, contraction.weight, smaller=region, over="heads") if joined else region


def _projections(reader: Reader, attention: Node) -> set[Node]:
    """Return the nearest contractions with weights that attention's operands are made of, if gradients pass them."""
    found = set()

    def operands(node: Node) -> list[Node]:
        contraction = reader.contraction(node) if has_gradient(node) else None
        if node is not attention and contraction is not None and reader.is_learnt(contraction.weight):
            found.add(node)
            return []
        return [operand for operand in reader.tensor_operands(node) if has_gradient(operand)]

    for _ in walk([attention], operands):
        pass
    return found


def _joined(reader: Reader, heads: Node) -> set[Node]:
    """Return the product that adds up over the heads, if nothing else reads them, and it has no bias."""
    readers = [user for user in heads.users if user.op != "output"]
    contraction = reader.contraction(readers[0]) if len(readers) == len(heads.users) == 1 else None
    if contraction is None or contraction.activation is not heads or reader.does(readers[0], PRODUCTS_PLUS):
        return set()
    return {readers[0]}


def _views(reader: Reader, attention: Node) -> list[Node]:
    """Return the nodes that bring attention's result into another shape, and nothing else, one after the other."""
    views: list[Node] = []
    node = attention
    while len(node.users) == 1:
        (node,) = node.users
        ops = reader.ops(node)
        if node.op == "output" or ops is None or not ops <= {*RESHAPES, *PERMUTES, aten.clone.default}:
            break
        views.append(node)
    return views
