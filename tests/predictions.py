"""Programs of one region, to compare predicted with measured memory. T tokens, D model, FF feed-forward, V classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten
from memory_probe import peak_bytes
from numerics import looped

import mst_fx
from mst_fx.plan.offer import Offer
from mst_fx.recognise.pattern import patterns
from mst_fx.survey.survey import Surveyor

CHUNK = 256


def swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def gelu(x, up, bias, down):
    return F.linear(F.gelu(F.linear(x, up, bias)), down)


def normed(x, up, down):
    return F.linear(F.relu(F.layer_norm(F.linear(x, up), (up.shape[0],))).square(), down)


def pre_normed(x, scale, gate, up, down):
    return swiglu(F.rms_norm(x, (x.shape[-1],), scale), gate, up, down)


def cross_entropy(x, w, labels):
    return F.cross_entropy(F.linear(x, w).float(), labels)


def capped(x, w, labels):
    return F.cross_entropy(30 * torch.tanh(F.linear(x, w) / 30), labels)


def experts(x, up, down, chosen):
    """Two experts a token."""
    keys, order = chosen.flatten().sort()
    ends = torch.histc(keys.float(), up.shape[0], 0, up.shape[0] - 1).cumsum(0).to(torch.int32)
    gate, value = F.grouped_mm(x[order // 2], up, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * value, down, offs=ends)
    return torch.zeros_like(x).index_add(0, order // 2, rows)


def log_probabilities(x, w, labels):
    return F.cross_entropy(F.linear(x, w).float(), labels, reduction="none")


@dataclass(frozen=True)
class Sizes:
    t: int
    d: int
    ff: int
    v: int


def inputs_of(program: Callable, sizes: Sizes, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Leaves that need gradients, and labels."""
    torch.manual_seed(0)
    t, d, ff, v = sizes.t, sizes.d, sizes.ff, sizes.v
    shapes = {
        swiglu: [(t, d), (ff, d), (ff, d), (d, ff)],
        gelu: [(t, d), (ff, d), (ff,), (d, ff)],
        normed: [(t, d), (ff, d), (d, ff)],
        pre_normed: [(t, d), (d,), (ff, d), (ff, d), (d, ff)],
        experts: [(t, d), (v, d, 2 * ff), (v, ff, d)],
    }
    leaves = shapes.get(program, [(t, d), (v, d)])
    made = [(torch.randn(shape, device=device) * 0.1).to(dtype).requires_grad_() for shape in leaves]
    if program is experts:
        return [*made, torch.randint(0, v, (t, 2), device=device)]
    return made if program in shapes else [*made, torch.randint(0, v, (t,), device=device)]


MLPS = (swiglu, gelu, normed, pre_normed)
HEADS = (cross_entropy, log_probabilities)


def peaks(program: Callable, sizes: Sizes, dtype: torch.dtype, device: str, **options) -> tuple[int, int]:
    """Bytes above the inputs in a step with a loop, measured and predicted."""
    inputs = inputs_of(program, sizes, dtype, device)
    measured = _peak(looped(program, inner="inductor", **options), inputs, device)
    return measured, mst_fx.reports()[-1].peak - _resident(inputs)


def peaks_without_a_loop(program: Callable, sizes: Sizes, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """The same without one."""
    inputs = inputs_of(program, sizes, dtype, device)
    _, report = rewritten(captured(program, *inputs))
    return _peak(torch.compile(program), inputs, device), report.peak_whole - _resident(inputs)


def _peak(compiled: Callable, inputs: list[torch.Tensor], device: str) -> int:
    upstream = torch.ones_like(compiled(*inputs))

    def step():
        compiled(*inputs).backward(upstream)
        for x in inputs:
            x.grad = None  # not at the start: a profile knows no memory that was there before it

    return peak_bytes(step, device)


def _resident(inputs: list[torch.Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in inputs)


def offer(fn: Callable, inputs: list[torch.Tensor], **options) -> Offer:
    """What the planner is told of the one region of a function."""
    config = mst_fx.Config(**{"min_bytes": 0, "chunk_tokens": CHUNK, **options})
    surveyor = Surveyor(config, patterns())
    (site,) = surveyor.survey(captured(fn, *inputs)).all_sites()
    return surveyor.offer(site)
