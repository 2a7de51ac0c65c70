"""Nodes of a captured graph are decomposed into aten ops: one of each kind, where that can be done."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.decomposed import Decomposed, decompose_alone, decompose_together
from mst_fx.capture.fingerprint import likeness_of_node
from mst_fx.capture.run_node import is_custom_function
from mst_fx.core.graph_modules import operands_read
from mst_fx.core.modes import Mode
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.captured import is_transformed
from mst_fx.core.values import fake_value, is_fake, is_sharded, is_wrapper, tensors_of
from mst_fx.ops.shards import crosses, leave
from mst_fx.recognise.effects import writes, written_by

STAYS = "mst_fx_stays"
"""The key of a node's meta that holds why it has to stay on DTensors, "" if it need not (see `local_shards`)."""
MOVES_SHARDS = ("from_local", "redistribute", "to_local", "full_tensor")
"""What makes DTensors, or plain tensors of them, and computes nothing; by the names that DTensors have for it."""


def decomposed_nodes(
    owner: GraphModule, known: dict[Hashable, Decomposed | None], modes: Mapping[Node, Mode] | None = None
) -> dict[Node, Decomposed | None]:
    """Return the aten ops of each node that may be decomposed; None for a node that was tried in vain.

    Args:
        owner: the module that holds the graph.
        known: earlier decompositions, by the kind of node; one node of each missing kind is decomposed and added.
        modes: of the nodes; None where each runs in no mode of its own.
    """
    keys = {node: likeness_of_node(node) for node in owner.graph.nodes if _can_be_decomposed(node)}
    first = {key: node for node, key in reversed(keys.items()) if key not in known}
    for key, node in first.items():
        if writes(node):
            known[key] = decompose_alone(owner, node, _value_holder(node) or node)
    pure = [node for node in first.values() if not writes(node)]
    known.update({keys[node]: decomposed for node, decomposed in decompose_together(owner, pure).items()})
    for node, key in keys.items():
        autocast = modes[node].autocast if modes is not None else ()
        if autocast and not writes(node) and _is_unknown(known[key]):  # attention takes operands of one dtype
            keys[node] = (key, autocast)
            if keys[node] not in known:
                known[keys[node]] = decompose_alone(owner, node, node, Mode(autocast=autocast))
    return {node: known[key] for node, key in keys.items()}


def _is_unknown(found: Decomposed | None) -> bool:
    return found is None or not found.understood


def reshapes_in_place(node: Node) -> bool:
    """Return whether a node gives a value another shape in place, or other strides."""
    packet = getattr(torch.ops.aten, str(node.target), None) if node.op == "call_method" else None
    if packet is None or not writes(node):
        return False
    return any(torch.Tag.inplace_view in getattr(packet, overload).tags for overload in packet.overloads())


def _can_be_decomposed(node: Node) -> bool:
    """Return whether to try to decompose a node.

    A node without tensors is there for its effect (autocast, ...); a transform's values mean nothing outside of it.
    """
    calls = node.op in ("call_function", "call_method", "call_module")
    is_operator = isinstance(node.target, torch._ops.HigherOrderOperator) and not is_custom_function(node)
    if not calls or is_operator or (is_custom_function(node) and writes(node)) or reshapes_in_place(node):
        return False
    if strange_tensors(node) is not None or any(map(is_transformed, _near(node))):
        return False
    has_values = all(fake_value(operand) is not None for operand in operands_read(node))
    return has_values and any(map(tensors_of, (node, *node.all_input_nodes)))


def strange_tensors(node: Node) -> Refusal | None:
    """Return a refusal of a node that reads or makes DTensors, or other tensors of tensors: its ops are unknown."""
    values = [value for value in _near(node) if not is_fake(value)]
    if any(map(is_sharded, values)):
        if node.target is leave or node.meta.get(STAYS) == "":  # what reads it has to stay
            node = next((user for user in node.users if user.meta.get(STAYS)), node)
        why = f" and {node.meta[STAYS]}" if node.meta.get(STAYS) else ""
        return Refusal(Reason.SHARDED, node, f"{op_name(node)} works on DTensors{why}")
    for value in values:
        if value.is_nested or is_wrapper(value):
            return Refusal(Reason.SUBCLASS, node, f"{op_name(node)} works on values of {type(value).__name__}")
    return None


def moves_shards(node: Node) -> bool:
    """Return whether a node is there for DTensors alone, and computes nothing that a loop could take."""
    name = str(getattr(node.target, "__name__", node.target))
    return crosses(node.target) or any(moves in name for moves in MOVES_SHARDS)


def _near(node: Node) -> list[torch.Tensor]:
    return [x for near in (node, *node.all_input_nodes) for x in tensors_of(near)]


def _value_holder(node: Node) -> Node | None:
    """Return the node whose value tells what a node does: itself, or the operand that it writes to."""
    return node if tensors_of(node) else next(iter(written_by(node)), None)
