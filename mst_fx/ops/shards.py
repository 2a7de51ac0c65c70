"""What stands between a DTensor and ops on its shards: a graph holds these calls, with placements as literals.

They run on DTensors, so compilers trace through them. torch may have been built without `torch.distributed`: it is
loaded when one of them is called, and then there is a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
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


@dataclass(frozen=True)
class OnDTensors:
    """An op on DTensors, as a function of their shards: gradients are those that torch gives on DTensors.

    Attributes:
        op: the function, or the name of the method.
        mesh: what the DTensors lie on.
        operands: position among the leaves of the arguments, and placements, of each argument that is a DTensor.
        grads: placements of the gradient that comes back for the shard of the value; None where it is a plain value.
    """

    op: Callable[..., Any] | str
    mesh: DeviceMesh
    operands: tuple[tuple[int, tuple[Placement, ...]], ...]
    grads: tuple[Placement, ...] | None

    @property
    def __name__(self) -> str:
        """The op's own name, for graphs and reports."""
        return str(getattr(self.op, "__name__", self.op))

    @property
    def __wrapped__(self) -> object:
        """The op."""
        return self.op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the shard of the value that the op gives for the DTensors of these shards."""
        from torch.distributed.tensor import DTensor

        leaves, tree = tree_flatten((args, kwargs))
        for position, placements in self.operands:
            leaves[position] = DTensor.from_local(leaves[position], self.mesh, placements, run_check=False)
        args, kwargs = tree_unflatten(leaves, tree)
        value = getattr(args[0], self.op)(*args[1:], **kwargs) if isinstance(self.op, str) else self.op(*args, **kwargs)
        return value if self.grads is None else value.to_local(grad_placements=self.grads)


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
