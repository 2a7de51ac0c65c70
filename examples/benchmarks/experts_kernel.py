"""`experts.py --kernel`: what adds the gradients of experts' matrices to their sums, alone, beside other ways to do it.

Each way adds A^T B of every group of rows to a sum [E, in, out]. The rows are those of one mini-sequence. The first way
is what compilers have: all matrices are made, and then added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from experts_work import Mixture
from turns import Timed, attempt, take_turns, time_of

from mst_fx.runtime.products import all_groups_at_once, group_by_group, has_kernel

TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 2),
)
"""Columns of A and of B, rows, warps and stages of a program of the kernel."""
WAYS: dict[str, Callable[..., Any]] = {"_grouped_mm, then add": all_groups_at_once, "group by group": group_by_group}
CALLS = 10
"""That are timed together, a turn."""


@dataclass(frozen=True)
class Row(Timed):
    """One way on one matrix.

    Attributes:
        title: sizes of the product, and dtype of the sum.
        flops: of the product.
        times_ms: of its turns.
        error: what there is in place of numbers.
    """

    title: str
    method: str
    flops: float
    times_ms: tuple[float, ...] = ()
    error: str = ""


def ways_of(device: torch.device) -> dict[str, Callable[..., Any]]:
    """All that this device has, by name."""
    if device.type != "cuda":
        return WAYS
    found: dict[str, Callable[..., Any]] = {"_grouped_mm, then add": all_groups_at_once}
    if has_kernel():
        from mst_fx.runtime.grouped_kernel import GroupedKernel

        found |= {f"kernel {tiles}": GroupedKernel(*tiles) for tiles in TILES}
        found |= {f"kernel {tiles}, no atomics": GroupedKernel(*tiles, atomic=False) for tiles in TILES[:4:3]}
    return found


def measure(work: Mixture, tokens: int, rounds: int, device: torch.device) -> Iterator[Row]:
    """All ways on each matrix of a mixture, with sums in both dtypes; a way that gives other numbers is an error."""
    ways = ways_of(device)
    chosen = torch.rand(tokens, work.e, device=device).topk(work.k).indices.flatten()
    ends = torch.bincount(chosen, minlength=work.e).cumsum(0).to(torch.int32)
    for i, j in dict.fromkeys(shape[1:] for shape in work.matrices(work.h, work.f, work.e) if len(shape) == 3):
        a, b = (torch.randn(tokens * work.k, width, device=device).bfloat16() for width in (i, j))
        for dtype in (torch.float32, torch.bfloat16):
            sizes = f"{work.e} x {i:,} x {j:,}, {tokens * work.k:,} rows"
            title, flops = f"{sizes}, sum in {str(dtype).removeprefix('torch.')}", 2.0 * tokens * work.k * i * j
            total = torch.empty(work.e, i, j, dtype=dtype, device=device)
            rows = {name: Row(title, name, flops) for name in ways}
            factors = (total, a, b, ends)
            rows = {name: attempt(row, partial(checked, way=ways[name], factors=factors)) for name, row in rows.items()}
            turns = {name: partial(timed, way=way, factors=factors) for name, way in ways.items()}
            yield from take_turns(rows, turns, rounds).values()


def checked(row: Row, way: Callable[..., Any], factors: Sequence[torch.Tensor]) -> Row:
    """The row, if twice the product is what the way writes and then adds, in one group: the others are as large."""
    total, a, b, ends = factors
    for adds in (False, True):
        way(*factors, adds)
    rows = slice(int(ends[-2]), int(ends[-1]))
    exact = 2 * (a[rows].t().float() @ b[rows].float())
    error = (total[-1].float() - exact).norm() / exact.norm()
    return row if error < 1e-2 else replace(row, error=f"is wrong by {error:.1e}")


def timed(row: Row, way: Callable[..., Any], factors: Sequence[torch.Tensor]) -> Row:
    ms = time_of(partial(way, *factors, True), factors[0].device, CALLS)
    return replace(row, times_ms=(*row.times_ms, ms))


def tables(rows: Sequence[Row]) -> str:
    """A table for each product and dtype; the ratio is to the first way."""
    lines: list[str] = []
    for title in dict.fromkeys(row.title for row in rows):
        mine = [row for row in rows if row.title == title]
        lines += ["", f"| {title} | ms | ratio | TFLOPS |", "|---|---|---|---|"]
        for row in mine:
            ratio = f"{row.ms / mine[0].ms:.3f}" if not row.error and not mine[0].error else "-"
            numbers = row.error or f"{row.ms:.3f}", ratio, "-" if row.error else f"{row.flops / row.ms / 1e9:.0f}"
            lines.append(f"| {row.method} | {' | '.join(numbers)} |")
    return "\n".join(lines)
