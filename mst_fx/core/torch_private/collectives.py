"""Ops that communicate between ranks; what communicates otherwise is named by its namespace.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from typing import Any

import torch

if torch.distributed.is_available():
    from torch._C._distributed_c10d import _resolve_process_group

NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor", "symm_mem")
"""Namespaces of ops that communicate."""


def _found(*names: str) -> tuple[Any, ...]:
    packets = (getattr(torch.ops._c10d_functional, name, None) for name in names)
    return tuple(packet.default for packet in packets if packet is not None)


REDUCE_ALL = _found("all_reduce")
"""The same element of all ranks, reduced, on every rank."""
WAITS = _found("wait_tensor")
"""The operand, once it has arrived."""
GATHERS = _found("all_gather_into_tensor")
"""The operands of all ranks, one after the other along dim 0."""
REDUCE_PARTS = _found("reduce_scatter_tensor")
"""As many parts of dim 0 as there are ranks, reduced: one part on each rank."""
EXCHANGES = _found("all_to_all_single")
"""A part of dim 0 for each rank, and the parts that the ranks have for this one, one after the other."""
COLLECTIVES = (*REDUCE_ALL, *WAITS, *GATHERS, *REDUCE_PARTS, *EXCHANGES)


def ranks_in(group: Any) -> int:
    """Return the number of ranks of a group, given as an op has it: by its name, or itself."""
    resolve: Any = _resolve_process_group
    return int((resolve(group) if isinstance(group, str) else group).size())


def is_collective(op: object) -> bool:
    """Return whether an op communicates."""
    return isinstance(op, torch._ops.OpOverload) and op.namespace in NAMESPACES
