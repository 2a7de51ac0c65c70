"""The values of one kernel, in an order in which they can overwrite what it reads.

A kernel that makes several values from the same operands holds all of them at once: a compiler lets a value overwrite
an operand only where no other value of the kernel reads it. If the values are written one after the other, the last
reader of an operand can overwrite it: the backward of a gated MLP holds four wide values in place of six, for no more
traffic.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mst_fx.core.aten_ops import UNFUSED
from mst_fx.core.graph_modules import copied
from mst_fx.kernels.liveness import chains


def products_late(module: GraphModule) -> None:
    """Move matrix products back, after all fused ops that do not need them; this changes the module.

    Otherwise a product that reads one value of a kernel may stand before another value of that kernel, and the kernel's
    values cannot be written one after the other.
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


def written_after(value: object, previous: object) -> object:
    """Return the value; the lowering of this call writes it after `previous`."""
    return value


def let_overwrite(module: GraphModule) -> GraphModule:
    """Copy an aten graph, and let its kernels write their values in an order that lets them overwrite.

    Args:
        module: the graph; its nodes hold fake values in `meta["val"]`, of known sizes.
    """
    module = copied(module)
    for chain in chains(module):
        previous = chain[0]
        for node in chain[1:]:
            previous = _put_after(node, previous)
    module.recompile()
    return module


def _put_after(node: Node, previous: Node) -> Node:
    place = max(node, previous)
    late = [user for user in node.users if user > place]
    with node.graph.inserting_after(place):
        call = node.graph.call_function(written_after, (node, previous))
    call.meta = {"val": node.meta["val"]}
    for user in late:
        user.replace_input_with(node, call)
    return call
