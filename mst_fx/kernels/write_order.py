"""The values of one kernel in an order in which they may overwrite what it reads.

A kernel that makes several values from the same operands holds all of them at once: a compiler lets a value overwrite
an operand only where no other value of the kernel reads it. Written one behind the other, the last one that reads an
operand may: the backward of a gated MLP holds four wide values in place of six, for no more traffic.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mst_fx.core.aten_ops import UNFUSED
from mst_fx.core.graph_modules import copied
from mst_fx.kernels.liveness import chains


def products_late(module: GraphModule) -> None:
    """Put whatever is fused in front of the matrix products that do not need to run before it, in place.

    Else a product that reads one value of a kernel stands in front of another value of it, and there is no order in
    which the kernel's values may be written one behind the other.
    """
    graph = module.graph
    waiting = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    unplaced = set(waiting)
    end = graph.output_node()
    while waiting:
        ready = (node for node in waiting if unplaced.isdisjoint(node.all_input_nodes))
        first = next(ready)
        node = next((node for node in (first, *ready) if node.target not in UNFUSED), first)
        end.prepend(node)
        waiting.remove(node)
        unplaced.remove(node)
    module.recompile()


def behind(value: object, earlier: object) -> object:
    """The value, written when `earlier` has been written; the order is the lowering's to keep."""
    return value


def let_overwrite(module: GraphModule) -> GraphModule:
    """A copy of an aten graph whose kernels write their values in an order that lets them overwrite.

    Args:
        module: nodes carry fake values in `meta["val"]`, of sizes that are known.
    """
    module = copied(module)
    for chain in chains(module):
        earlier = chain[0]
        for node in chain[1:]:
            earlier = _put_behind(node, earlier)
    module.recompile()
    return module


def _put_behind(node: Node, earlier: Node) -> Node:
    place = max(node, earlier)
    late = [user for user in node.users if user > place]
    with node.graph.inserting_after(place):
        ordered = node.graph.call_function(behind, (node, earlier))
    ordered.meta = {"val": node.meta["val"]}
    for user in late:
        user.replace_input_with(node, ordered)
    return ordered
