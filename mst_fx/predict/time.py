"""Milliseconds that a loop adds to a step: recomputation, and what shorter matrix products lose. No policy here.

The model is a roofline (Williams et al., 2009): a matrix product computes its flops at the rate that its rows allow,
any other op moves its bytes at the bandwidth of the memory. The rates are a table, not measured at compile time, so
that every rank and every run makes the same plan.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from mst_fx.bodies.work import Work
from mst_fx.core.sizes import Hint
from mst_fx.placement.rules import shape_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.predict.extent import Extent
from mst_fx.predict.region_memory import RegionMemory, is_sink

EFFICIENCY = ((1, 0.005), (64, 0.31), (128, 0.6), (256, 0.9), (512, 1.0))
"""(rows, share of the best rate) of bfloat16 products of [rows, 4096] and [4096, 14336], on an H200."""
FLOPS_PER_CYCLE = {8: 2048, 9: 4096, 10: 8192}
"""Flops per cycle of one multiprocessor's matrix units in half precision, dense, by major compute capability."""
REACHED_FLOPS, REACHED_BYTES = 0.66, 0.88
"""Shares of the nominal rates that large products and copies reach, on an H200."""
SINGLE = 0.07
"""The rate of float32 products, as a share of that of half precision."""
HOST_MS = 0.03
"""Milliseconds that the host takes for one chunk, where the device has nothing else to do."""


@dataclass(frozen=True)
class Device:
    """The facts of a device that plans depend on; none of them changes while a program runs.

    Attributes:
        kind: "cuda", "cpu", ...
        memory: total bytes of memory.
        flops_per_ms: rate of large matrix products in half precision.
        bytes_per_ms: bandwidth of the memory.
    """

    kind: str
    memory: int
    flops_per_ms: float
    bytes_per_ms: float


H100 = Device("cuda", 79 * 2**30, 7e11, 2.95e9)


def device_of(device: torch.device) -> Device:
    """Describe a device by the properties that its driver reports, and by nominal rates where it reports none.

    Tensors on "meta" are shapes of a model for a GPU: that of this machine, an H100 where it has none.
    """
    if device.type == "meta":
        return device_of(torch.device("cuda")) if torch.cuda.is_available() else H100
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clock_khz = getattr(properties, "clock_rate", 1_500_000)
        cycles = FLOPS_PER_CYCLE.get(properties.major, 1024) * properties.multi_processor_count
        memory_khz = getattr(properties, "memory_clock_rate", 2_600_000)
        bytes_per_ms = 2 * memory_khz * getattr(properties, "memory_bus_width", 5120) / 8
        return Device("cuda", properties.total_memory, REACHED_FLOPS * cycles * clock_khz, REACHED_BYTES * bytes_per_ms)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return Device(device.type, total, 5e7 * cores, 2e7)


@dataclass(frozen=True)
class RegionCost:
    """Work of a region, forward and backward, over the whole length.

    Attributes:
        flops: flops of its matrix products in the forward.
        recomputed: those of them that a loop recomputes for backward.
        rows: rows for one position of the product with the fewest rows.
        bytes_summed: bytes read and written for each chunk to add up gradients.
        bytes_finished: bytes read and written once, to cast and to scale the sums.
        half: whether the products are in half precision.
        once_more: whether a loop recomputes in a checkpointed block, too, what this block has recomputed before.
    """

    flops: float
    recomputed: float
    rows: float
    bytes_summed: int
    half: bool
    bytes_finished: int = 0
    once_more: bool = False

    def added_ms(self, device: Device, chunk: int, length: int, *, repeated: bool) -> float:
        """Predict the milliseconds that a loop adds to a training step.

        Args:
            device: the device that it runs on.
            chunk: positions of one chunk.
            length: positions of the whole axis.
            repeated: whether backward recomputes the forward in any case (activation checkpointing).
        """
        rate = device.flops_per_ms * (1.0 if self.half or device.kind == "cpu" else SINGLE)
        again = 0.0 if repeated and not self.once_more else self.recomputed / (rate * efficiency(self.rows * chunk))
        slower = 3 * self.flops / rate * (1 / efficiency(self.rows * chunk) - 1 / efficiency(self.rows * length))
        chunks = -(-length // chunk)
        summed = (chunks - 1) * (HOST_MS + self.bytes_summed / device.bytes_per_ms)
        return again + slower + summed + self.bytes_finished / device.bytes_per_ms


def efficiency(rows: float) -> float:
    """Return the share of the best rate that a matrix product of this many rows reaches, interpolated in the table."""
    position = bisect_right(EFFICIENCY, (rows, 1.0))
    if position == 0:
        return EFFICIENCY[0][1]
    if position == len(EFFICIENCY):
        return EFFICIENCY[-1][1]
    (low, a), (high, b) = EFFICIENCY[position - 1 : position + 1]
    return a + (b - a) * (rows - low) / (high - low)


def cost_of(work: Work, memory: RegionMemory, extent: Extent, at: Hint) -> RegionCost:
    """Count the flops of a region's matrix products, and the bytes that its loop reads and writes besides.

    Args:
        work: of the region.
        memory: of the region.
        extent: of its axis.
        at: tells sizes that vary.
    """
    stages, loop = work.stages, memory.backward or memory.forward
    cast = loop.sums + loop.returned if loop.cast else 0
    kept = {stages.results[i] for i in work.reused}
    flops = {node: _flops(node, at) for node in stages.products}
    again = [node for node in flops if node not in kept and not is_sink(stages, node, at)]
    return RegionCost(
        flops=sum(flops.values()),
        recomputed=sum(flops[node] for node in again) if work.backward == "recompute" else 0.0,
        rows=extent.tokens_per_position / extent.sharing,
        bytes_summed=2 * (loop.sums + loop.apart),
        bytes_finished=cast + memory.saved + memory.scaled,
        half=stages.stream.meta["val"].dtype in (torch.float16, torch.bfloat16),
        once_more=bool(stages.projections),
    )


def _flops(product: Node, at: Hint) -> float:
    """Return the flops of a product: two for each element of the result and each term of its sum."""
    left = factors(product)[0]
    return 2.0 * at(prod(shape_of(product))) * at(shape_of(left)[-1])
