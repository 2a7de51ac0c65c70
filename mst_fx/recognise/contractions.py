"""Products of an activation and a weight, and facts about values by which they are told."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Node

from mst_fx.capture.decomposed import Decomposed
from mst_fx.core.graph_walk import ancestors
from mst_fx.core.sizes import hint, sure
from mst_fx.core.values import fake_value, tensors_of
from mst_fx.placement.rules.contraction import factors

RANKS = "mst_fx_ranks"
"""The key of a node's meta that holds the number of ranks on which parts of its value lie, of which it is one."""


@dataclass(frozen=True)
class Contraction:
    """activation [.., n, k] times weight [k, m] or [m, k], or times one such matrix for each group, [g, k, m].

    A convolution whose kernel is one position wide is such a product, too; its weight is [m, k, 1, ..].
    """

    activation: Node
    weight: Node
    grouped: bool = False


def numel(node: Node) -> int:
    """Return the number of elements of a node's captured value; for a tuple, the sum over its tensors.

    Those of a shard are counted on all ranks: an MLP is one, however many ranks share its features.
    """
    return sum(map(size_of, tensors_of(node))) * int(node.meta.get(RANKS, 1))


def size_of(value: torch.Tensor) -> int:
    """Return the number of elements of a value."""
    return prod(map(hint, value.shape))


def operand_of(node: Node, decomposed: Decomposed, arg: Any) -> Node | None:
    """Return the operand of the node that a factor of the product is made of, the largest of several."""
    if not isinstance(arg, Node):
        return None
    positions = {decomposed.position_of[made] for made in ancestors([arg]) if made in decomposed.position_of}
    operands = [node.all_input_nodes[position] for position in sorted(positions)]
    return max(operands, key=numel, default=None)


def is_made_of_two(decomposed: Decomposed, product: Node) -> bool:
    """Return whether each factor of a product is made of one operand."""
    made_of = [ancestors([factor]) & decomposed.position_of.keys() for factor in factors(product)]
    return all(len(each) == 1 for each in made_of)


def rank_of(node: Node) -> int:
    """Return the number of dims of a node's captured value, -1 where it is no tensor."""
    value = fake_value(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


def is_matrix(node: Node) -> bool:
    """Whether a value has rows and columns, and no more: a kernel that is one position wide has."""
    return rank_of(node) >= 2 and all(sure(size == 1) for size in fake_value(node).shape[2:])


def is_input(node: Node) -> bool:
    """Return whether a value comes into the graph."""
    return node.op in ("placeholder", "get_attr")


def is_one_of_several(node: Node) -> bool:
    """Return whether the node picks one of the values of its operand."""
    return node.target is operator.getitem and not isinstance(fake_value(node.all_input_nodes[0]), torch.Tensor)


def is_weight(node: Node) -> bool:
    """Return whether a node is a matrix that comes into the graph, or a view or cast of one."""
    if not is_matrix(node):
        return False
    return is_input(node) or (len(node.all_input_nodes) == 1 and is_weight(node.all_input_nodes[0]))
