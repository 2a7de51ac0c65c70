"""Decompositions of aten ops into smaller ones, for the lowering of a region.

A mean over rows becomes a sum and a division, so that the sum can add up over the chunks. The total weight of a loss
becomes a sum of its own, which depends on no logits. Random numbers become a hash of their position. An op without a
placement rule takes torch's own decomposition, if it has one. Other ops stay whole, so autograd's own formulas apply.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import embedding, linear

from mst_fx.core.aten_ops import MEAN, NONE, SUM, is_mutable, is_random
from mst_fx.core.sizes import sure
from mst_fx.core.torch_private.switches import without_dispatch_modes
from mst_fx.core.torch_private.tracing import decomposition_table
from mst_fx.core.values import is_fake, is_wrapper
from mst_fx.ops.seeded_random import uniform_like
from mst_fx.placement.rules import rule_for

aten = torch.ops.aten
MOST_NUMBERS = 64
"""A list of more numbers stays a constant: each would be an op of its own."""


@functools.cache
def decompositions(gathers: bool = True) -> Mapping[Any, Callable[..., Any]]:
    """Return the decompositions of the lowering, by op.

    Args:
        gathers: decompose gathers, too, which makes their backward cheaper. False where the caller asks what a node
            is: a gather is a gather then.
    """
    table = {op: function for op, function in decomposition_table.items() if _takes_torch_decomposition(op, function)}
    return {**table, **OWN, **(OF_GATHERS if gathers else {})}


def _takes_torch_decomposition(op: Any, function: Callable[..., Any]) -> bool:
    """Return whether an op has no placement rule, but a decomposition of torch's into aten ops.

    The references (`torch._refs`) do not count: they decompose into prims, which have no derivative.
    """
    if not isinstance(op, torch._ops.OpOverload) or is_mutable(op) or rule_for(op) is not None:
        return False
    return not is_random(op) and inspect.unwrap(function).__module__ == "torch._decomp.decompositions"


def _decompose_nll(
    op: Any,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
) -> Any:
    """Divide a sum of negative log-likelihoods, which `op` computes over rows or images, by the total weight."""
    if reduction != MEAN:
        return NotImplemented
    loss = op(scores, target, weight, SUM, ignore_index)[0]
    counts = target != ignore_index
    each = counts if weight is None else embedding(target * counts, weight.unsqueeze(1)).squeeze(-1) * counts
    total = each.sum(dtype=_accumulator(scores, None))
    return (loss / total).to(loss.dtype), total


def _decompose_mean(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _divided(x.sum(dtype=_accumulator(x, dtype)), x.numel(), x, dtype)


def _decompose_mean_dim(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    if dims == [x.dim() - 1] and x.dim() > 1:
        return NotImplemented  # over features: the loop runs the op as it is
    count = 1
    for d in dims:
        count = count * x.shape[d]
    return _divided(x.sum(dims, keepdim=keepdim, dtype=_accumulator(x, dtype)), count, x, dtype)


def _accumulator(x: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return float32 for half precision: a mean sums in it, too."""
    return torch.promote_types(dtype or x.dtype, torch.float32)


def _divided(total: torch.Tensor, count: int, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return (total / count).to(dtype or x.dtype)


def _decompose_dropout(x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False:
        return x, torch.ones_like(x, dtype=torch.bool)
    keep = uniform_like(x) >= p
    return x * keep * (1 / (1 - p) if p < 1 else 0.0), keep


def _decompose_glu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _decompose_bernoulli(x: torch.Tensor, p: float, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None else (uniform_like(x) < p).to(x.dtype)


def _decompose_rand_like(x: torch.Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
    return uniform_like(x).to(dtype or x.dtype)


def _decompose_copy(x: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Return what a write of a whole value leaves in memory; aten has no derivative for the op itself."""
    src = src.to(device=x.device, dtype=x.dtype)
    same = x.dim() == src.dim() and all(sure(a == b) for a, b in zip(x.shape, src.shape, strict=True))
    return src if same else src.expand(x.shape)


def _decompose_index_put(
    x: torch.Tensor, indices: Sequence[Any], values: torch.Tensor, accumulate: bool = False
) -> Any:
    """Write one value where a mask holds."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.dim() or accumulate:
        return NotImplemented
    return torch.where(mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim())), values, x)


def _decompose_gather(x: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Any:
    """Pick one class of each row by a negative log-likelihood: its backward fuses with the row's other gradients.

    The backward of a gather fills a tensor with zeros and adds to it.
    """
    rows = list(x.shape[:-1])
    last = x.dim() > 1 and dim % x.dim() == x.dim() - 1
    if not last or list(index.shape) != [*rows, 1] or not x.is_floating_point():
        return NotImplemented
    if all(sure(stride == 0) for stride in x.stride()[:-1]):  # one row, repeated: weights of classes
        return embedding(index.squeeze(-1).long(), x[(0,) * len(rows)].unsqueeze(1))
    scores, target = x.reshape(-1, x.shape[-1]), index.reshape(-1).long()
    picked = -aten.nll_loss_forward.default(scores, target, None, NONE, NEVER)[0]
    return picked.view(index.shape)


def _decompose_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Multiply the channels of each position by a matrix, where the kernel is one position wide."""
    one_wide = all(sure(size == 1) for size in weight.shape[2:]) and all(step == 1 for step in stride)
    if not one_wide or groups != 1 or any(padding) or any(output_padding):
        return NotImplemented
    matrix, positions = weight.flatten(1), x.movedim(1, -1)
    rows = linear(positions.reshape(-1, x.shape[1]), matrix.t() if transposed else matrix, bias)
    return rows.reshape(*positions.shape[:-1], rows.shape[1]).movedim(-1, 1)


def _decompose_scatter_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Add to what is there, where the op reduces by a sum."""
    return x.scatter_add(dim, index, src) if reduce == "sum" and include_self else NotImplemented


def _decompose_product(x: torch.Tensor, y: torch.Tensor) -> Any:
    """Multiply and sum, where a matrix product has one row and one column: it is a reduction of what it reads."""
    if not (sure(x.shape[-2] == 1) and sure(y.shape[-1] == 1)):
        return NotImplemented
    return _sum_of_products(x, y.transpose(-2, -1)).unsqueeze(-1)


def _sum_of_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the dot products along the last dim; as in a matrix product, only the sum is rounded."""
    wide = _accumulator(x, None) if x.is_floating_point() else x.dtype
    return (x.to(wide) * y.to(wide)).sum(-1).to(x.dtype)


def _decompose_lift(x: torch.Tensor) -> Any:
    """Make the numbers of a trace (the 0 of `x[mask] = 0`, the list of `x[[0, 2]]`) where they are read.

    A graph holds no constant tensor then, but for a long list.
    """
    if is_fake(x) or is_wrapper(x):
        return aten.alias.default(x)
    if x.numel() > MOST_NUMBERS:
        return NotImplemented
    with without_dispatch_modes():
        numbers = x.flatten().tolist()
    made = [torch.full((), number, dtype=x.dtype, device=x.device) for number in numbers]
    if not x.dim():
        return made[0]
    return torch.stack(made).view(x.shape) if made else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _decompose_sgn(x: torch.Tensor) -> Any:
    """Take the sign of real numbers: autograd's formula for `sgn` asks for sizes as numbers."""
    return NotImplemented if x.is_complex() else x.sign()


NEVER = -(2**31)
"""An `ignore_index` that no gather reads."""
OF_GATHERS: dict[Any, Callable[..., Any]] = {aten.gather.default: _decompose_gather}
OWN: dict[Any, Callable[..., Any]] = {
    aten.nll_loss_forward.default: functools.partial(_decompose_nll, aten.nll_loss_forward.default),
    aten.nll_loss2d_forward.default: functools.partial(_decompose_nll, aten.nll_loss2d_forward.default),
    aten.convolution.default: _decompose_convolution,
    aten.copy.default: _decompose_copy,
    aten.index_put.default: _decompose_index_put,
    aten.lift_fresh.default: _decompose_lift,
    aten.mean.default: _decompose_mean,
    aten.mean.dim: _decompose_mean_dim,
    aten.native_dropout.default: _decompose_dropout,
    aten.bernoulli.p: _decompose_bernoulli,
    aten.bmm.default: _decompose_product,
    aten.mm.default: _decompose_product,
    aten.dot.default: _sum_of_products,
    aten.glu.default: _decompose_glu,
    aten.rand_like.default: _decompose_rand_like,
    aten.scatter_reduce.two: _decompose_scatter_reduce,
    aten.sgn.default: _decompose_sgn,
}
