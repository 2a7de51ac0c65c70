"""Ops of other libraries are opened to what they compute on any device, where that is a matrix product.

Such an op (a product with a 4-bit weight) says how tokens go into its result only by the kernel that its library has
registered for all devices. Other ops stay closed: a kernel of their own unpacks a weight faster than aten ops do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from mst_fx.core.aten_ops import CONTRACTIONS, is_mutable, is_random
from mst_fx.core.torch_private.collectives import is_collective
from mst_fx.core.torch_private.operators import has_kernel_for_all_devices, kernel_for_all_devices
from mst_fx.core.torch_private.tracing import make_fx
from mst_fx.placement.rules import rule_for

log = logging.getLogger("mst_fx")
OF_TORCH = ("aten", "prims", "prim", "mst_fx")


def openings(graph: Graph) -> dict[Any, Callable[..., Any]]:
    """Return decompositions of the ops in an aten graph that can be opened, by op."""
    closed = {node.target: node for node in graph.nodes if _has_kernel(node.target)}
    return {op: kernel_for_all_devices(op) for op, node in closed.items() if _multiplies(node)}


def _has_kernel(op: object) -> bool:
    """Return whether an op of another library has no rule, but a kernel for all devices.

    Kernels of collectives communicate even in a trace: the pass never runs them.
    """
    if not isinstance(op, torch._ops.OpOverload) or op.namespace in OF_TORCH or is_collective(op):
        return False
    if rule_for(op) is not None or is_mutable(op) or is_random(op):
        return False
    return has_kernel_for_all_devices(op)


def _multiplies(node: Node) -> bool:
    """Return whether the kernel of an op can be traced, and multiplies matrices."""
    op: Any = node.target
    given = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    leaves, tree = tree_flatten(given)
    positions = [position for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> Any:
        filled = dict(zip(positions, tensors, strict=True))
        args, kwargs = tree_unflatten([filled.get(position, leaf) for position, leaf in enumerate(leaves)], tree)
        return op(*args, **kwargs)

    try:
        graph = make_fx(run, {op: kernel_for_all_devices(op)})(*(leaves[position] for position in positions)).graph
    except Exception as error:  # the kernel of another library may do anything
        log.debug("mst_fx: %s stays closed: %s", op, error)
        return False
    return any(made.target in CONTRACTIONS for made in graph.nodes)
