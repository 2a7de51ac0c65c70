"""Modes of torch that a user may have switched on around a call."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Counts(TorchFunctionMode):
    def __init__(self):
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Looks(TorchDispatchMode):
    """A mode that asks to be there for what compilers do."""

    def __init__(self):
        super().__init__()
        self.fakes = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fakes += any(isinstance(x, torch._subclasses.FakeTensor) for x in args)
        return func(*args, **(kwargs or {}))
