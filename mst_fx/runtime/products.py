"""Matrix products that add up in place, in the dtype of the sum, with as few roundings as the device can.

Legend: n rows, i and j columns, g groups of rows: group e has the rows from `ends[e - 1]`, or 0, to `ends[e]`.

A product of groups adds to a sum of all matrices [g, i, j], which may take a gigabyte, so how often memory is passed over
decides its time:
  CUDA with Triton   one kernel multiplies, and adds to the sum: two passes over it
  a CPU              group after group
  elsewhere          all matrices of the chunk are made, and then added
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeAlias

import torch

aten = torch.ops.aten
log = logging.getLogger(__name__)

Kernel: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool], None]


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return A B in a dtype."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if _widens(a.device, a.dtype, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add A B to the total, in the dtype of the total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _widens(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


def grouped_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return A^T B of each group of rows [g, i, j] in a dtype; a group without rows has zeros.

    Args:
        a: [n, i].
        b: [n, j].
        ends: [g], int32; rows behind the last group belong to none.
        dtype: of the result.
    """
    kernel = _kernel_for(a, dtype)
    if kernel is None and a.device.type != "cpu":
        return _all_groups(a, b, ends).to(dtype, memory_format=torch.contiguous_format)
    shape = (ends.shape[0], a.shape[1], b.shape[1])
    if kernel is not None:
        total = torch.empty(shape, dtype=dtype, device=a.device)
        kernel(total, a, b, ends, False)
        return total
    total = torch.zeros(shape, dtype=dtype, device=a.device)
    _add_group_by_group(total, a, b, ends)
    return total


def add_grouped_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> None:
    """Add A^T B of each group of rows to the total [g, i, j], in its dtype; for the arguments see `grouped_product`."""
    kernel = _kernel_for(a, total.dtype)
    if kernel is not None:
        kernel(total, a, b, ends, True)
    elif a.device.type == "cpu":
        _add_group_by_group(total, a, b, ends)
    else:
        total.add_(_all_groups(a, b, ends))


def _add_group_by_group(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> None:
    start = 0
    for place, end in zip(total, ends.tolist(), strict=True):
        if end > start:
            add_product(place, a[start:end].t(), b[start:end])
        start = end


def _all_groups(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the products of all groups, in the dtype of the factors, without a wait for the device."""
    return aten._grouped_mm.default(a.t(), b, ends)


@functools.cache
def has_kernel() -> bool:
    """Return whether a kernel of ours can be made for CUDA: whether Triton is there."""
    try:
        from mst_fx.runtime import grouped_kernel  # noqa: F401
    except ImportError:
        return False
    return True


def _kernel_for(a: torch.Tensor, dtype: torch.dtype) -> Kernel | None:
    """Return the kernel that adds up products of groups in `dtype`; None where there is none.

    A mode may give tensors of a type of its own: it sees ops of aten, and no kernel.
    """
    if a.device.type != "cuda" or type(a) is not torch.Tensor or not has_kernel():
        return None
    return _tried(a.device, a.dtype, dtype)


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Kernel | None:
    """Return a kernel that has run on this device once."""
    from mst_fx.runtime.grouped_kernel import kernels_for

    x = torch.ones(64, 64, dtype=dtype, device=device)
    ends = torch.full((1,), 64, dtype=torch.int32, device=device)
    error: Exception | None = None
    for kernel in kernels_for(device, dtype):
        try:
            for adds in (False, True):
                kernel(torch.zeros(1, 64, 64, dtype=wide, device=device), x, x, ends, adds)
        except torch.OutOfMemoryError:
            raise
        except Exception as refused:  # too little shared memory, no compiler, a version of Triton that lacks something
            error = refused
        else:
            return kernel
    log.warning("mst_fx: gradients of experts are made and then added: %s does not run: %s", dtype, error)
    return None


@functools.cache
def _widens(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether this device multiplies `dtype` matrices into `wide` without a rounding in between."""
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(x, x, out_dtype=wide)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
