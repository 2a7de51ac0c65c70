"""The log-softmax of wide rows, and its denominator, in a form that compilers fuse better.

As written, a softmax and its readers become one kernel. It rescales its sum as it goes, with two exponentials for each
element, and cannot overwrite logits that it has yet to read again. Here one pass over the rows makes their sums, in
tiles that stay in registers; the rest is pointwise, and overwrites the logits.

Axes: V classes, at the end; P tiles of a row; any dims before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node, map_arg

aten = torch.ops.aten

TILE = 1024
"""Classes of a tile, which one block of threads reduces at once: the most that Inductor holds in registers."""
WIDE = 8 * TILE
LOG2_E = 1.4426950408889634


def reduces_wide_rows(node: Node) -> bool:
    """Return whether a node is the log-softmax, or its denominator, of rows of WIDE or more classes."""
    if node.target not in (aten._log_softmax.default, aten.logsumexp.default):
        return False
    x: Any = node.args[0]
    shape, dims = x.meta["val"].shape, node.args[1]
    (dim,) = dims if isinstance(dims, list | tuple) and len(dims) == 1 else (dims,)
    return dim in (-1, len(shape) - 1) and isinstance(shape[-1], int) and shape[-1] >= WIDE


def run_in_tiles(node: Node, env: Mapping[Node, Any]) -> torch.Tensor:
    """Return the value of such a node, reduced tile by tile; autograd takes the gradient from here, too."""
    x, _, *flags = map_arg(node.args, env.get)
    if node.target == aten._log_softmax.default:
        return _LogSoftmax.apply(x, flags[0])
    denominator = _LogSumExp.apply(x)
    return denominator if flags and flags[0] else denominator.squeeze(-1)


def exp(x: torch.Tensor) -> torch.Tensor:
    """Compute e**x: a product and one instruction on a GPU; a compiler's `exp` takes ten, for its last bit."""
    return torch.exp2(x * LOG2_E)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, half_to_float: bool) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top, log_sum = _row_statistics(wide)
        scores = (wide - top) - log_sum  # in this order, both differences are exact where one class is almost sure
        scores = scores if half_to_float else scores.to(logits.dtype)
        ctx.save_for_backward(scores)
        ctx.dtype = logits.dtype
        return scores

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (scores,) = ctx.saved_tensors
        wide = torch.promote_types(scores.dtype, torch.float32)
        grad = grad.to(wide)
        return (grad - exp(scores.to(wide)) * grad.sum(-1, keepdim=True)).to(ctx.dtype), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        top, log_sum = _row_statistics(wide)
        ctx.save_for_backward(x, top, log_sum)
        return (top + log_sum).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, top, log_sum = ctx.saved_tensors
        return (exp((x.to(top.dtype) - top) - log_sum) * grad.to(top.dtype)).to(x.dtype)


def _row_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest entry of each row, and the logarithm of the sum of exp(entry - largest); both [..., 1]."""
    tile = _tile_of(x.shape[-1])
    even = x.shape[-1] // tile * tile
    tiles = [_of_tiles(x[..., :even].unflatten(-1, (-1, tile)))]
    if even < x.shape[-1]:
        tiles.append(_of_tiles(x[..., even:].unsqueeze(-2)))
    tops, sums = (torch.cat(column, -1) for column in zip(*tiles, strict=True))
    top = _base(tops.amax(-1, keepdim=True))
    log_sum = (sums * exp(tops - top)).sum(-1, keepdim=True).log()
    return _buffer(top), _buffer(log_sum)


def _tile_of(classes: int) -> int:
    """Return the longest tile that divides the row: Inductor reduces in registers only contiguous memory."""
    return next((tile for tile in range(TILE, TILE // 8 - 1, -1) if classes % tile == 0), TILE)


def _of_tiles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest entry of each tile, and the sum of exp(entry - largest); both [..., P].

    All tiles are reduced as the rows of one matrix: Inductor pads the rows of a matrix that is wider than 1,024, and
    does not hold in registers what it writes with gaps.
    """
    rows = x.flatten(0, -2)
    tops = rows.amax(-1)
    sums = exp(rows - _base(tops).unsqueeze(-1)).sum(-1)
    return tops.view(x.shape[:-1]), sums.view(x.shape[:-1])


def _base(top: torch.Tensor) -> torch.Tensor:
    """Return what to subtract before the exponential: 0 where `top` is infinite, as in a masked tile."""
    return torch.where(top.abs() == torch.inf, 0, top)


def _buffer(x: torch.Tensor) -> torch.Tensor:
    """Return the same value as a buffer: otherwise Inductor computes it again for each entry of the row."""
    return torch.as_strided(x, x.shape, x.stride())
