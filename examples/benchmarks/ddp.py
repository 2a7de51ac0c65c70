"""What helps where Dynamo divides a graph for DDP, and what it costs: overlap of the reduction with the backward.

    torchrun --nproc-per-node 2 examples/benchmarks/ddp.py            # GPUs: 0.9 B weights, 16,384 tokens a rank
    torchrun --nproc-per-node 2 examples/benchmarks/ddp.py --small    # anywhere: tiny shapes, gloo

A Llama without checkpointing, weights and gradients in bfloat16, no optimizer; the loss is computed in the module that
DDP wraps. The methods, each with a model of its own:

    eager              not compiled
    torch.compile      `optimize_ddp` as it is: the graph is divided, buckets are reduced while backward goes on
    mst_fx             the same: MLPs that are parted are not looped
    torch.compile, whole    `optimize_ddp=False`: one graph, whose gradients are reduced behind its backward
    mst_fx, whole      the same
    mst_fx, layers     `optimize_ddp=False`, layers compiled one by one, the head with its loss: reduced layer by layer

Methods run one after the other, each from an empty Dynamo: what it has decided about DDP for one of them would hold for
the next. Medians, after two steps of warm-up; peaks are above weights and gradients, the largest of all ranks.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
import train_lm
from longest import TINY
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mst_fx

PRESET = replace(train_lm.PRESETS["8b-layer"], hidden=2048, ffn=8192, heads=16, layers=12, vocab=32768, length=16384)
METHODS = ("eager", "torch.compile", "mst_fx", "torch.compile, whole", "mst_fx, whole", "mst_fx, layers")
WARM_UP = 2
OPTIONS = {"min_bytes": 0, "strict": True}
"""All that can be looped is, also where the default plan would see no need."""


class Head(nn.Module):
    """The last norm, the head and the loss."""

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())


class ModelAndLoss(nn.Module):
    """A Llama that gives its loss."""

    def __init__(self, preset: train_lm.Preset, device: torch.device) -> None:
        super().__init__()
        model = train_lm.build_model(preset, device).train()
        self.embed, self.rotary, self.layers = model.model.embed_tokens, model.model.rotary_emb, model.model.layers
        self.head = Head(model.model.norm, model.lm_head)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the next tokens."""
        x = self.embed(ids)
        position = self.rotary(x, torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=position)
        return self.head(x, F.pad(ids[:, 1:], (0, 1), value=-100))


class Method:
    """A model of its own under DDP, run in one way; `report` is what mst_fx did."""

    def __init__(self, name: str, preset: train_lm.Preset, device: torch.device) -> None:
        self.device, self.divided = device, "," not in name
        model = ModelAndLoss(preset, device)
        how: dict[str, Any] = {"backend": mst_fx.backend, "options": OPTIONS} if name.startswith("mst_fx") else {}
        if name.endswith("layers"):
            for part in (*model.layers, model.head):
                part.compile(dynamic=False, **how)
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        compiled = name == "eager" or name.endswith("layers")
        self.run: Callable[[torch.Tensor], torch.Tensor] = ddp if compiled else torch.compile(ddp, dynamic=False, **how)
        self.ddp = ddp

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """Run forward and backward; return seconds, and the peak above weights and gradients (GiB)."""
        with torch._dynamo.config.patch(optimize_ddp=self.divided):  # it is read when a graph is compiled
            gc.collect()
            dist.barrier()
            before = self.memory(reset=True)
            start = time.perf_counter()
            loss = self.run(ids)
            loss.backward()
            loss.item()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start, (self.memory() - before) / 2**30

    def memory(self, *, reset: bool = False) -> int:
        """Return the most bytes allocated since the last reset."""
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()


def measured(name: str, preset: train_lm.Preset, device: torch.device, ids: torch.Tensor, rounds: int) -> str:
    """Return the row of a method."""
    torch._dynamo.reset()
    before = len(mst_fx.reports())
    method = Method(name, preset, device)
    taken = [method.step(ids) for _ in range(WARM_UP + rounds)][WARM_UP:]
    looped = sum(len(report.regions) for report in mst_fx.reports()[before:])
    seconds = statistics.median(seconds for seconds, _ in taken)
    largest = torch.tensor(max(peak for _, peak in taken), device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return f"| {name} | {seconds * 1e3:,.1f} | {largest.item():.2f} | {looped} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--tokens", type=int, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    preset = TINY if args.small else PRESET
    ids = torch.randint(preset.vocab, (1, args.tokens or (128 if args.small else preset.length)), device=device)

    if dist.get_rank() == 0:
        print(
            f"{preset.layers} layers, {dist.get_world_size()} ranks, {ids.shape[1]:,} tokens, torch {torch.__version__}"
        )
        print("| | ms a step | peak GiB | regions looped |\n|---|---|---|---|", flush=True)
    for name in args.methods:
        row = measured(name, preset, device, ids, args.rounds)
        if dist.get_rank() == 0:
            print(row, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
