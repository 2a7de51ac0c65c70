"""Which results of a loop may be written over an operand: the chunks of both lie at the same places of their memory.

In backward, the gradient of the tokens may take the place of the tokens, and that of the queries the place of what
attention gave: a chunk is read before its gradient is written, and no other chunk reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch

from mst_fx.core.sizes import sure
from mst_fx.runtime.result_kinds import Axis, Cat, Rows, kind_of


def overwritable(
    outs: Sequence[tuple[Any, ...]],
    ins: Sequence[Axis | None],
    results: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
) -> Iterator[tuple[int, int]]:
    """Yield pairs of a result and an operand whose memory it may take, if nobody reads the operand after the loop.

    Args:
        outs: literals of the results, as in `LoopSpec`.
        ins: axes of the operands, as in `LoopSpec`.
        results: fake values.
        operands: fake values.
    """
    for number, (literal, result) in enumerate(zip(outs, results, strict=True)):
        kind = kind_of(literal)
        if not isinstance(kind, Cat | Rows):
            continue
        for position, (axis, operand) in enumerate(zip(ins, operands, strict=True)):
            if axis is not None and operand.dtype == result.dtype and sure(operand.numel() == result.numel()):
                own, other = _around(kind.axis, result.shape), _around(axis, operand.shape)
                if all(sure(a == b) for a, b in zip(own, other, strict=True)):
                    yield number, position


def _around(axis: Axis, shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of elements in one position of an axis that lie together, and how often such pieces recur."""
    dim, outer, inner = axis
    return inner * prod(shape[dim + 1 :]), prod(shape[:dim]) * outer
