"""What the loop itself costs the host: microseconds of Python for one mini-sequence, the bodies left out.

    python examples/benchmarks/host_overhead.py                  # anywhere

The loops are those of a head and of a gated MLP, on tensors of 16 bytes a chunk, with bodies that do nothing; what
remains is cutting the operands and adding up or writing the results, with the calls of torch that do it. Among them are
the matrix products of gradients, which any way of running calls; the next column is what such calls alone take. The
last column is a call of a loop over one chunk: what a batch costs that is too short to be divided, as lengths that vary
have it, with that chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch

from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.loop_operator import run_loop

CHUNKS = 2000
ROWS = (1, 1, 1)  # the axis of the tokens: dim 1 of [batch, tokens, features]
SUM = ("sum", torch.float32, torch.float32)
CAT = ("cat", *ROWS)
OUTER = ("outer", torch.float32, torch.float32)


def rows(products: int) -> tuple[Any, ...]:
    return ("rows", products, ROWS, (1, 0, 1))


LOOPS = {  # split operands, whole ones, results
    "head, gradients in the forward": (1, 3, (SUM, rows(1), OUTER)),
    "gated MLP, forward": (1, 3, (rows(1),)),
    "gated MLP, backward": (2, 3, (rows(2), OUTER, OUTER, OUTER)),
    "gated MLP and its norm, backward": (2, 4, (CAT, SUM, OUTER, OUTER, OUTER)),
}


def microseconds(
    split: int, whole: int, outs: Sequence[tuple[Any, ...]], chunks: int = CHUNKS, rounds: int = 7
) -> float:
    """Of one chunk, in the best of several runs of loops over so many."""
    ins = (*repeat(ROWS, split), *repeat(None, whole))
    operands = [torch.zeros(1, chunks if axis else 1, 4) for axis in ins]  # each chunk starts aligned
    count = sum(2 * kind[1] if kind[0] == "rows" else 2 - (kind in (SUM, CAT)) for kind in outs)
    made = [torch.zeros(1, 1)] * count
    spec = (VERSION, 1, ins, tuple(outs))

    def run() -> None:
        for _ in range(CHUNKS // chunks):
            run_loop((lambda _: made, None), spec, list(operands))

    return fastest(run, rounds)


def fastest(run: Callable[[], Any], rounds: int) -> float:
    """Microseconds of a chunk in the best of several runs over all of them."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best / CHUNKS * 1e6


def products(outs: Sequence[tuple[Any, ...]]) -> int:
    """Calls of matrix products that a chunk makes for these results."""
    return sum(kind[1] if kind[0] == "rows" else kind[0] == "outer" for kind in outs)


def microseconds_of_product(rounds: int = 7) -> float:
    """Of one product of matrices, added to another one."""
    total, a, b = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)

    def run() -> None:
        for _ in range(CHUNKS):
            total.addmm_(a, b)

    return fastest(run, rounds)


def main() -> None:
    product = microseconds_of_product()
    print("| loop | us a chunk | of it, products | us a call of one chunk |\n|---|---|---|---|")
    for name, loop in LOOPS.items():
        numbers = (microseconds(*loop), products(loop[2]) * product, microseconds(*loop, chunks=1))
        print(f"| {name} | {' | '.join(f'{number:.1f}' for number in numbers)} |")


if __name__ == "__main__":
    main()
