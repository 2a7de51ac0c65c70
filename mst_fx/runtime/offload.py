"""What the plan of a graph says about values that go to the host, on its way to the partitioner of the joint graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Offload:
    """What leaves the device, as the plan of a graph says.

    Attributes:
        least: bytes; smaller values stay.
        blocks: number of blocks that keep nothing on the device, the first in forward; None for all.
        parameters: shapes and dtypes of the graph's parameters, which stay.
        loops: literals of the backward loops that stand for checkpoints.
        strict: whether errors are raised; otherwise they cost the offloading.
    """

    least: int
    blocks: int | None = None
    parameters: frozenset[tuple[tuple[int, ...], torch.dtype]] = frozenset()
    loops: frozenset[tuple[Any, ...]] = frozenset()
    strict: bool = False

    def name(self) -> str:
        """Return a name for caches: the same in every process."""
        parts = [self.least, self.blocks, sorted(map(repr, self.parameters)), sorted(map(repr, self.loops))]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_planned: ContextVar[Offload | None] = ContextVar("mst_fx_offload", default=None)


def plan_for_next(offload: Offload | None) -> None:
    """Store what the plan of the graph says that is compiled next in this thread."""
    _planned.set(offload)


@contextmanager
def planned(offload: Offload | None) -> Iterator[None]:
    """Hold what the plan of a graph says while it is compiled."""
    token = _planned.set(offload)
    try:
        yield
    finally:
        _planned.reset(token)


def planned_now() -> Offload | None:
    """Return what the plan of the graph says that is compiled now; None where nothing goes to the host."""
    return _planned.get()
