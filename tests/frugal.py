"""What makes many small compiles in one process cheap: none of it changes what is compiled.

Private: `torch._dynamo.guards.profile_guard_manager` (seen in torch 2.13) times the guards of every compile, and
flushes the caches of the processor for it, which takes longer than the guards.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._dynamo import config, guards


@contextmanager
def frugal() -> Iterator[None]:
    """One thread for tensors this small, no timing of guards, few searches for garbage: each walks all of torch."""
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    with ExitStack() as stack:
        if hasattr(guards, "profile_guard_manager"):
            stack.enter_context(mock.patch.object(guards, "profile_guard_manager", _untimed))
        if hasattr(config, "run_gc_after_compile"):
            stack.enter_context(config.patch(run_gc_after_compile=False))
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            gc.set_threshold(*thresholds)
            gc.unfreeze()


def _untimed(*_: Any) -> float:
    return 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is logged by torch and the pass."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("torch", "mst_fx")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
