"""Attention of ranks that share a sequence: each has all tokens of some heads, which they exchange (Ulysses).

Axes: B batch, H heads, R ranks, T tokens of a rank, E features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F  # noqa: N812

Move = Callable[[torch.Tensor], torch.Tensor]


def attending(to_heads: Move, to_tokens: Move) -> Callable[..., torch.Tensor]:
    """Attention between two exchanges; a head of keys may belong to several of queries."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shared = q.shape[1] != k.shape[1]
        return to_tokens(F.scaled_dot_product_attention(*map(to_heads, (q, k, v)), enable_gqa=shared))

    return attention


def by_torch(group: Any) -> Callable[..., torch.Tensor]:
    """Torch's functional collective, which has a gradient."""
    ranks = group.size()

    def to_all(x: torch.Tensor) -> torch.Tensor:
        """Give each rank its part of dim 0."""
        sizes = [x.shape[0] // ranks] * ranks
        return funcol.all_to_all_single_autograd(x.contiguous(), sizes, sizes, group)

    def to_heads(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        parts = to_all(x.view(batch, ranks, heads // ranks, length, width).transpose(0, 1))
        return parts.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * length, width)

    def to_tokens(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        parts = to_all(x.view(batch, heads, ranks, length // ranks, width).permute(2, 0, 1, 3, 4))
        return parts.transpose(0, 1).reshape(batch, ranks * heads, length // ranks, width)

    return attending(to_heads, to_tokens)


def by_function(group: Any) -> Callable[..., torch.Tensor]:
    """A custom autograd function that scatters one dim of [B, T, H, E] and gathers another."""

    def to_heads(x: torch.Tensor) -> torch.Tensor:
        return Exchanged.apply(x.transpose(1, 2), 2, group).transpose(1, 2)

    def to_tokens(x: torch.Tensor) -> torch.Tensor:
        return Exchanged.apply(x.transpose(1, 2), 1, group).transpose(1, 2)

    return attending(to_heads, to_tokens)


class Exchanged(torch.autograd.Function):
    """Scatters dim 1 or dim 2, and gathers the other one."""

    @staticmethod
    def forward(ctx, x, scatter, group):
        ctx.gather, ctx.group = 3 - scatter, group
        return _scattered(x, scatter, group)

    @staticmethod
    def backward(ctx, grad):
        return _scattered(grad, ctx.gather, ctx.group), None, None


def _scattered(x, scatter, group):
    parts = x.unflatten(scatter, (group.size(), -1)).movedim(scatter, 0).contiguous()
    given = torch.empty_like(parts)
    dist.all_to_all_single(given, parts, group=group)
    return given.movedim(0, 3 - scatter).flatten(3 - scatter, 4 - scatter).contiguous()


def with_heads_in_front(group: Any) -> Callable[..., torch.Tensor]:
    """Heads are dim 0, which has no dim of the ranks of its own; nor have tokens."""
    ranks = group.size()

    def to_all(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_to_all_single_autograd(x.contiguous(), None, None, group)

    def to_heads(x: torch.Tensor) -> torch.Tensor:
        return to_all(x.movedim(1, 0)).unflatten(0, (ranks, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def to_tokens(x: torch.Tensor) -> torch.Tensor:
        return to_all(x.movedim(2, 0)).unflatten(0, (ranks, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)

    return attending(to_heads, to_tokens)


SPELLINGS = {"by torch": by_torch, "with heads in front": with_heads_in_front}
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
    SPELLINGS["by a function"] = by_function  # torch 2.11 compiles one that passes zeros back, without mst_fx as well
