"""How an aten op opens into smaller ones while a region is lowered.

A mean over rows becomes a sum and a division, so that the division can be told from the sum; a loss' weight of all
labels becomes a sum of its own, which depends on no logits; random numbers become a hash of their position; an op that
no placement rule knows is opened by torch's own decomposition, if it has one. Nothing is opened further: autograd's own
formulas still apply.

Private torch API: the decomposition table. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.nn.functional import embedding

from mst_fx.core.aten_ops import MEAN, NONE, SUM, is_mutable, is_random
from mst_fx.core.sizes import sure
from mst_fx.ops.seeded_random import uniform_like
from mst_fx.placement.rules import rule_for

aten = torch.ops.aten


@functools.cache
def openings(gathers: bool = True) -> Mapping[Any, Callable[..., Any]]:
    """The decompositions of the lowering, by op.

    Args:
        gathers: open gathers, too, for the sake of their backward; who wants to know what a node is leaves them.
    """
    table = {op: function for op, function in decomposition_table.items() if _is_foreign(op, function)}
    return {**table, **OWN, **(GATHERS if gathers else {})}


def _is_foreign(op: Any, function: Callable[..., Any]) -> bool:
    """Whether only torch's decomposition into aten ops tells what an op does.

    The references (`torch._refs`) open into prims, which have no derivative.
    """
    if not isinstance(op, torch._ops.OpOverload) or is_mutable(op) or rule_for(op) is not None:
        return False
    return not is_random(op) and inspect.unwrap(function).__module__ == "torch._decomp.decompositions"


def _open_nll(
    op: Any,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
) -> Any:
    """The mean of a negative log-likelihood: `op` computes the sum, over rows or over images."""
    if reduction != MEAN:
        return NotImplemented
    loss = op(scores, target, weight, SUM, ignore_index)[0]
    counts = target != ignore_index
    each = counts if weight is None else embedding(target * counts, weight.unsqueeze(1)).squeeze(-1) * counts
    total = each.sum(dtype=_accumulator(scores, None))
    return (loss / total).to(loss.dtype), total


def _open_mean(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _divided(x.sum(dtype=_accumulator(x, dtype)), x.numel(), x, dtype)


def _open_mean_dim(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    if dims == [x.dim() - 1] and x.dim() > 1:
        return NotImplemented  # over features: the loop runs it as it is
    count = 1
    for d in dims:
        count = count * x.shape[d]
    return _divided(x.sum(dims, keepdim=keepdim, dtype=_accumulator(x, dtype)), count, x, dtype)


def _accumulator(x: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Half precision sums in float32, as a mean does inside."""
    return torch.promote_types(dtype or x.dtype, torch.float32)


def _divided(total: torch.Tensor, count: int, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return (total / count).to(dtype or x.dtype)


def _open_dropout(x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False:
        return x, torch.ones_like(x, dtype=torch.bool)
    keep = uniform_like(x) >= p
    return x * keep * (1 / (1 - p) if p < 1 else 0.0), keep


def _open_glu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _open_bernoulli(x: torch.Tensor, p: float, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None else (uniform_like(x) < p).to(x.dtype)


def _open_rand_like(x: torch.Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
    return uniform_like(x).to(dtype or x.dtype)


def _open_copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What a write of a whole value leaves behind; aten has no derivative for the op itself."""
    source = source.to(device=x.device, dtype=x.dtype)
    same = x.dim() == source.dim() and all(sure(a == b) for a, b in zip(x.shape, source.shape, strict=True))
    return source if same else source.expand(x.shape)


def _open_index_put(x: torch.Tensor, indices: Sequence[Any], values: torch.Tensor, accumulate: bool = False) -> Any:
    """One value where a mask holds."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.dim() or accumulate:
        return NotImplemented
    return torch.where(mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim())), values, x)


def _open_gather(x: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Any:
    """One class of each row, as a negative log-likelihood: its backward fuses with what the row's other gradients are.

    That of a gather fills a tensor of zeros and adds to it.
    """
    rows = list(x.shape[:-1])
    last = x.dim() > 1 and dim % x.dim() == x.dim() - 1
    if not last or list(index.shape) != [*rows, 1] or not x.is_floating_point():
        return NotImplemented
    scores, target = x.reshape(-1, x.shape[-1]), index.reshape(-1).long()
    picked = -aten.nll_loss_forward.default(scores, target, None, NONE, NEVER)[0]
    return picked.view(index.shape)


def _open_sgn(x: torch.Tensor) -> Any:
    """Of real numbers, the sign: autograd's formula of `sgn` asks for sizes as numbers."""
    return NotImplemented if x.is_complex() else x.sign()


NEVER = -(2**31)
"""An index to ignore that no gather takes."""
GATHERS: dict[Any, Callable[..., Any]] = {aten.gather.default: _open_gather}
OWN: dict[Any, Callable[..., Any]] = {
    aten.nll_loss_forward.default: functools.partial(_open_nll, aten.nll_loss_forward.default),
    aten.nll_loss2d_forward.default: functools.partial(_open_nll, aten.nll_loss2d_forward.default),
    aten.copy.default: _open_copy,
    aten.index_put.default: _open_index_put,
    aten.mean.default: _open_mean,
    aten.mean.dim: _open_mean_dim,
    aten.native_dropout.default: _open_dropout,
    aten.bernoulli.p: _open_bernoulli,
    aten.glu.default: _open_glu,
    aten.rand_like.default: _open_rand_like,
    aten.sgn.default: _open_sgn,
}
