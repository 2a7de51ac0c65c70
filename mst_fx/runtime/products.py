"""Matrix products that add up in place, in the dtype of the sum, with as few roundings as the device can.

Legend: n rows, i and j columns, g groups of rows: group e has the rows from `ends[e - 1]`, or 0, to `ends[e]`.

A product of groups adds to a sum of all matrices [g, i, j], which may take gigabytes; how often these are passed over
decides its time:
  CUDA with Triton   a kernel multiplies and adds to the sum
  a CPU              one group after the other, in the same way
  elsewhere          the products of all groups are made, and then added
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

aten = torch.ops.aten
log = logging.getLogger(__name__)

Way: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
"""Takes the sum, A, B, the groups' ends, and whether it adds to the sum or writes it."""


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return A B of two matrices, or of two batches of them, in a dtype."""
    multiply: Any = torch.mm if a.dim() == 2 else torch.bmm
    if dtype == a.dtype:
        return multiply(a, b)
    if _widens(a.device, a.dtype, dtype, a.dim()):
        return multiply(a, b, out_dtype=dtype)
    return multiply(a, b).to(dtype)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add A B of two matrices, or of two batches of them, to the total, in the dtype of the total."""
    if total.dtype == a.dtype:
        (total.addmm_ if a.dim() == 2 else total.baddbmm_)(a, b)
    elif _widens(a.device, a.dtype, total.dtype, a.dim()):
        _add_wider(total, a, b)
    else:
        total.add_(torch.matmul(a, b))


def _add_wider(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    add: Any = torch.addmm if a.dim() == 2 else torch.baddbmm
    add(total, a, b, out_dtype=total.dtype, out=total)


def grouped_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return A^T B of each group of rows [g, i, j] in a dtype; a group without rows has zeros.

    Args:
        a: [n, i].
        b: [n, j].
        ends: [g]; rows behind the last group belong to none.
        dtype: of the result.
    """
    total = torch.empty(ends.shape[0], a.shape[1], b.shape[1], dtype=dtype, device=a.device)
    _way_for(a, dtype)(total, a, b, ends, False)
    return total


def add_grouped_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> None:
    """Add A^T B of each group of rows to the total [g, i, j], in its dtype; for the arguments see `grouped_product`."""
    _way_for(a, total.dtype)(total, a, b, ends, True)


def group_by_group(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, adds: bool) -> None:
    """Add or write the product of one group after the other; the host reads where they end."""
    if not adds:
        total.zero_()
    start = 0
    for place, end in zip(total, ends.tolist(), strict=True):
        if end > start:
            add_product(place, a[start:end].t(), b[start:end])
        start = end


def all_groups_at_once(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, adds: bool) -> None:
    """Make the products of all groups in the dtype of the factors, and add or write them; the host does not wait."""
    products = aten._grouped_mm.default(a.t(), b, ends)
    if adds:
        total.add_(products)
    else:
        total.copy_(products)


def groups_made_at_once(device: torch.device, groups: int) -> int:
    """Return how many of the groups' products exist at once beside a sum in another dtype.

    The device meta stands for one that multiplies into the sum.
    """
    if device.type == "cpu":
        return min(1, groups)
    return 0 if device.type == "meta" or (device.type == "cuda" and has_kernel()) else groups


@functools.cache
def has_kernel() -> bool:
    """Return whether a kernel of ours can be made for CUDA: whether Triton is there."""
    try:
        from mst_fx.runtime import grouped_kernel  # noqa: F401
    except ImportError:
        return False
    return True


def _way_for(a: torch.Tensor, dtype: torch.dtype) -> Way:
    """Return how products of groups like `a` are added up in `dtype`.

    A mode may give tensors of a type of its own: it sees ops of aten, and no kernel.
    """
    plain = type(a) is torch.Tensor
    if plain and a.device.type == "cpu":
        return group_by_group
    if plain and a.device.type == "cuda" and has_kernel():
        return _tried(a.device, a.dtype, dtype)
    return all_groups_at_once


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Way:
    """Return the first kernel that runs on this device, or what needs none."""
    from mst_fx.runtime.grouped_kernel import kernels_for

    kernels = kernels_for(device, dtype)
    x = torch.ones(64, 64, dtype=dtype, device=device)
    ends = torch.full((1,), 64, dtype=torch.int32, device=device)
    total = torch.empty(1, 64, 64, dtype=wide, device=device)
    error: Exception | None = None
    for kernel in kernels:
        try:
            for adds in (False, True):
                kernel(total, x, x, ends, adds)
        except torch.OutOfMemoryError:
            raise
        except Exception as failed:  # little shared memory, no compiler of C, a version of Triton that lacks a name
            error = failed
        else:
            return kernel
    if kernels:
        log.warning("mst_fx: the kernel that adds gradients of experts to their sums does not run: %s", error)
    return all_groups_at_once


@functools.cache
def _widens(device: torch.device, dtype: torch.dtype, wide: torch.dtype, dims: int) -> bool:
    """Return whether this device multiplies `dtype` matrices into `wide` without a rounding in between."""
    x = torch.ones([16] * dims, dtype=dtype, device=device)
    multiply: Any = torch.mm if dims == 2 else torch.bmm
    try:
        _add_wider(multiply(x, x, out_dtype=wide), x, x)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
