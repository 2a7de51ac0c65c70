"""Layouts of captured values behind attention on the device "meta": those of a GPU.

torch has captured attention as products there, whose result lies head by head. A kernel's result lies token by token,
as its operands do, so that joining the heads again copies nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.attention_on_meta import SPELLINGS
from mst_fx.capture.lower import tracing
from mst_fx.capture.run_node import execute
from mst_fx.core.values import fake_value
from mst_fx.placement.placement import same_shape

log = logging.getLogger("mst_fx")


def settle_layouts(gm: GraphModule) -> None:
    """Give captured values on "meta", and those of subgraphs, the layouts that a GPU's attention and what follows have.

    Only what the graph says of its values changes, not its nodes.
    """
    for module in gm.modules():
        if isinstance(module, GraphModule):
            _settle(module)


def _settle(owner: GraphModule) -> None:
    changed: dict[Node, torch.Tensor] = {}
    for node in owner.graph.nodes:
        value = fake_value(node)
        if not isinstance(value, torch.Tensor) or value.device.type != "meta":
            continue
        if node.target in SPELLINGS or not changed.keys().isdisjoint(node.all_input_nodes):
            env = {operand: changed.get(operand, fake_value(operand)) for operand in node.all_input_nodes}
            made = _run(owner, node, env)
            if made is not None and (not same_shape(made.stride(), value.stride()) or _views(made, env)):
                changed[node] = made.detach().requires_grad_(value.requires_grad)
    for node, value in changed.items():
        node.meta["example_value"] = value


def _run(owner: GraphModule, node: Node, env: Mapping[Node, Any]) -> torch.Tensor | None:
    """Return what a node makes of these operands; None where it cannot be run alone."""
    try:
        with tracing(list(env.values())):
            made = execute(owner, node, env)
    except Exception as error:  # the user's function may do anything
        log.debug("mst_fx: %s keeps the layout that was captured: %s", node, error)
        return None
    return made if isinstance(made, torch.Tensor) else None


def _views(made: torch.Tensor, env: Mapping[Node, Any]) -> bool:
    """Return whether a value lies in the memory of an operand."""
    return any(made.untyped_storage() == x.untyped_storage() for x in env.values() if isinstance(x, torch.Tensor))
