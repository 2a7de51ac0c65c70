"""Which ops the model of memory does not know: what they allocate besides operands and results is in no prediction."""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import has_known_memory
from mst_fx.core.provenance import op_name
from mst_fx.core.sizes import Hint, is_size
from mst_fx.core.values import bytes_of, tensors_of
from mst_fx.recognise.reader import Reader


def unknown_in(reader: Reader, node: Node) -> str:
    """Return the first op in a node that the model of memory does not know, "" where it knows all of them.

    A compiler does not fuse such an op, and calls a library or a kernel of the user's. A node that cannot be decomposed
    is unknown as a whole.
    """
    if not node.op.startswith("call_") or not tensors_of(node) or reader.is_view(node):
        return ""
    decomposed = reader.decomposed(node)
    if decomposed is None:
        return op_name(node)
    ops = (*decomposed.ops, *decomposed.backward)
    computing = (op for op in ops if op.op == "call_function" and not is_size(op.meta.get("val")))
    return next((op_name(op) for op in computing if not has_known_memory(op.target)), "")


def bytes_around(node: Node, at: Hint) -> int:
    """Return the bytes that a node reads and makes, without parameters: those that predictions count."""
    read = [x for operand in node.all_input_nodes for x in tensors_of(operand)]
    given = [x for x in read if not isinstance(x, torch.nn.Parameter)]
    return sum(bytes_of(x, at) for x in (*given, *tensors_of(node)))
