"""Checkpointed blocks that stand side by side: they read the same activation, and none waits for another.

Nothing but their gradients puts them in turn. So a compiler fuses over all of them what reads that activation, and goes
on from there: backward recomputes a part of each before it is through with the first one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from mst_fx.core.graph_walk import descendants
from mst_fx.core.values import has_gradient, tensors_of


def side_by_side(callers: Iterable[Node]) -> dict[Node, int]:
    """Return which blocks are side by side: a number for each, by the node that runs it; none for a block alone.

    Args:
        callers: the nodes of one graph that run checkpointed blocks.
    """
    groups: list[list[Node]] = []
    behind: dict[Node, set[Node]] = {}
    for caller in sorted(callers):
        read = _activations(caller)
        for group in groups:
            shared = any(not read.isdisjoint(_activations(other)) for other in group)
            if shared and not any(caller in behind.setdefault(other, descendants([other])) for other in group):
                group.append(caller)
                break
        else:
            groups.append([caller])
    return {caller: number for number, group in enumerate(groups) for caller in group if len(group) > 1}


def _activations(caller: Node) -> set[Node]:
    operands = (node for node in caller.all_input_nodes if has_gradient(node))
    return {node for node in operands if not any(isinstance(x, torch.nn.Parameter) for x in tensors_of(node))}
