"""A projection whose logits are read in pieces becomes one whose logits are read as a whole (see `joined_pieces`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from mst_fx.capture.lower import apart, lower
from mst_fx.capture.run_node import brings_gradients
from mst_fx.core.aten_ops import JOINS, SELECTS, SLICES
from mst_fx.core.faults import refusal_for
from mst_fx.core.graph_walk import walk
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import sure
from mst_fx.core.values import bytes_of, fake_value, tensors_of
from mst_fx.recognise.joined_pieces import joined
from mst_fx.recognise.pieces import Apart
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close
from mst_fx.recognise.revalued import revalued


@dataclass(frozen=True)
class JoinedHead:
    """A projection whose logits are read in pieces.

    Attributes:
        region: the projection, and what reads its logits and its pieces.
        whole: the aten graph that computes the same from the logits as a whole.
        bytes: bytes of the logits.
    """

    region: Region
    whole: GraphModule
    bytes: int


def joined_heads(reader: Reader, *, strict: bool = False) -> Iterator[JoinedHead | Refusal]:
    """Yield the projections of the graph whose pieces can be joined, and a refusal for each whose pieces cannot.

    Args:
        reader: reads the graph.
        strict: raise exceptions, and make no refusals of them.
    """
    taken = set[Node]()
    for node in reader.owner.graph.nodes:
        if node in taken:
            continue
        try:
            head = _joined_head(reader, node, taken)
        except Apart as parts:
            yield Refusal(Reason.AXIS_MIXED, node, f"the logits of {op_name(node)} are read in pieces: {parts}")
        except Refusal:
            continue  # the pattern of heads says more about it
        except Exception as error:
            yield refusal_for(error, node, "pieces of logits", strict=strict)
        else:
            if head is not None:
                taken.update(head.region.nodes)
                yield head


def _joined_head(reader: Reader, node: Node, taken: Collection[Node]) -> JoinedHead | None:
    """Return the projection that a node is, with its pieces joined; None where it is none or has no pieces.

    None as well where its pieces meet those of another projection, whose nodes are taken.

    Raises:
        Apart: it has pieces that cannot be joined.
        Refusal: what reads the logits cannot be lowered.
    """
    contraction = reader.widening(node)
    if contraction is None or len(tensors_of(node)) != 1:
        return None
    inside = _readers(reader, node)
    if any(map(brings_gradients, inside)) or not any(_cuts(reader.ops(user) or set()) for user in inside):
        return None
    region = close(reader, inside, contraction.activation)
    if any(each in taken for each in region.nodes):
        return None
    examples = apart([fake_value(live_in) for live_in in region.live_ins])
    lowered = lower(reader.owner, region.nodes, region.live_ins, region.outputs, region.modes, examples=examples)
    whole = joined(lowered, examples)
    if whole is None:
        return None
    return JoinedHead(region, revalued(whole, region, examples), bytes_of(tensors_of(node)[0]))


def _readers(reader: Reader, head: Node) -> set[Node]:
    """Return the projection, all readers of values with as many classes, and what joins the values that they give."""
    (logits,) = tensors_of(head)
    classes = logits.shape[-1]

    def goes_on(node: Node) -> list[Node]:
        wide = any(value.dim() > 1 and sure(value.shape[-1] == classes) for value in tensors_of(node))
        readers = (user for user in node.users if wide or node is head or reader.does(user, JOINS))
        return [user for user in readers if _may_join(reader, user)]

    return set(walk([head], goes_on))


def _may_join(reader: Reader, node: Node) -> bool:
    computes = node.op.startswith("call_") and not reader.multiplies(node) and not reader.written_by(node)
    return computes and reader.obstacle(node) is None


def _cuts(ops: set[object]) -> bool:
    return not ops.isdisjoint((*SLICES, *SELECTS))
