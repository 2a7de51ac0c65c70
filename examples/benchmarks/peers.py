"""LM head + loss, SwiGLU MLP, mixture of experts, forward + backward: mst_fx beside its peers, in one process.

    python examples/benchmarks/peers.py                 # a GPU: Llama-3-8B's shapes, about five minutes
    python examples/benchmarks/peers.py --small         # anywhere: tiny shapes, times only

Times are medians over rounds in which every method takes its turn, in random order: one untimed step, then a few timed
in a row, so that clocks, which follow the power that the last kernels drew, are fair to all. "Peak" is device
memory above the inputs, gradients included. Peers that are not installed are left out. Prints a Markdown table; --json
writes the numbers.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import mst_fx

Step = Callable[[], Any]
IN_A_ROW = 3


@dataclass
class Row:
    """One method on one piece of work."""

    work: str
    method: str
    ms: float
    peak_gib: float
    ratio: float = 0.0
    error: str = ""


def head_loss(x, w, y):
    return F.cross_entropy(F.linear(x, w).float(), y)


def swiglu(x, g, u, d):
    return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)


def experts(x_TH, weights_TK, experts_TK, up, down):
    """Tokens sorted by expert, multiplied group by group, brought back and added up over K."""
    keys, order = torch.sort(experts_TK.reshape(-1))
    ends = torch.histc(keys.int(), up.shape[0], 0, up.shape[0] - 1).cumsum(0, dtype=torch.int32)
    rows = F.grouped_mm(x_TH[order // weights_TK.shape[1]], up.transpose(-2, -1), offs=ends)
    gate, value = rows.chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * value, down.transpose(-2, -1), offs=ends)
    rows = rows * weights_TK.reshape(-1)[order, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return rows[inverse].view(*weights_TK.shape, -1).sum(1)


def looped(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="mst_fx", options={"strict": True, "min_bytes": 0, **options})


def auto_chunked(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(
        fn,
        options={"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 1, "auto_chunker.num_chunk": 8},
    )


def head_methods(chunks: Sequence[int]) -> dict[str, Callable[..., Any]]:
    methods: dict[str, Callable[..., Any]] = {
        "torch.compile": torch.compile(head_loss),
        "mst_fx, native accumulation": looped(head_loss, accumulate="native"),
        "mst_fx": looped(head_loss),
        "eager": head_loss,
        "Inductor auto_chunker, 8 chunks": auto_chunked(head_loss),
    }
    for chunk in chunks:
        methods[f"mst_fx, native, chunk {chunk}"] = looped(head_loss, accumulate="native", chunk_tokens=chunk)
        methods[f"mst_fx, chunk {chunk}"] = looped(head_loss, chunk_tokens=chunk)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        methods["Liger fused linear cross-entropy"] = lambda x, w, y: liger(w, x, y)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        methods["cut-cross-entropy"] = linear_cross_entropy
    except ImportError:
        pass
    return methods


def recomputing_methods(fn: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The ways to run what can be recomputed in backward."""

    def checkpointed(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(fn, *args, use_reentrant=False)

    return {
        "torch.compile + checkpoint": torch.compile(checkpointed),
        "mst_fx, native accumulation": looped(fn, accumulate="native"),
        "mst_fx": looped(fn),
        "torch.compile": torch.compile(fn),
        "eager": fn,
    }


def mlp_methods(chunks: Sequence[int]) -> dict[str, Callable[..., Any]]:
    methods = recomputing_methods(swiglu)
    for chunk in chunks:
        methods[f"mst_fx, chunk {chunk}"] = looped(swiglu, chunk_tokens=chunk)
    try:
        from liger_kernel.ops.tiled_mlp import apply_tiled_mlp

        def liger(x, g, u, d):
            weights = {"g": g, "u": u, "d": d}

            class Holder(torch.nn.Module):
                pass

            holder = Holder()
            for name, weight in weights.items():
                setattr(holder, name, weight)
            return apply_tiled_mlp(lambda m, part: swiglu(part, m.g, m.u, m.d), holder, x, None, [g, u, d])

        methods["Liger tiled MLP"] = liger
    except ImportError:
        pass
    return methods


def experts_methods(chunks: Sequence[int]) -> dict[str, Callable[..., Any]]:
    methods = recomputing_methods(experts)
    for chunk in chunks:
        methods[f"mst_fx, native, chunk {chunk}"] = looped(experts, accumulate="native", chunk_tokens=chunk)
    return methods


def make_step(fn: Callable[..., Any], inputs: Sequence[torch.Tensor], upstream: torch.Tensor | None) -> Step:
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        fn(*inputs).backward(upstream)

    return step


def measure(
    work: str, steps: dict[str, Step], rounds: int, device: torch.device, leaves: Sequence[torch.Tensor]
) -> list[Row]:
    """Warm every method up, read its peak alone, then time all of them in turn."""
    rows: dict[str, Row] = {}
    for name, step in steps.items():
        try:
            for _ in range(3):
                step()
            rows[name] = Row(work, name, 0.0, peak_of(step, device, leaves))
        except Exception as error:  # a peer that fails is a result
            rows[name] = Row(
                work, name, float("nan"), float("nan"), error=f"{type(error).__name__}: {str(error)[:100]}"
            )
    alive = [name for name in steps if not rows[name].error]
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        random.shuffle(alive)
        for name in alive:
            steps[name]()  # clocks depend on the power that what ran before drew: let that be the method itself
            times[name].append(time_of(steps[name], device))
    for name in alive:
        rows[name].ms = statistics.median(times[name])
    reference = rows[next(iter(steps))].ms
    for row in rows.values():
        row.ratio = row.ms / reference
    return list(rows.values())


def peak_of(step: Step, device: torch.device, leaves: Sequence[torch.Tensor]) -> float:
    """GiB above the inputs in one step; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def time_of(step: Step, device: torch.device) -> float:
    """Milliseconds of one step, the mean of a few in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            step()
        return (time.perf_counter() - start) * 1e3 / IN_A_ROW
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(IN_A_ROW):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / IN_A_ROW


def table(rows: list[Row]) -> str:
    lines = ["| work | method | ms | ratio | peak GiB |", "|---|---|---|---|---|"]
    last = ""
    for row in rows:
        work, last = ("" if row.work == last else row.work), row.work
        numbers = row.error or f"{row.ms:.1f} | {row.ratio:.3f} | {row.peak_gib:.2f}"
        lines.append(f"| {work} | {row.method} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--chunks", type=int, nargs="*", default=[], help="chunk lengths (tokens) to try beside the plan's"
    )
    parser.add_argument("--work", choices=["head", "mlp", "experts"], nargs="*", default=["head", "mlp", "experts"])
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head, mlp = ((500, 64, 1000), (500, 64, 256)) if args.small else ((16384, 4096, 128256), (65536, 4096, 14336))
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one function, many backends

    def tensor(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.float32) * scale).to(dtype).requires_grad_()

    rows: list[Row] = []
    if "head" in args.work:
        t, h, v = head
        x_TH, w_VH = tensor(t, h, scale=1.0), tensor(v, h)
        inputs = [x_TH, w_VH, torch.randint(0, v, (t,), device=device)]
        steps = {name: make_step(fn, inputs, None) for name, fn in head_methods(args.chunks).items()}
        rows += measure(f"LM head + CE, {t:,} x {h:,} x {v:,}", steps, args.rounds, device, [x_TH, w_VH])
        del inputs, steps, x_TH, w_VH
        gc.collect()
    if "mlp" in args.work:
        t, h, f = mlp
        leaves = [tensor(t, h, scale=1.0), tensor(f, h), tensor(f, h), tensor(h, f)]
        upstream = torch.randn(t, h, device=device, dtype=torch.float32).to(dtype)
        steps = {name: make_step(fn, leaves, upstream) for name, fn in mlp_methods(args.chunks).items()}
        rows += measure(f"SwiGLU MLP, {t:,} x {h:,} x {f:,}", steps, args.rounds, device, leaves)
        del steps, leaves
        gc.collect()
    if "experts" in args.work and device.type == "cuda":  # a CPU's grouped product is no yardstick
        t, h, f, e, k = (512, 64, 128, 8, 2) if args.small else (131072, 2048, 768, 128, 8)
        x_TH, up, down = tensor(t, h, scale=1.0), tensor(e, 2 * f, h), tensor(e, h, f)
        weights, chosen = torch.topk(torch.rand(t, e, device=device), k)
        leaves = [x_TH, weights.to(dtype).requires_grad_(), up, down]
        inputs, upstream = [*leaves[:2], chosen, up, down], torch.randn_like(x_TH)
        steps = {name: make_step(fn, inputs, upstream) for name, fn in experts_methods(args.chunks).items()}
        work = f"{e} experts, {k} a token, {t:,} x {h:,} x {f:,}"
        rows += measure(work, steps, args.rounds, device, leaves)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, mst_fx on {datetime.date.today()}, {dtype}, median of {args.rounds}")
    print(table(rows))
    for report in mst_fx.reports():
        print(report)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
