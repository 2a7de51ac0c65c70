"""Dead code leaves the captured graph: compilers leave it out, too, and no gradient comes back from it."""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import GraphModule, Node

from mst_fx.capture.decomposed import Decomposed
from mst_fx.core.modes import Mode
from mst_fx.core.provenance import Borders
from mst_fx.core.values import storages_of, tensors_of
from mst_fx.recognise.effects import writes
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.rebuild import rebuilt


def without_dead_code(
    gm: GraphModule, known: dict[Hashable, Decomposed | None], outer: Mode, borders: Borders
) -> Reader:
    """Return a reader of the graph without the values and the writes that nobody reads, if they do nothing else.

    Args:
        gm: the graph; it stays as it is, and is read itself where nothing in it is in the way.
        known: earlier decompositions, as for `Reader`.
        outer: the mode that the graph runs in.
        borders: as for `Reader`.
    """
    reader, dead = Reader(gm, known, outer, borders), set[Node]()
    if not any(_is_unread(node, dead) for node in gm.graph.nodes):
        return reader
    read = set().union(*(storages_of(node) for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")))
    for node in reversed(gm.graph.nodes):
        written = [storages_of(target) for target in reader.written_by(node)]
        lost = all(storages and storages.isdisjoint(read) for storages in written)
        lost &= node not in reader.data_writes  # the backward may read it: an op may have saved this memory
        if _is_unread(node, dead) and lost and reader.is_known(node):
            dead.add(node)
        else:
            read.update(*map(storages_of, node.all_input_nodes))
    if not any(writes(node) or _reads_floats(node) for node in dead):
        return reader  # no dead node is in a region's way: not worth a copy
    return Reader(rebuilt(gm, [], dead=dead), known, outer, borders)


def _reads_floats(node: Node) -> bool:
    return any(tensor.is_floating_point() for operand in node.all_input_nodes for tensor in tensors_of(operand))


def _is_unread(node: Node, dead: set[Node]) -> bool:
    computes = node.op.startswith("call_") and (bool(tensors_of(node)) or writes(node))
    return computes and dead.issuperset(node.users)
