"""Mixtures of experts, forward and backward: mst_fx beside activation checkpointing, in one process.

    python examples/benchmarks/experts.py                      # a GPU with 40 GB: all rows, under three minutes
    python examples/benchmarks/experts.py --work qwen3 --tokens 131072 --chunks 8192 32768 --json rows.json
    python examples/benchmarks/experts.py --kernel             # a GPU: what adds gradients to their sums, alone
    python examples/benchmarks/experts.py --small              # anywhere: tiny shapes, times only; also with --kernel

Times are medians over rounds in which every method takes its turn. "Peak" is device memory above the inputs, gradients
included. All are looped here (`min_bytes=0`); by default a plan leaves alone what saves nothing, such as 16,384 tokens
with float32 sums. Prints Markdown tables, and the reports of mst_fx.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from dataclasses import replace

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import experts_kernel
import torch
from experts_work import SMALL, WORK, Mixture, inputs_of
from peers_methods import looped, with_checkpointing
from turns import Row, measure_methods, save, tables

import mst_fx

KERNEL_TOKENS = 16384
"""Tokens of the mini-sequence whose rows `--kernel` multiplies."""


def run(name: str, work: Mixture, tokens: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """All methods on one piece of work, at one length."""
    torch._dynamo.reset()
    inputs = inputs_of(work, tokens, device)
    methods = {
        "torch.compile + checkpointing": torch.compile(with_checkpointing(work.fn)),
        "mst_fx": looped(work.fn),
        'mst_fx, `accumulate="native"`': looped(work.fn, accumulate="native"),
    }
    for chunk in args.chunks:
        methods[f"mst_fx, chunks of {chunk:,}"] = looped(work.fn, chunk_tokens=chunk)
        methods[f"mst_fx, native, chunks of {chunk:,}"] = looped(work.fn, chunk_tokens=chunk, accumulate="native")
    return measure_methods(name, tokens, methods, inputs, args.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK))
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths, in place of each work's own")
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="lengths (tokens) of mini-sequences to try")
    parser.add_argument("--kernel", action="store_true", help="the sums of gradients alone, each way on each matrix")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the rows to this file, after every length")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = f"{machine}, torch {torch.__version__}, {datetime.date.today()}, median of {args.rounds}"
    about += ", tiny shapes in place of those in the titles" if args.small else ""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one function, many backends
    rows: list[Row] = []
    print(about, flush=True)
    for name in args.work:
        work = replace(WORK[name], **SMALL) if args.small else WORK[name]
        if args.kernel:
            tokens = args.tokens or [min(KERNEL_TOKENS, *work.tokens)]
            found = [row for length in tokens for row in experts_kernel.measure(work, length, args.rounds, device)]
            print(experts_kernel.tables(found), flush=True)
            continue
        for tokens in args.tokens or work.tokens:
            rows += run(name, work, tokens, args, device)
            print(f"{name}, {tokens} tokens measured", file=sys.stderr, flush=True)
            if args.json:
                save(args.json, about, rows)
    print(tables(rows, {name: f"{work.title}, {{tokens}} tokens" for name, work in WORK.items()}))
    for report in mst_fx.reports():
        print(report)


if __name__ == "__main__":
    main()
