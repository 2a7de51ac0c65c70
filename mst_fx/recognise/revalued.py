"""Fake values of a traced graph that say whether they need a gradient: a trace is made without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only

from mst_fx.capture.lower import tracing
from mst_fx.capture.run_node import execute
from mst_fx.core.clean_room import without_autocast
from mst_fx.recognise.region import Region


def revalued(module: GraphModule, region: Region, examples: Sequence[Any]) -> GraphModule:
    """Return the module, whose nodes have such values where the region records gradients.

    Args:
        module: an aten graph that computes what the region does.
        region: the region.
        examples: fake values for the placeholders of the graph.
    """
    if not any(mode.grad for mode in region.modes.values()):
        return module
    env: dict[Node, Any] = {}
    given = iter([tree_map_only(torch.Tensor, _leaf, example) for example in examples])
    with tracing(examples), without_autocast(), torch.enable_grad():
        for node in module.graph.nodes:
            if node.op != "output":
                env[node] = next(given) if node.op == "placeholder" else execute(module, node, env)
                node.meta["val"] = env[node]
    return module


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """Return an alias without a history: a write to what it is a view of may have made that unreadable."""
    return value.detach().requires_grad_(value.requires_grad)
