"""What stands between a DTensor and ops on its shards: a graph holds these calls, with placements as literals.

They run on DTensors, so compilers trace through them. torch may have been built without `torch.distributed`: it is
loaded when one of them is called, and then there is a DTensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def enter(value: DTensor, grads: tuple[Placement, ...], share: int = 1) -> torch.Tensor:
    """Return the shard of a DTensor that this rank holds.

    Args:
        value: of any placements.
        grads: the placements of the gradient that comes back for the shard.
        share: where it is not 1, the shard's share of a sum over as many ranks that hold the same: it is divided. What
            reads it adds up over the ranks, so the gradient of the share is that of the whole.
    """
    shard = value.to_local(grad_placements=grads)
    if share == 1:
        return shard
    divided: torch.Tensor = _Share.apply(shard, share)
    return divided


def leave(shard: torch.Tensor, like: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    """Return the DTensor whose shard this rank holds.

    Args:
        shard: of the same shape on every rank.
        like: any DTensor on the same mesh.
        placements: of the result.
    """
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, like.device_mesh, placements, run_check=False)


def crosses(target: object) -> bool:
    """Return whether a node calls one of these."""
    return target is enter or target is leave


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, share: int) -> torch.Tensor:
        return value / share

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
