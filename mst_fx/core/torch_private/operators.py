"""Operators over graphs: their registration, and what looks into their calls.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch._C import DispatchKey as DispatchKey
from torch._C import _AutoDispatchBelowAutograd, _dispatch_has_kernel_for_dispatch_key
from torch._higher_order_ops.utils import redirect_to_mode as redirect_to_mode
from torch._higher_order_ops.utils import reenter_make_fx as reenter_make_fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

current_dispatch_mode = _get_current_dispatch_mode
below_autograd = _AutoDispatchBelowAutograd
CHECKPOINTING_MODES = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
"""The modes under which activation checkpointing runs a function: the first time, and once more."""


def has_kernel_for_all_devices(op: OpOverload) -> bool:
    """Return whether a library has registered a kernel for all devices."""
    return bool(_dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeExplicitAutograd"))


def kernel_for_all_devices(op: OpOverload) -> Callable[..., Any]:
    """Return that kernel."""
    return partial(op._op_dk, DispatchKey.CompositeExplicitAutograd)
