"""Bytes that a step saves for backward, and the peak of a step above its start."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


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


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes alive at once in one step, above those alive at its start; the step is run once to warm up."""
    step()
    with without_garbage_collection():  # what is freed in the step would count, however old
        return _peak_bytes(step, device)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _peak_bytes(step: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
