"""LM head + loss and MLPs, forward + backward: mst_fx beside its peers, in one process.

    python examples/benchmarks/peers.py                                # a GPU: a piece of each kind, about five minutes
    python examples/benchmarks/peers.py --work head-qwen3 --tokens 4096 16384 65536 131072 --json rows.json
    python examples/benchmarks/peers.py --from rows.json --plot peers.png
    python examples/benchmarks/peers.py --small                        # anywhere: tiny shapes, times only

Times are medians over rounds in which every method takes its turn. "Peak" is device memory above the inputs, gradients
included. Peers run with their own defaults; those that are not installed are left out. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from peers_methods import methods_of
from peers_work import WORK, inputs_of
from turns import Row, load, measure_methods, save, tables

import mst_fx


def run(name: str, tokens: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """All methods on one piece of work, at one length."""
    work = WORK[name]
    torch._dynamo.reset()
    inputs = inputs_of(work, tokens, device, small=args.small)
    methods = {
        method: fn
        for method, fn in methods_of(work, args.chunks).items()
        if not args.methods or any(part in method for part in args.methods)
    }
    return measure_methods(name, tokens, methods, inputs, args.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, nargs="+", default=["head-llama3", "swiglu-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths, in place of each work's own")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--chunks", type=int, nargs="*", default=[], help="chunk lengths (tokens) to try beside the plan's"
    )
    parser.add_argument("--methods", nargs="+", metavar="PART", help="only those whose names contain one of these")
    parser.add_argument("--json", help="write the rows to this file, after every length")
    parser.add_argument("--from", nargs="+", dest="sources", metavar="FILE", help="read rows in place of measuring")
    parser.add_argument("--plot", metavar="FILE.png", help="time and peak by length, a line a method")
    return parser.parse_args()


def measured(args: argparse.Namespace) -> tuple[str, list[Row]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = f"{machine}, torch {torch.__version__}, {datetime.date.today()}, median of {args.rounds}"
    about += ", tiny shapes in place of those in the titles" if args.small else ""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one function, many backends
    rows: list[Row] = []
    for name in args.work:
        for tokens in args.tokens or ((500,) if args.small else WORK[name].tokens):
            rows += run(name, tokens, args, device)
            print(f"{name}, {tokens} tokens measured", file=sys.stderr, flush=True)
            if args.json:
                save(args.json, about, rows)
    return about, rows


def main() -> None:
    args = parse()
    if args.sources:
        about, runs = load(args.sources, Row)
        rows = [row for part in runs for row in part]
    else:
        about, rows = measured(args)
    print(about + "\n" + tables(rows, {name: work.title for name, work in WORK.items()}))
    for report in [] if args.sources else mst_fx.reports():
        print(report)
    if args.plot:
        from peers_plot import plot

        plot(rows, args.plot)


if __name__ == "__main__":
    main()
