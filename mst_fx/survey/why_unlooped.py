"""Why no loop covers a large value that no match has come across.

Terms
  maker  a node that makes a value as large as the one in question of smaller ones
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.core.aten_ops import JOINS, LOOK_UPS
from mst_fx.core.graph_walk import descendants, in_order, walk
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.values import tensors_of
from mst_fx.recognise.decomposed_nodes import moves_shards, strange_tensors
from mst_fx.recognise.fragments import leaving
from mst_fx.recognise.growth import PRODUCT_ADVICE
from mst_fx.recognise.reader import Reader

RETURNED_ADVICE = "Return only what is read; for logits beside a loss: returned_logits='drop', or 'detach'."


def why_unlooped(reader: Reader, node: Node, within: str = "") -> Refusal:
    """Return why no loop covers a value.

    Args:
        reader: of the graph.
        node: makes the value; no match has left a note about it.
        within: the op that runs the graph, where no region looks into that; else "".
    """
    if within:
        return Refusal(Reason.SUBGRAPH, node, f"{within} runs the subgraph that makes it, which no region looks into")
    returned = not reader.borders.within and _is_returned(reader, node)
    if returned and not reader.borders.fragment:
        return _why_returned(reader, node)
    if reader.is_learnt(node):
        advice = "Keep the parameters as the ops need them."
        return Refusal(Reason.NO_GAIN, node, "it is made of parameters alone: it does not grow with the tokens", advice)
    makers = _makers(reader, node)
    if any(_is_input(maker) or _looks_up(reader, maker) or _projects(reader, maker, node) for maker in makers):
        given = f"what {reader.borders.within} is given" if reader.borders.within else "the tokens that it is made of"
        return Refusal(Reason.NO_GAIN, node, f"it is no larger than {given}")
    for end in (*makers, node):
        if (known := reader.unmatched.about(end) or reader.obstacle(end)) is not None:
            return known
    if returned:
        return leaving(node)
    maker = makers[-1]
    if reader.fills(maker):
        return Refusal(Reason.NO_PATTERN, node, f"no pattern for it: {op_name(maker)} makes it of no other values")
    mixes = reader.is_one_product(maker) and reader.contraction(maker) is None
    text = f"no pattern for it: {op_name(maker)} makes it of smaller values"
    return Refusal(Reason.NO_PATTERN, node, text, PRODUCT_ADVICE if mixes else "")


def why_entering(reader: Reader, node: Node) -> Refusal:
    """Return why no loop covers an input of the graph that is a value of other ops."""
    broken = reader.borders.break_before
    if broken:
        return Refusal(Reason.OTHER_GRAPH, node, f"made in another graph and read here, after a graph break: {broken}")
    return Refusal(Reason.OTHER_GRAPH, node, "made outside of the function that this graph holds, which reads it")


def _why_returned(reader: Reader, node: Node) -> Refusal:
    before, after = reader.borders.break_before, reader.borders.break_after
    if after:
        return Refusal(Reason.OTHER_GRAPH, node, f"made here and read in another graph, after a graph break: {after}")
    if before:
        return Refusal(Reason.OTHER_GRAPH, node, f"the part of the function after a graph break returns it: {before}")
    text = "the function that this graph holds returns it"
    return Refusal(Reason.OTHER_GRAPH, node, text, RETURNED_ADVICE)


def _is_returned(reader: Reader, node: Node) -> bool:
    shown = descendants([node], lambda value: filter(reader.is_view, value.users))
    return any(user.op == "output" for value in shown for user in value.users)


def _makers(reader: Reader, node: Node) -> tuple[Node, ...]:
    """Return the makers of a value, and the inputs and projections as large as it that it is made of, in graph order.

    Projections are the end, since what they read is tokens, whatever made these. A join of parts of values as large
    makes nothing larger: halves that are rotated, say.
    """
    size = reader.numel(node)

    def operands_of(value: Node, least: int) -> list[Node]:
        operands = (operand for operand in reader.tensor_operands(value) if not reader.is_learnt(operand))
        return [operand for operand in operands if reader.numel(operand) >= least]

    def as_large(value: Node) -> list[Node]:
        found = operands_of(value, size) if not _projects(reader, value, node) else []
        if found or not reader.does(value, JOINS):
            return found
        behind = [first_as_large(part) for part in operands_of(value, 0)]
        return [large for large in behind if large is not None] if all(behind) else []

    def first_as_large(part: Node) -> Node | None:
        near = walk([part], lambda value: operands_of(value, reader.numel(part)))
        return next((value for value in near if reader.numel(value) >= size), None)

    return in_order(reader.owner.graph, {value for value in walk([node], as_large) if not as_large(value)})


def _is_input(node: Node) -> bool:
    """Return whether a value comes from outside: into the graph, or from other ranks."""
    return node.op in ("placeholder", "get_attr") or moves_shards(node)


def _looks_up(reader: Reader, node: Node) -> bool:
    """Return whether a node picks rows of a parameter: on DTensors, whether it reads parameters and indices alone."""
    if strange_tensors(node) is None:
        return reader.does(node, LOOK_UPS)
    values = [operand for operand in reader.tensor_operands(node) if tensors_of(operand)[0].is_floating_point()]
    return bool(values) and all(map(reader.is_learnt, values))


def _projects(reader: Reader, value: Node, node: Node) -> bool:
    """Return whether a value is a projection of tokens that are as large as the node's value."""
    contraction = reader.contraction(value)
    return contraction is not None and reader.numel(contraction.activation) >= reader.numel(node)
