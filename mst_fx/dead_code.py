"""A captured graph without what nobody reads: compilers leave it out, and no gradient comes back from it."""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import GraphModule, Node

from mst_fx.opened import Opened
from mst_fx.reading import Reader, tensors_of, writes
from mst_fx.rewrite import rebuilt


def without_dead_code(gm: GraphModule, known: dict[Hashable, Opened | None]) -> GraphModule:
    """The graph without the values that nobody reads and that do nothing else; itself where there are none.

    Args:
        gm: stays as it is.
        known: what was opened before, as for `Reader`.
    """
    if not any(_is_unread(node, set()) for node in gm.graph.nodes):
        return gm
    reader, dead = Reader(gm, known), set[Node]()
    for node in reversed(gm.graph.nodes):
        if _is_unread(node, dead) and reader.is_pure(node):
            dead.add(node)
    return rebuilt(gm, [], dead=dead) if dead else gm


def _is_unread(node: Node, dead: set[Node]) -> bool:
    computes = node.op.startswith("call_") and bool(tensors_of(node)) and not writes(node)
    return computes and dead.issuperset(node.users)
