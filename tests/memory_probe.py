"""Bytes that a step saves for backward; the peak of a step above its start."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from benchmarks.peak_memory import peak_bytes, without_garbage_collection

__all__ = ["peak_bytes", "saved_bytes", "without_garbage_collection"]


def saved_bytes(forward: Callable[[], torch.Tensor], known: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct storages that `forward` saves for backward, those of `known` (inputs, parameters) left out."""
    storages: dict[int, int] = {}
    keep = []  # a freed storage's address may be used again

    def pack(x: torch.Tensor) -> torch.Tensor:
        keep.append(x)
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    forward()  # a compile saves things of its own
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    for x in known:
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())
