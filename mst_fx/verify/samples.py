"""Random numbers for a run of a region: its live-ins, and the gradients of its outputs.

A generator of our own draws them. A graph does not say what an integer may be: a label must be below the number of
classes, and may be the label to ignore. So `KINDS` are tried until the program can compute with one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from mst_fx.core.sizes import seen
from mst_fx.core.values import fake_value
from mst_fx.placement.placement import Split
from mst_fx.placement.rules.counting import DISTINCT
from mst_fx.recognise.region import needs_gradient
from mst_fx.verify.excerpt import Excerpt, dense_like_strides

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """A kind of numbers to draw.

    Attributes:
        signed: whether floats are normally distributed; otherwise they are above zero.
        marked: whether some integers are those that the region compares with, such as a label to ignore.
        below: upper bound of the integers; None for the smallest size of a matrix.
    """

    signed: bool = True
    marked: bool = True
    below: int | None = None


KINDS = (Kind(), Kind(marked=False), Kind(True, False, 2), Kind(False, False, 2), Kind(False, False, 1))


@dataclass(frozen=True)
class Samples:
    """The inputs of a run, on the CPU, in the dtypes of the program.

    Attributes:
        live_ins: a tensor or a plain value for each live-in.
        upstream: the gradient of each output, None where it gets none.
    """

    live_ins: tuple[Any, ...]
    upstream: tuple[torch.Tensor | None, ...]


def draw(excerpt: Excerpt, kind: Kind, seed: int, detached: Container[Node]) -> Samples:
    """Draw the inputs of a run.

    Args:
        excerpt: the region that runs.
        kind: kind of the numbers.
        seed: seed of the generator.
        detached: outputs that get no gradient.
    """
    region, stages = excerpt.region, excerpt.work.stages
    placeholders = [node for node in stages.graph.nodes if node.op == "placeholder"]
    are_split = [isinstance(stages.placements.of.get(node), Split) for node in placeholders]
    values = [fake_value(node) for node in region.live_ins]
    matrices = [shape_in(excerpt, v) for v, split in zip(values, are_split, strict=True) if not split and _dims(v) > 1]
    below = kind.below or min((size for shape in matrices for size in shape if size > 1), default=2)
    drawing = _Drawing(
        replace(kind, below=below), _marks(excerpt) if kind.marked else (), torch.Generator().manual_seed(seed)
    )
    live_ins = [
        drawing.distinct(shape_in(excerpt, value), value.dtype)
        if node.meta.get(DISTINCT)
        else _drawn(excerpt, drawing, value, split)
        for node, value, split in zip(placeholders, values, are_split, strict=True)
    ]
    inside = set(region.nodes)
    upstream = [
        drawing.floats(shape_in(excerpt, fake_value(node)), fake_value(node).dtype)
        if needs_gradient(node, inside) and node not in detached
        else None
        for node in region.outputs
    ]
    return Samples(tuple(live_ins), tuple(upstream))


@dataclass(frozen=True)
class _Drawing:
    kind: Kind
    marks: Sequence[int]
    generator: torch.Generator

    def floats(self, shape: Sequence[int], dtype: torch.dtype, fan_in: int = 1) -> torch.Tensor:
        if self.kind.signed:
            return (torch.randn(shape, generator=self.generator) / sqrt(fan_in)).to(dtype)
        return ((torch.rand(shape, generator=self.generator) + 0.01) / fan_in).to(dtype)

    def integers(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.randint(0, self.kind.below or 2, shape, generator=self.generator)
        for mark in self.marks:
            drawn = torch.where(torch.rand(shape, generator=self.generator) < 0.2, mark, drawn)
        return drawn.to(dtype)

    def distinct(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Draw integers of which none is there twice in a row."""
        below = max(self.kind.below or 2, shape[-1])
        return torch.rand(*shape[:-1], below, generator=self.generator).argsort()[..., : shape[-1]].to(dtype)


def _drawn(excerpt: Excerpt, drawing: _Drawing, value: Any, split: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return plain(excerpt, value)
    shape = shape_in(excerpt, value)
    if value.dtype == torch.bool:
        return torch.rand(shape, generator=drawing.generator) < 0.5
    if not (value.is_floating_point() or value.is_complex()):
        return drawing.integers(shape, value.dtype)
    return drawing.floats(shape, value.dtype, 1 if split or len(shape) < 2 else max(1, shape[-1]))


def _marks(excerpt: Excerpt) -> tuple[int, ...]:
    compared = [node for node in excerpt.work.stages.graph.nodes if node.target in (aten.ne.Scalar, aten.eq.Scalar)]
    return tuple(sorted({node.args[1] for node in compared if type(node.args[1]) is int}))


def _dims(value: Any) -> int:
    return value.dim() if isinstance(value, torch.Tensor) else 0


def shape_in(excerpt: Excerpt, value: torch.Tensor) -> list[int]:
    """Return the shape that a value has in the run."""
    return [excerpt.measure(size) for size in value.shape]


def plain(excerpt: Excerpt, value: Any) -> Any:
    """Return a live-in that is no tensor, as a plain number."""
    if isinstance(value, torch.SymFloat):
        known = seen(value)
        return 0.5 if known is None else known  # one that depends on the data was not captured
    return excerpt.measure(value) if isinstance(value, torch.SymInt) else value


Convert: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def live_ins_of(excerpt: Excerpt, samples: Samples, convert: Convert) -> list[Any]:
    """Return live-ins with the strides that they have in the program; those that need a gradient ask for it.

    Args:
        excerpt: the region that runs.
        samples: the drawn numbers.
        convert: changes dtype or device first; it takes a value and the captured value.
    """
    given = []
    for node, value in zip(excerpt.region.live_ins, samples.live_ins, strict=True):
        if isinstance(value, torch.Tensor):
            fake = fake_value(node)
            strides = [excerpt.measure(stride) for stride in fake.stride()]
            value = _laid_out(convert(value, fake), strides).requires_grad_(fake.requires_grad)
        given.append(value)
    return given


def _laid_out(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """Copy a value to these strides; where they leave large gaps or overlap, to a dense tensor in their order."""
    repeated = [stride == 0 and size > 1 for size, stride in zip(x.shape, strides, strict=True)]
    once = x[tuple(slice(0, 1) if again else slice(None) for again in repeated)] if any(repeated) else x
    room = dense_like_strides(strides, once.shape, x.dtype, x.device)
    if not any(repeated) and _is_apart(once.shape, strides) and _reach(once.shape, strides) <= 4 * x.numel() + 64:
        room = torch.empty_strided(once.shape, strides, dtype=x.dtype, device=x.device)
    return room.copy_(once).expand(x.shape).detach()


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_apart(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether no two elements share memory."""
    dims = sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1)
    return all(
        stride > sum((size - 1) * step for step, size in dims[:position]) for position, (stride, _) in enumerate(dims)
    )


def as_given(value: torch.Tensor, captured: torch.Tensor) -> torch.Tensor:
    """Move a value to the program's device."""
    return value.to(captured.device)


def in_float64(value: torch.Tensor, captured: torch.Tensor) -> torch.Tensor:
    """Convert a float to float64."""
    return value.double() if value.is_floating_point() else value


def nudged(value: torch.Tensor, captured: torch.Tensor, eps: float, seed: int) -> torch.Tensor:
    """Move a value to the program's device; change a float by about `eps` of itself."""
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        value = (value.double() * (1 + eps * noise)).to(value.dtype)
    return value.to(captured.device)


def lowest_precision(excerpt: Excerpt) -> torch.dtype:
    """Return the coarsest of the floating-point dtypes that the region computes in."""
    nodes = (*excerpt.region.live_ins, *excerpt.region.nodes)
    values = [fake_value(node) for node in nodes] + [node.meta.get("val") for node in excerpt.work.stages.graph.nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
