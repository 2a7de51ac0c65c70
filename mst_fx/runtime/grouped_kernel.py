"""The product A^T B of each group of rows, added to a sum in place, as a Triton kernel; needs Triton.

One program makes one tile of one group's matrix: it multiplies all rows of the group into float32, and only then adds
the tile to the sum. So a chunk reads and writes the sum once, and there is one rounding. No two programs write to one
element, so that the order of all additions is fixed.

Legend: n rows, i and j columns, g groups; BI, BJ, BN how many of them a program takes at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _multiply_and_add(  # type: ignore[no-untyped-def]
    total, a, b, ends, i, j, a_row, a_column, b_row, b_column,
    ADDS: tl.constexpr, ATOMIC: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    rows = tl.load(ends + group) - start
    if rows > 0 or not ADDS:  # a group without rows adds nothing
        across = (j + BJ - 1) // BJ
        at_i = (tile // across * BI + tl.arange(0, BI)).to(tl.int64)
        at_j = (tile % across * BJ + tl.arange(0, BJ)).to(tl.int64)
        at_n = tl.arange(0, BN)
        # columns behind the last one are read as the first ones: their results are not written
        from_a = a + start.to(tl.int64) * a_row + (at_i % i)[:, None] * a_column + at_n[None, :] * a_row
        from_b = b + start.to(tl.int64) * b_row + at_n[:, None] * b_row + (at_j % j)[None, :] * b_column
        product = tl.full((BI, BJ), 0.0, dtype=tl.float32)
        for done in range(0, rows, BN):
            inside = at_n < rows - done  # the rows behind are those of the next group
            some_a = tl.load(from_a, mask=inside[None, :], other=0.0)
            some_b = tl.load(from_b, mask=inside[:, None], other=0.0)
            product = tl.dot(some_a, some_b, product, input_precision="ieee")
            from_a += BN * a_row
            from_b += BN * b_row
        place = total + group * i * j + at_i[:, None] * j + at_j[None, :]
        known = (at_i < i)[:, None] & (at_j < j)[None, :]
        if ADDS and ATOMIC:
            tl.atomic_add(place, product, mask=known, sem="relaxed")
        else:
            if ADDS:
                product += tl.load(place, mask=known)
            tl.store(place, product.to(total.dtype.element_ty), mask=known)


@dataclass(frozen=True)
class GroupedKernel:
    """The kernel, with all that does not depend on sizes.

    Attributes:
        i, j, n: size of a tile, and rows at a time.
        warps, stages: of a program, and of its pipeline.
        atomic: whether a float32 sum is added to where it lies, so that no program waits for what it reads.
    """

    i: int
    j: int
    n: int
    warps: int
    stages: int
    atomic: bool = True

    def __call__(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, adds: bool) -> None:
        """Add A^T B of each group to the total, or write it there.

        Args:
            total: [g, i, j], contiguous.
            a: [n, i], of any strides.
            b: [n, j], of any strides.
            ends: [g], contiguous.
            adds: whether to add.
        """
        groups, i, j = total.shape
        tiles = triton.cdiv(i, self.i) * triton.cdiv(j, self.j)
        if not total.numel():
            return
        with torch.cuda.device(total.device) if total.is_cuda else nullcontext():
            _multiply_and_add[(tiles, groups)](
                total, a, b, ends, i, j, *a.stride(), *b.stride(),
                ADDS=adds, ATOMIC=self.atomic and total.dtype == torch.float32,
                BI=self.i, BJ=self.j, BN=self.n, num_warps=self.warps, num_stages=self.stages,
            )  # fmt: skip


HALF = (
    GroupedKernel(128, 256, 64, 8, 3),
    GroupedKernel(128, 128, 64, 8, 3),
    GroupedKernel(128, 128, 32, 8, 2),
    GroupedKernel(64, 64, 32, 4, 2),
)
"""For factors of 16 bits; each one takes less shared memory and fewer registers than the one before."""
SINGLE = (GroupedKernel(64, 64, 32, 4, 2), GroupedKernel(32, 32, 32, 4, 1))
"""For float32 factors, which are multiplied without matrix units: these would round them."""
ASYNCHRONOUS = 9
"""The compute capability from which on matrix units read shared memory: registers then hold results alone."""


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[GroupedKernel, ...]:
    """Return the kernels for factors of a dtype, the best one first; none for a dtype that has none."""
    if dtype in (torch.bfloat16, torch.float16):
        return HALF if torch.cuda.get_device_capability(device)[0] >= ASYNCHRONOUS else HALF[1:]
    return SINGLE if dtype == torch.float32 else ()
