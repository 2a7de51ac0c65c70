"""Attention with the projections that make its queries, keys and values, and the views behind it: a region over heads.

    q, k, v = heads(x wq), heads(x wk), heads(x wv)        each head has rows of wq, and shares rows of wk and wv
    y = joined(attention(rotated(q), rotated(k), v))

The stream of such a region is a weight: its rows make the heads, and the tokens are whole for each of them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import takewhile

from torch.fx import Node

from mst_fx.core.aten_ops import ATTENTIONS, MOVES, PERMUTES, RESHAPES, aten
from mst_fx.core.graph_walk import ancestors, descendants, walk
from mst_fx.core.sizes import is_size, sure
from mst_fx.core.values import fake_value, has_gradient, storages_of, storages_of_all
from mst_fx.ops.own_gradients import own_gradients
from mst_fx.placement.rules import argument
from mst_fx.recognise.contractions import is_matrix
from mst_fx.recognise.effects import sends_back
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close


def heads_region(reader: Reader, node: Node) -> Region | None:
    """Return the region around attention; None where the node does not begin it, or where no weight makes its heads.

    Args:
        reader: reads the graph.
        node: an attention op, or the softmax of attention that is written out.

    Raises:
        Refusal: the nodes cannot be closed (see `close`).
    """
    attention = attention_of(reader, node)
    if attention is None:
        return None
    projections = _projections(reader, attention)
    if not projections:
        return _with_projections_inside(reader, attention)
    made_of = ancestors([attention], partial(_read_by, reader), projections.__contains__)
    inside = reader.made_before(attention, projections) & made_of
    written = set().union(*map(reader.memory_written_by, inside))  # `k = empty(..); k[..., :8] = x`
    inside |= {each for each in made_of if each.op.startswith("call_") and not written.isdisjoint(storages_of(each))}
    behind = _moved(reader, attention)
    views = list(takewhile(partial(_is_view, reader), behind))
    shared = _shares_all_keys(reader, attention)  # by all queries, which make the heads then
    by_size = sorted(projections, key=lambda each: (reader.numel(each), reader.order[each]), reverse=not shared)
    within = {*projections, *inside, attention}
    joined = _joined(reader, (attention, *behind)[-1])
    sizes = [within.union(views), within.union(behind), within.union(behind, joined)]
    region: Region | None = None
    for projection in dict.fromkeys((by_size[0], by_size[-1])):  # the keys' heads, where the queries do not share one
        contraction = reader.contraction(projection)
        assert contraction is not None
        for nodes in dict.fromkeys(map(frozenset, sizes)):
            region = close(reader, with_sizes(nodes), contraction.weight, smaller=region, over="heads")
    return region


def _with_projections_inside(reader: Reader, attention: Node) -> Region | None:
    """Return the region of one node that holds attention and its projections; None where it reads no weights."""
    weights = [operand for operand in reader.tensor_operands(attention) if is_matrix(operand)]
    learnt = [weight for weight in weights if reader.is_learnt(weight)]
    widest = max(learnt, key=reader.numel, default=None)
    return close(reader, with_sizes({attention}), widest, over="heads") if widest is not None else None


def with_sizes(nodes: Collection[Node]) -> set[Node]:
    """Return the nodes, and those that ask for a size of their values, if only the nodes read it."""
    found = set(nodes)
    asking = descendants(nodes, lambda node: (user for user in node.users if is_size(fake_value(user)))) - found
    for node in sorted(asking, reverse=True):
        if found.issuperset(node.users):
            found.add(node)
    return found


def attention_of(reader: Reader, node: Node) -> Node | None:
    """Return the node that makes attention's result of an attention op, or of a softmax of products of activations.

    The op, or the softmax, is where the search begins, so that it finds each attention once.
    """
    if reader.does(node, ATTENTIONS):
        return node
    if not reader.does(node, (aten._softmax.default,)):
        return None
    if reader.multiplies(node):  # attention in one node that is several ops
        return node
    if not _is_of_products(reader, node):
        return None
    while len(readers := _readers(node)) == 1:
        (node,) = readers
        if reader.multiplies(node):
            return None if _projects(reader, node) else node
    return None


def _is_of_products(reader: Reader, softmax: Node) -> bool:
    """Return whether a softmax reads products of two activations, which were scaled, masked or capped since.

    More may have been added, or set beside them: a learnt bias, products with positions, a score that no key has.
    """

    def operands(node: Node) -> list[Node]:
        is_product = node is not softmax and reader.multiplies(node)
        return [] if is_product else [each for each in reader.tensor_operands(node) if has_gradient(each)]

    reached = walk([softmax], operands)
    return any(node is not softmax and reader.multiplies(node) and not _projects(reader, node) for node in reached)


def _projects(reader: Reader, node: Node) -> bool:
    contraction = reader.contraction(node)
    return contraction is not None and reader.is_learnt(contraction.weight)


def _shares_all_keys(reader: Reader, attention: Node) -> bool:
    """Return whether all queries share the keys of one head, as far as the op tells."""
    decomposed = reader.decomposed(attention)
    ops = [op for op in decomposed.ops if op.target in ATTENTIONS] if decomposed is not None else []
    return any(sure(argument(op, "key").meta["val"].shape[1] == 1) for op in ops)


def _projections(reader: Reader, attention: Node) -> set[Node]:
    """Return the nearest contractions with weights that attention's operands are made of, if gradients pass them.

    Another contraction may read what one of them gives (keys made of a latent, beside a key that all heads share): then
    that one makes no heads, and stays outside.
    """
    found = set()

    def operands(node: Node) -> list[Node]:
        if node is not attention and _projects(reader, node):
            found.add(node)
            return []
        return [each for each in _read_by(reader, node) if sends_back(each)]

    for _ in walk([attention], operands):
        pass
    first = min((reader.order[each] for each in found), default=0)
    read = {operand for each in found for operand in each.all_input_nodes}
    return found - ancestors(read, stop=lambda each: reader.order[each] < first)


def _read_by(reader: Reader, node: Node) -> list[Node]:
    """Return the operands of a node that are tensors, and the nodes before it that have written to their memory."""
    operands = reader.tensor_operands(node)
    memory, place = storages_of_all(operands), reader.order[node]
    writers = (each for some in map(reader.writers.get, memory) for each in some or ())
    return [*operands, *(each for each in writers if reader.order[each] < place)]


def _joined(reader: Reader, heads: Node) -> set[Node]:
    """Return the product that adds up over the heads, if nothing else reads them."""
    readers = _readers(heads)
    contraction = reader.contraction(readers[0]) if len(readers) == 1 else None
    if contraction is None or contraction.activation is not heads:
        return set()
    return {readers[0]}


def _readers(node: Node) -> list[Node]:
    """Return the nodes that read a value, not only one of its sizes."""
    return [user for user in node.users if not is_size(fake_value(user))]


def _moved(reader: Reader, attention: Node) -> list[Node]:
    """Return the nodes that bring attention's result into another shape, or to other ranks, one after the other."""
    moving: list[Node] = []
    node = attention
    while len(readers := _readers(node)) == 1:
        (node,) = readers
        ops = reader.ops(node)
        if node.op == "output" or ops is None or not ops <= {*MOVES, own_gradients}:
            break
        moving.append(node)
    return moving


def _is_view(reader: Reader, node: Node) -> bool:
    return (reader.ops(node) or set()) <= {*RESHAPES, *PERMUTES, aten.clone.default}
