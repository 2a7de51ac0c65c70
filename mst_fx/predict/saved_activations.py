"""Which values outside the regions a compiler saves for backward, and what their backward needs besides.

Matrix products, attention and unknown ops are expensive: a compiler does not recompute them, and saves their operands,
too, which their backward reads from memory. It recomputes any other value from its origins and saves these, or saves
the value itself where it has at most half the bytes of its origins and these are not all saved anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from enum import IntEnum

import torch
from torch.fx import Node, map_arg

from mst_fx.core.aten_ops import BILINEAR, CONTRACTIONS, LINEAR, LOOK_UPS, is_recomputed
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import Hint, is_size
from mst_fx.core.values import HALF, bytes_of, has_gradient, tensors_of
from mst_fx.kernels.liveness import buffer_of
from mst_fx.ops.overwritten import overwritten
from mst_fx.recognise.reader import Reader

aten = torch.ops.aten

IN_HALF = 3
"""In half precision, attention's backward holds this many times its operands and results: gradients, and their sums in
float32. In another dtype the sums are the gradients."""


class Need(IntEnum):
    """What backward needs of a value: nothing, its numbers, which can be recomputed, or the value in memory."""

    NOTHING = 0
    NUMBERS = 1
    MEMORY = 2


def saved_values(reader: Reader, regions: Mapping[Node, int], blocks: Container[Node], at: Hint) -> dict[Node, int]:
    """Return the bytes saved for backward, by the node that makes them, with the outputs of regions and of blocks.

    Args:
        reader: of the graph.
        regions: the number of the region of each node that belongs to one.
        blocks: the nodes that run subgraphs; what they read is counted with the subgraphs.
        at: tells sizes that vary.
    """
    nodes = reader.owner.graph.nodes
    made = {node: size for node in nodes if node.op.startswith("call_") and (size := _bytes_of_all(node, at))}
    first = _first_alike(reader, made)
    needs = _needs(reader, made, first, regions, blocks)
    origins: dict[Node, frozenset[Node]] = {}
    saved: set[Node] = set()
    shrunk: dict[Node, frozenset[Node]] = {}
    for node in made:
        behind = frozenset().union(*(origins.get(operand, frozenset()) for operand in node.all_input_nodes))
        if first[node] is not node:
            origins[node] = origins[first[node]]
        elif reader.is_view(node):
            origins[node] = behind
        elif node in regions or node in blocks or needs[node] is Need.MEMORY or _is_expensive(reader, node):
            origins[node] = frozenset([node])
        else:
            is_smaller = 2 * made[node] <= sum(map(made.__getitem__, behind))
            origins[node] = frozenset([node]) if is_smaller else behind
            shrunk |= {node: behind} if is_smaller else {}
        saved.update(origins[node] if needs[node] else ())
    for node, behind in shrunk.items():  # which is recomputed from what is saved anyway
        saved -= {node} if behind and behind <= saved else set()
    outside = [node for node in made if node not in regions and node not in blocks and has_gradient(node)]
    inner = _inner_values(reader, outside, first, at)
    return {node: made[node] * (node in saved) + inner.get(node, 0) for node in made if node in saved or node in inner}


def _first_alike(reader: Reader, made: Iterable[Node]) -> dict[Node, Node]:
    """Return for each node the first one that computes the same: a compiler computes it once."""
    first: dict[Node, Node] = {}
    known: dict[Hashable, Node] = {}
    for node in made:
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: first.get(operand, operand))
        key = (node.op, node.target, repr(args), repr(kwargs), reader.modes[node])
        first[node] = known.setdefault(key, node) if reader.is_pure(node) else node
    return first


def is_written(reader: Reader, node: Node, saved: Container[Node], opaque: Container[Node]) -> bool:
    """Return whether a compiler writes a node's value to memory, and does not fuse it into all that reads it.

    Args:
        reader: of the graph.
        node: makes new memory.
        saved: the nodes whose values are saved for backward.
        opaque: nodes that read memory: those of loops, and those that run subgraphs.
    """
    if node in saved or _is_expensive(reader, node):
        return True
    shown = descendants([node], lambda value: filter(reader.is_view, value.users))
    readers = (user for value in shown for user in value.users)
    return any(user.op == "output" or user in opaque or _is_expensive(reader, user) for user in readers)


def _needs(
    reader: Reader,
    made: Iterable[Node],
    first: Mapping[Node, Node],
    regions: Mapping[Node, int],
    blocks: Container[Node],
) -> Mapping[Node, Need]:
    """Return what backward needs of each value; a need of a view is one of the value that it views.

    A value may be needed that has no gradient, such as a mask: what reads it has one.
    """
    needs: dict[Node, Need] = defaultdict(lambda: Need.NOTHING)
    trained = {regions[node] for node in regions if has_gradient(node)}
    for node in reversed([*made]):
        views = reader.is_view(node)
        passed = needs[first[node]] if views else Need.NOTHING
        if node in blocks or not (views or has_gradient(node) or regions.get(node) in trained):
            continue
        if (
            has_gradient(node)
            and not (views or node in regions or reader.multiplies(node))
            and _is_expensive(reader, node)
        ):
            needs[first[node]] = Need.MEMORY  # attention's backward reads its result
        for operand in node.all_input_nodes:
            if node in regions:
                need = Need.NOTHING if regions.get(operand) == regions[node] else Need.MEMORY
            else:
                need = passed if views else _needed(reader, node, operand)
            operand = first.get(operand, operand)
            needs[operand] = max(needs[operand], need)
    return needs


def _needed(reader: Reader, node: Node, operand: Node) -> Need:
    """Return what the backward of a node needs of one of its operands."""
    ops = reader.ops(node)
    if ops is not None and ops <= BILINEAR:
        others = [other for other in node.all_input_nodes if other is not operand]
        twice = [*node.args, *node.kwargs.values()].count(operand) > 1
        read = twice or any(map(has_gradient, others))
        divides = aten.div.Tensor in ops and node.all_input_nodes[0] is not operand
        if ops <= LINEAR or not (read or divides):
            return Need.NOTHING
    if not _is_expensive(reader, node):
        return Need.NUMBERS
    return Need.MEMORY if has_gradient(operand) or _is_read_as_is(reader, node, operand) else Need.NOTHING


def _is_read_as_is(reader: Reader, node: Node, operand: Node) -> bool:
    """Return whether an expensive op inside of a node reads an operand, and not only what is made of it (a mask)."""
    decomposed = reader.decomposed(node)
    if decomposed is None:
        return True
    expensive = (op for op in decomposed.ops if not is_recomputed(op.target))
    read = {buffer_of(value) for op in expensive for value in op.all_input_nodes}
    return any(
        node.all_input_nodes[position] is operand and placeholder in read
        for placeholder, position in decomposed.position_of.items()
    )


def passing_bytes(reader: Reader, node: Node, at: Hint) -> int:
    """Return the bytes that the backward of a node outside the regions needs at once, besides the saved values."""
    made = _bytes_made(node, at)
    if not made:
        return 0
    if reader.does(node, LOOK_UPS):  # the gradient of the table adds up in float32
        tables = [x for x in _read_by(node) if isinstance(x, torch.nn.Parameter) and x.dtype in HALF]
        return sum(4 * at(table.numel()) + bytes_of(table, at) for table in tables)
    if not _is_expensive(reader, node):
        return 0
    inner = 2 * _inner_bytes(reader, node, at)  # what is made of the saved ones, and its gradient
    sums_apart = not reader.multiplies(node) and any(x.dtype in HALF for x in tensors_of(node))
    return inner + (made + activation_bytes(node, at)) * (IN_HALF if sums_apart else 1)


def _inner_values(reader: Reader, nodes: Iterable[Node], first: Mapping[Node, Node], at: Hint) -> dict[Node, int]:
    """Return the bytes of what is saved inside of nodes, with one node for what several make alike (a mask)."""
    found: dict[Node, int] = {}
    known: set[Hashable] = set()
    for node in nodes:
        size = _inner_bytes(reader, node, at)
        for op, key in _fixed_operands(reader, node, first):
            size += bytes_of(op.meta["val"], at) * (key not in known)
            known.add(key)
        if size:
            found[node] = size
    return found


def _fixed_operands(reader: Reader, node: Node, first: Mapping[Node, Node]) -> Iterator[tuple[Node, Hashable]]:
    """Yield what ops inside of a node read in backward that no gradient passes through: a mask as attention takes it.

    Each with a key, the same for values that are computed alike.
    """
    decomposed = reader.decomposed(node)
    if decomposed is None or decomposed.backward:
        return
    fixed: dict[Node, Hashable] = {}
    for placeholder, position in decomposed.position_of.items():
        operand = node.all_input_nodes[position]
        if not has_gradient(operand):
            fixed[placeholder] = first.get(operand, operand)
    for op in decomposed.ops:
        computed = isinstance(op.meta.get("val"), torch.Tensor) and not is_size(op.meta["val"])
        if is_recomputed(op.target):
            if computed and all(operand in fixed for operand in op.all_input_nodes):
                fixed[op] = (op.target, *(fixed[operand] for operand in op.all_input_nodes))
            continue
        for operand in map(buffer_of, op.all_input_nodes):
            if operand in fixed and operand.op != "placeholder":
                yield operand, fixed[operand]


def _inner_bytes(reader: Reader, node: Node, at: Hint) -> int:
    """Return the bytes of what products inside of a node make for others: scores, where attention is no single op."""
    decomposed = reader.decomposed(node)
    if decomposed is None or decomposed.backward:
        return 0
    products = [op for op in decomposed.ops if op.target in CONTRACTIONS]
    return sum(bytes_of(op.meta["val"], at) for op in products[:-1])


def activation_bytes(node: Node, at: Hint) -> int:
    """Return the bytes of the operands that carry gradients and are no parameters."""
    activations = (x for x in _read_by(node) if x.requires_grad and not isinstance(x, torch.nn.Parameter))
    return sum(bytes_of(x, at) for x in activations)


def _read_by(node: Node) -> list[torch.Tensor]:
    return [x for operand in node.all_input_nodes for x in tensors_of(operand)]


def _is_expensive(reader: Reader, node: Node) -> bool:
    """Return whether a compiler saves a node's result rather than recompute it."""
    ops = reader.ops(node)
    return ops is None or not all(op is overwritten or is_recomputed(op) for op in ops)


def _bytes_of_all(node: Node, at: Hint) -> int:
    """Return the bytes of the tensors that a node makes."""
    return sum(bytes_of(x, at) for x in tensors_of(node))


def _bytes_made(node: Node, at: Hint) -> int:
    """Return the bytes of the tensors that a node makes and that carry gradients."""
    if node.op in ("placeholder", "get_attr", "output"):
        return 0
    return sum(bytes_of(x, at) for x in tensors_of(node) if x.requires_grad)
