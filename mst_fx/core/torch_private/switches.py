"""Switches of what a user turns on around a compile: hooks, modes, transforms, compiled autograd.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.overrides
from torch._dynamo.compiled_autograd import _disable
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

without_compiled_autograd = _disable
without_transforms = temporarily_clear_interpreter_stack
without_dispatch_modes = _disable_current_modes


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Hide the user's function modes: Dynamo has applied them while it captured."""
    modes = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Hide hooks on saved tensors: an eager checkpoint counts by them, a user moves tensors by them."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)
