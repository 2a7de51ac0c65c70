"""Several products of the same tokens, of which only the gradients count; that of the tokens adds up in place.

Autograd makes a gradient of the tokens for each product, and then their sum: all are alive at once.

Axes: T tokens, K features of the tokens, N features of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import mm_flop, register_flop_formula

aten = torch.ops.aten


def projected(x_TK: torch.Tensor, *weights_KN: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return values that stand for the products of tokens and weights: nobody reads them, but they have gradients."""
    return _Projected.apply(x_TK, *weights_KN)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, *weights_KN: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x_TK, *weights_KN)
        return tuple(x_TK.new_empty((x_TK.shape[0], w.shape[1]), dtype=w.dtype) for w in weights_KN)

    @staticmethod
    def backward(ctx: Any, *grads_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TK, *weights_KN = ctx.saved_tensors
        first, *others = ctx.needs_input_grad
        pairs = zip(grads_TN, others, strict=True)
        grads_KN = [aten.mm.default(x_TK.t(), grad) if needed else None for grad, needed in pairs]
        total = sum_of_products(list(grads_TN), [w.t() for w in weights_KN]) if first else None
        return total, *grads_KN


@torch.library.custom_op("mst_fx::sum_of_products", mutates_args=())
def sum_of_products(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """Return left[0] @ right[0] + left[1] @ right[1] + ..., each added to the memory of the first.

    Args:
        left: matrices [T, N], each with its own N.
        right: matrices [N, K].
    """
    total = torch.mm(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total.addmm_(a, b)
    return total


@register_flop_formula(torch.ops.mst_fx.sum_of_products)
def _flops(left: list[torch.Size], right: list[torch.Size], *_: Any, **__: Any) -> int:
    return sum(mm_flop(a, b) for a, b in zip(left, right, strict=True))


@sum_of_products.register_fake
def _(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    return left[0].new_empty((left[0].shape[0], right[0].shape[1]))
