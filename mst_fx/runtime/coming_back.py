"""When what the block before keeps comes back to the device: as late as the copy still hides behind computation.

A block's backward is at its peak in its last loop, or in attention's backward. What the block before keeps is asked for
behind that, unless too little is left to compute: then it comes while the whole block runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.flop_counter import flop_registry

from mst_fx.core.aten_ops import ATTENTION_GRADIENTS
from mst_fx.core.sizes import long_hint
from mst_fx.runtime import offload_ops as offload_ops
from mst_fx.runtime.loop_operator import mini_sequence_loop

ops = torch.ops.mst_fx

FLOPS_A_BYTE = 12_000
"""Flops of products that hide the copy of a byte: an H100 does 600 Tflop/s, and PCIe 5 brings 50 GB/s."""

HEAVY = (mini_sequence_loop, *ATTENTION_GRADIENTS.values())

AHEAD = 5
"""The argument of `to_device` that says whether what the block before keeps is asked for, too."""


def ask_late(graph: Graph, blocks: Sequence[Sequence[Node]]) -> None:
    """Let each block ask for what the one before keeps, where its own backward has the worst behind it.

    Args:
        graph: of a backward.
        blocks: for each block, in the order of the backward, the nodes that bring back what it keeps.
    """
    nodes = list(graph.nodes)
    starts = [min(map(nodes.index, block)) for block in blocks]
    for block, start, end in zip(blocks, starts, [*starts[1:], len(nodes)], strict=True):
        heavy = [node for node in nodes[start:end] if node.target in HEAVY]
        results = [user for user in heavy[-1].users if user.target is operator.getitem] if heavy else []
        if not results or not hides(block, nodes[nodes.index(heavy[-1]) : end]):
            continue
        for node in block:
            node.update_arg(AHEAD, False)
        with graph.inserting_after(results[0]):
            graph.call_function(ops.ask_ahead.default, (results[0], block[0].args[0]))


def hides(block: Sequence[Node], behind: Sequence[Node]) -> bool:
    """Return whether these nodes compute for as long as it takes to copy what a block keeps: blocks are much alike."""
    size = sum(long_hint(node.meta["val"].numel()) * node.meta["val"].element_size() for node in block)
    return sum(map(_flops, behind)) >= FLOPS_A_BYTE * size


def _flops(node: Node) -> int:
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None or node.target in HEAVY:
        return 0
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    flops: Any = formula(*args, **kwargs, out_val=node.meta["val"])
    return long_hint(flops)
