"""The pass traces in a clean room: it switches off what the user has switched on around the compile, and restores it.

What belongs to the captured program stays on: autocast around it (but not the cache of weights that it has cast, which
holds values of other traces), the default dtype, deterministic algorithms. Dynamo guards on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch

_one_at_a_time = RLock()
"""Anomaly mode, and the stack traces that a trace records, belong to the process, not to the thread."""


@contextmanager
def clean_room() -> Iterator[None]:
    """Hide modes, hooks and transforms of the user from the block; one thread enters at a time.

    Backward runs in this thread, too: on a GPU it would run in one of the device's, and guards that are suppressed are
    so for a thread.
    """
    from mst_fx.core.torch_private import switches  # late: a version may lack one

    recorded = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(switches.without_transforms())
        stack.enter_context(switches.without_dispatch_modes())
        stack.enter_context(switches.without_function_modes())
        stack.enter_context(switches.without_saved_tensor_hooks())
        stack.enter_context(switches.without_compiled_autograd())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # inference mode switches it, too
        stack.enter_context(torch.set_grad_enabled(recorded))
        stack.enter_context(_without_autocast_cache())
        yield


@contextmanager
def modes_given_back() -> Iterator[None]:
    """Restore the grad and inference modes after a compile, which may fail inside a block of either."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(recorded):
        yield


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off: a lowered graph holds its casts as nodes, and autocast must not add others."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device_type in {"cpu", "cuda", accelerator.type if accelerator is not None else "cpu"}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
