"""Which dim of the stream is the axis: the longest one whose positions every op keeps apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from mst_fx.core.aten_ops import ATTENTIONS, CONTRACTIONS, VIEWS
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import hint, is_symbolic
from mst_fx.core.values import bytes_made
from mst_fx.placement.placement import WHOLE, Split, split_of
from mst_fx.placement.propagate import Placements, Unequal, propagate
from mst_fx.placement.rules import Spans, shape_of


@dataclass(frozen=True)
class Choice:
    """An axis whose positions every op keeps apart.

    Attributes:
        axis: the split of the stream.
        placements: the placements that follow from it.
        length: positions of the axis, as `hint` tells.
        avoided: bytes of the split values that need not exist at once, with chunks of one position.
    """

    axis: Split
    placements: Placements
    length: int
    avoided: float


def choose_axis(graph: Graph, stream: Node, *, tokens_whole: bool = False) -> Choice:
    """Return the longest axis that every op keeps apart and that avoids at least half of the bytes of the best one.

    Args:
        graph: an aten graph.
        stream: the placeholder whose dims, and factors of dims, are tried as the axis.
        tokens_whole: whether the stream is a weight, and the tokens are whole.

    Raises:
        Refusal: no dim of the stream can be split; the reason is that of the longest one.
        Unequal: two sizes have to be made equal first.
    """
    shape = shape_of(stream)
    candidates = [Split(dim) for dim in _splittable(stream, shape)]
    refusals: list[tuple[int, Refusal | Unequal]] = []
    found: list[Choice] = []
    seen: set[Split] = set()
    while candidates:
        axis = candidates.pop()
        length = axis.axis_length(shape)
        if axis in seen or hint(length) < 2:
            continue
        seen.add(axis)
        try:
            choice = _chosen(graph, stream, axis)
            if tokens_whole:
                _forbid_second_pass(choice.placements)
            found.append(choice)
        except (Refusal, Unequal) as refusal:
            if not _is_last(axis, shape) or is_symbolic(length):  # most ops mix features
                refusals.append((0 if tokens_whole and axis.inner == 1 else hint(length), refusal))
        except Spans as spans:
            factors = [pair for pair in spans.factors if not any(map(is_symbolic, pair))]
            candidates += [Split(axis.dim, axis.outer * outer, axis.inner * inner) for outer, inner in factors]
            text = f"{spans.node.target} spreads the split dim over several dims"
            refusals.append((0, Refusal(Reason.AXIS_MIXED, spans.node, text)))
    if found:
        most = max(choice.avoided for choice in found)
        good = (choice for choice in found if 2 * choice.avoided >= most)
        return max(good, key=lambda choice: (choice.length, -choice.axis.dim))
    if refusals:
        raise max(refusals, key=lambda entry: entry[0])[1]
    raise Refusal(Reason.SHAPE, stream, f"a stream of shape {list(shape)} has no dim to split")


def _chosen(graph: Graph, stream: Node, axis: Split) -> Choice:
    placements = propagate(graph, {stream: axis})
    shape = shape_of(stream)
    if _is_last(axis, shape):
        _forbid_features(graph, placements, axis)
    length = hint(axis.axis_length(shape))
    values = [node for node in placements.of if node.op == "call_function" and node.target not in VIEWS]
    split = sum(bytes_made(node) for node in values if split_of(placements.of[node]) is not None)
    return Choice(axis, placements, length, split * (1 - 1 / length))


def _forbid_second_pass(placements: Placements) -> None:
    """Raise a refusal where a product waits for a sum: that of weights and tokens adds up over the axis."""
    for node in placements.epilogue:
        if node.target in (*CONTRACTIONS, *ATTENTIONS):
            raise Refusal(Reason.AXIS_MIXED, node, f"{node.target} reads a sum over the axis")


def _is_last(axis: Split, shape: tuple[int, ...]) -> bool:
    return axis.dim == len(shape) - 1 > 0


def _forbid_features(graph: Graph, placements: Placements, axis: Split) -> None:
    """Raise a refusal where the last dim holds features: no product of the stream keeps its positions apart."""
    products = [node for node in graph.nodes if node.target in CONTRACTIONS]
    streamed = [node for node in products if placements.of.get(node) != WHOLE]
    for node in streamed:
        if not isinstance(placements.of.get(node), Split):
            raise Refusal(Reason.AXIS_MIXED, node, f"{node.target} adds up over dim {axis.dim}")
    if not streamed:
        output = graph.output_node()
        raise Refusal(Reason.AXIS_MIXED, output, f"no product keeps the positions of dim {axis.dim} apart")


def _splittable(stream: Node, shape: tuple[int, ...]) -> list[int]:
    """Return every dim; where one size is only known at run time, that dim alone."""
    dynamic = [dim for dim in range(len(shape)) if is_symbolic(shape[dim])]
    if len(dynamic) > 1:
        raise Refusal(Reason.DYNAMIC, stream, f"several dims of {list(shape)} are only known at run time")
    return dynamic or list(range(len(shape)))
