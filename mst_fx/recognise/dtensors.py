"""Facts about DTensors, and the ops that they run on their shards.

A DTensor's own word for how it lies across ranks is `placements`; they have nothing to do with those across chunks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves

from mst_fx.capture.fingerprint import like
from mst_fx.core.aten_ops import ALIASES, is_random
from mst_fx.core.sizes import hint, sure
from mst_fx.core.torch_private.tracing import TorchDispatchMode
from mst_fx.core.values import is_sharded, plain_tensors

aten = torch.ops.aten

Placements: TypeAlias = tuple[Any, ...]


def placements_of(value: Any) -> Placements:
    """Return the placements of a DTensor, with dims that count from the front."""
    return tuple(_from_the_front(each, value.dim()) for each in value.placements)


def gradient_of(placements: Placements) -> Placements:
    """Return the placements that the gradient of a DTensor has by default: whole where the value is a sum to be."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if each.is_partial() else each for each in placements)


def ranks_of(value: Any) -> int:
    """Return the number of ranks that hold parts of a DTensor, each a part of its own."""
    shard = plain_tensors(value)[0]
    return max(1, prod(map(hint, value.shape)) // max(1, prod(map(hint, shard.shape))))


def is_even(value: Any) -> bool:
    """Return whether all ranks hold shards of the same size."""
    sizes = list(plain_tensors(value)[0].shape)
    for placement, ranks in zip(placements_of(value), value.device_mesh.shape, strict=True):
        if placement.is_shard():
            sizes[placement.dim] *= ranks
    return all(sure(size == whole) for size, whole in zip(sizes, value.shape, strict=True))


def same_sizes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, and the same sizes whatever varies."""
    pairs = list(zip(one.shape, other.shape, strict=False))
    return one.dim() == other.dim() and one.dtype == other.dtype and all(sure(a == b) for a, b in pairs)


class Watch(TorchDispatchMode):
    """Records the ops on shards, and on what is made of them; a DTensor turns its own ops into these.

    It also runs ops for the shape of the whole, on other tensors: these are not recorded.

    Args:
        values: the DTensors or shards to follow.

    Attributes:
        keys: what tells the ops apart, with their arguments.
        seen: the ops.
        draws: whether one of them draws random numbers.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        super().__init__()
        self.draws = False
        self.keys: list[Hashable] = []
        self.seen: list[Any] = []
        self._followed: dict[int, torch.Tensor] = {}
        self.follow(values)

    def follow(self, values: Iterable[Any]) -> None:
        """Follow the tensors among the values, too."""
        for value in values:
            for plain in plain_tensors(value) if isinstance(value, torch.Tensor) else ():
                self._followed[id(plain)] = plain

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(map(is_sharded, given)):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if any(id(x) in self._followed for x in given):
            self.follow(tree_leaves(result))
            if not _is_alias(func, args, result):
                self.seen.append(func)
                self.keys.append((func, like(args), like(kwargs or {})))
                self.draws = self.draws or (is_random(func) and not _drops_nothing(func, args, kwargs or {}))
        return result


def _drops_nothing(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an op would draw random numbers, as attention does, for a dropout that it does not have."""
    known = {each.name: each.default_value for each in op._schema.arguments}
    return {**known, **dict(zip(known, args, strict=False)), **kwargs}.get("dropout_p") == 0.0


def _is_alias(op: Any, args: Any, result: Any) -> bool:
    """Return whether an op gives its operand as it is, or no tensor."""
    if op in ALIASES or not isinstance(result, torch.Tensor | tuple | list):
        return True
    return op == aten.view.default and isinstance(result, torch.Tensor) and same_sizes(args[0], result)


def _from_the_front(placement: Any, dims: int) -> Any:
    if not placement.is_shard() or placement.dim >= 0:
        return placement
    return type(placement)(placement.dim % dims)
