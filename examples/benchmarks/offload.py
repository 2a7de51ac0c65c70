"""Checkpoints on the host: what offload="checkpoints" costs in time, and what it frees, at the shapes of Llama-3-8B.

    python examples/benchmarks/offload.py                          # a GPU: 4 layers, 65,536 and 131,072 tokens
    python examples/benchmarks/offload.py --trace trace.json.gz    # and the profile of a step with values on the host
    python examples/benchmarks/offload.py --check                  # tiny shapes, anywhere: gradients with and without
    python examples/benchmarks/offload.py --small                  # tiny shapes, anywhere

Forward and backward of checkpointed layers, norm, head and loss, batch 1, bfloat16, random weights. Layers are compiled
one by one ("layers"), or the whole model as one graph ("step"). With and without take turns of one step each, in one
process; "ratio" is the median of the ratios of two steps that ran one behind the other. "peak" includes weights and
gradients, "host" is the memory of the host that values take, "hidden" the share of the time of copies during which the
device also computed. "gradients" is the largest difference of a weight's gradient from that of a step without, relative
to its norm; without offloading, that of a second step, as a GPU need not give the same bits twice.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from longest import LAYER_CHUNK, LLAMA, TINY, checkpointed_layer, head_loss, loss_of
from torch.profiler import ProfilerActivity, profile
from train_lm import build_model
from transformers import PreTrainedModel

import mst_fx
from mst_fx.runtime.transfers import host_bytes

KINDS = ("layers", "step")
Step = Callable[[torch.Tensor], torch.Tensor]
Interval = tuple[float, float]


def make_step(model: PreTrainedModel, kind: str, offload: str | None, chunk: int, least: int | None) -> Step:
    """A training step; gives the loss."""
    options = {"strict": True, "chunk_tokens": chunk, "offload": offload, "min_bytes": least}

    def compiled(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return torch.compile(fn, dynamic=kind == "layers", fullgraph=True, backend="mst_fx", options=options)

    by_layer = kind == "layers"
    run_layer, run_head = (compiled(fn) if by_layer else fn for fn in (checkpointed_layer, head_loss))

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        return loss_of(model, input_ids, run_layer, run_head)

    run = forward if by_layer else compiled(forward)

    def step(input_ids: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss = run(input_ids)
        loss.backward()
        return loss.detach()

    return step


def seconds_of(step: Step, ids: torch.Tensor) -> float:
    finish()
    start = time.perf_counter()
    step(ids)
    finish()
    return time.perf_counter() - start


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib(step: Step, ids: torch.Tensor) -> float:
    if not ids.is_cuda:
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(ids)
    return torch.cuda.max_memory_allocated() / 2**30


def hidden(step: Step, ids: torch.Tensor, trace: str | None) -> tuple[float, float]:
    """The share of the copies' time during which kernels ran, and the GB/s of the copies."""
    if not ids.is_cuda:
        return 0.0, 0.0
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step(ids)
        finish()
    if trace:
        recorded.export_chrome_trace(trace)
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans: dict[bool, list[Interval]] = {True: [], False: []}
    for event in (e for e in on_device if not e.is_user_annotation):
        copies = "Memcpy DtoH" in event.name or "Memcpy HtoD" in event.name
        spans[copies].append((event.time_range.start, event.time_range.end))
    copying, computing = union(spans[True]), union(spans[False])
    busy = sum(end - start for start, end in copying)
    both = sum(max(0.0, min(a, b) - max(c, d)) for c, a in copying for d, b in computing)
    return (both / busy, 2 * host_bytes() / busy / 1e3) if busy else (0.0, 0.0)


def union(spans: Iterable[Interval]) -> list[Interval]:
    """Intervals that do not overlap, in order."""
    joined: list[Interval] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def rows_of(model: PreTrainedModel, kind: str, tokens: int, args: argparse.Namespace) -> Iterable[str]:
    """The rows of the table for one length."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    chunk, least = (LAYER_CHUNK, None) if not args.small else (tokens // 4, 0)
    steps = {offload: make_step(model, kind, offload, chunk, least) for offload in (None, "checkpoints")}
    losses = {offload: [step(ids).item() for _ in range(2)][-1] for offload, step in steps.items()}
    peaks = {offload: peak_gib(step, ids) for offload, step in steps.items()}
    first = gradients(model, steps[None], ids)
    differ = {offload: largest(first, gradients(model, step, ids)) for offload, step in steps.items()}
    del first
    seconds: dict[str | None, list[float]] = {offload: [] for offload in steps}
    for turn in range(args.rounds):
        for offload in sorted(steps, key=str, reverse=bool(turn % 2)):
            seconds[offload].append(seconds_of(steps[offload], ids))
    pairs = zip(seconds["checkpoints"], seconds[None], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    share, rate = hidden(steps["checkpoints"], ids, args.trace)
    for offload, each in seconds.items():
        told = f"{statistics.median(each):.3f} | {ratio if offload else 1.0:.3f} | {peaks[offload]:.2f}"
        copies = f"{host_bytes() / 2**30:.2f} | {share:.3f} | {rate:.1f}" if offload else "- | - | -"
        found = f"{losses[offload]:.6f} | {differ[offload]:.1e}"
        yield f"| {kind} | {tokens:,} | {offload or '-'} | {told} | {copies} | {found} |"


def check(model: PreTrainedModel) -> bool:
    """Compare losses and gradients with and without; several lengths, a retained graph, a forward without backward."""
    right = True
    for kind in KINDS:
        torch._dynamo.reset()
        found: dict[str | None, list[torch.Tensor]] = {}
        for offload in (None, "checkpoints"):
            torch.manual_seed(0)
            step, values = make_step(model, kind, offload, 512, 0), []
            for tokens in (2048, 3072, 2048, 1000):
                ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
                values += [step(ids), *(p.grad.clone() for p in model.parameters())]
            found[offload] = values
        finish()
        error = largest(found[None], found["checkpoints"])
        sent = host_bytes()
        right &= error < 1e-5 and sent > 0
        print(f"{kind}: largest difference {error:.1e}, {sent / 2**20:.1f} MiB on the host")
    print(str(mst_fx.reports()[-1]))
    return right


def gradients(model: PreTrainedModel, step: Step, ids: torch.Tensor) -> list[torch.Tensor]:
    step(ids)
    return [p.grad for p in model.parameters() if p.grad is not None]  # the next step makes new ones


def largest(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Return the largest difference between two values, relative to the norm of the other."""
    return max(relative(a, b) for a, b in zip(one, other, strict=True))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp_min(1e-30)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 131_072])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--trace", help="a file for the profile of the last step")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--check", action="store_true", help="compare gradients, at tiny shapes")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = replace(TINY if args.small or args.check else LLAMA, length=2**18, layers=args.layers)
    model = build_model(preset, device).train()
    if args.check:
        sys.exit(0 if check(model) else 1)
    print("| compiled | tokens | offload | s | ratio | peak GiB | host GiB | hidden | GB/s | loss | gradients |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        for tokens in args.tokens:
            torch._dynamo.reset()
            for row in rows_of(model, kind, tokens, args):
                print(row, flush=True)


if __name__ == "__main__":
    main()
