"""A room for what the pass traces: what the user has switched on around the compile is outside, and is given back.

What the captured program means by itself stays: autocast around it (but not the cache of weights that it has cast,
which holds values of other traces), the default dtype, deterministic algorithms. Dynamo guards on these.

Private torch API: how hooks, modes, transforms and compiled autograd are switched off. Run on torch 2.11, 2.13 and
2.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch
import torch.overrides

_one_at_a_time = RLock()
"""Anomaly mode, and what a trace remembers of the user's lines, are the process's, not the thread's."""


@contextmanager
def clean_room() -> Iterator[None]:
    """Nothing in here meets what is switched on outside; one thread at a time."""
    from torch._dynamo.compiled_autograd import _disable as without_compiled_autograd
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as without_transforms
    from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes

    recorded = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(without_transforms())
        stack.enter_context(without_dispatch_modes())
        stack.enter_context(_without_function_modes())
        stack.enter_context(_without_saved_tensor_hooks())
        stack.enter_context(without_compiled_autograd())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(recorded))
        stack.enter_context(_without_autocast_cache())
        yield


@contextmanager
def modes_given_back() -> Iterator[None]:
    """A compile that fails half-way in a block of inference mode, or of no_grad, leaves none of it behind."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(recorded):
        yield


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """A mode of the user's is applied by Dynamo while it captures."""
    modes = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)


@contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    """Those of an eager checkpoint count what is saved, those of a user move it: neither may see what is traced."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


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
    """Casts are explicit in a lowered graph; autocast must not add to them."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device_type in {"cpu", "cuda", accelerator.type if accelerator is not None else "cpu"}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
