"""Collectors make the results of a loop: they write the outputs of the chunks to their places, or add them up in place.

A collector takes the outputs of one chunk after the other; its result is contiguous. It does with the first chunk what
it can do once for all: the host must not fall behind the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

import torch

from mst_fx.runtime.products import add_grouped_product, add_product, grouped_product, product
from mst_fx.runtime.result_kinds import Axis, Cat, Grouped, Outer, ResultKind, Rows


class Collector(Protocol):
    """Collects one result of a loop."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        """Take the outputs of the next chunk that belong to this result from `outs`."""

    def finished(self) -> torch.Tensor:
        """Return the result, after the last chunk."""


def collector_of(kind: ResultKind, total: int, length: int, memory: torch.Tensor | None = None) -> Collector:
    """Return an empty collector.

    Args:
        kind: how outputs become the result.
        total: length of the axis in positions.
        length: positions of one chunk; one chunk for all adds nothing up, and needs no other dtype for the sum.
        memory: a contiguous value of the size and dtype of a result that has a place for each chunk: it is overwritten.
    """
    if isinstance(kind, Cat):
        return _Written(kind, total, length, memory)
    if isinstance(kind, Rows):
        return _Rows(kind, total, length, memory)
    sums = _Grouped if isinstance(kind, Grouped) else _Outer if isinstance(kind, Outer) else _Sum
    return sums(kind.adds_up_in(several=total > length), kind.result)


def chunks_of(x: torch.Tensor, axis: Axis, length: int) -> Iterator[torch.Tensor]:
    """Return the chunks of `x` along the axis, contiguous, in the shapes of `chunk_shape`; views where they can be.

    Args:
        x: a whole value, of any strides.
        axis: (dim, outer, inner).
        length: positions of one chunk; the last one may have fewer.
    """
    return map(torch.Tensor.contiguous, _views(x, axis, length))


def chunk_shape(shape: Sequence[int], axis: Axis, length: int) -> list[int]:
    """Return the shape in which a body takes a chunk of a value: the axis has a dim of its own.

    So code that is compiled for any length finds the length among the sizes, and not a multiple of it.

    Args:
        shape: shape of the whole value, for any number of positions.
        axis: (dim, outer, inner).
        length: positions of the chunk.
    """
    dim = axis[0]
    return [*shape[:dim], *_factors(axis, length), *shape[dim + 1 :]]


def _factors(axis: Axis, length: int) -> list[int]:
    """Return the sizes that a dim unflattens into: the axis, and the factors around it that are not 1."""
    _, outer, inner = axis
    return [*([outer] if outer != 1 else []), length, *([inner] if inner != 1 else [])]


def _views(x: torch.Tensor, axis: Axis, length: int) -> tuple[torch.Tensor, ...]:
    """Return the chunks of `x` as views, in the shapes of `chunk_shape`."""
    dim, outer, inner = axis
    if outer != 1 or inner != 1:
        x = x.unflatten(dim, _factors(axis, x.shape[dim] // (outer * inner)))
    return _split(x, length, dim + (outer != 1))


def _split(x: torch.Tensor, length: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Return the pieces of `x` as views; one that is all of it is `x`: a short batch is not to wait for the host."""
    return (x,) if x.shape[dim] <= length else x.split(length, dim)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous value, aligned as torch allocates memory: compiled bodies may read 16 bytes at a time."""
    return x.clone() if x.data_ptr() % 16 else x


def laid_out(x: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """Return a whole value, aligned, in the layout that the bodies were made for; a copy only where it needs one.

    Args:
        x: the value, of any strides.
        strides: the strides that the bodies take; None for contiguous memory.
    """
    if strides is None:
        return aligned(x.contiguous())
    if x.stride() == strides and not x.data_ptr() % 16:
        return x
    return example(x, None, 0, strides).copy_(x)


def example(x: torch.Tensor, axis: Axis | None, length: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """Allocate memory of the shape and layout in which a body takes a value.

    Args:
        x: the whole value; the memory has its dtype and device.
        axis: (dim, outer, inner); None for a value that every chunk reads whole.
        length: positions of one chunk.
        strides: strides of such a whole value; None for contiguous memory.
    """
    shape = list(x.shape) if axis is None else chunk_shape(x.shape, axis, length)
    if strides is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


class _Allocated:
    """Allocates the whole result with the first chunk; each chunk writes its place."""

    def __init__(self, total: int, length: int, memory: torch.Tensor | None) -> None:
        self._total, self._length, self._memory = total, length, memory
        self._whole: torch.Tensor | None = None
        self._places: Iterator[torch.Tensor] = iter(())

    def _allocated(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        if self._memory is not None:
            return self._memory.view(shape)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def finished(self) -> torch.Tensor:
        assert self._whole is not None
        return self._whole


class _Written(_Allocated):
    """Copies one output of each chunk to its place."""

    def __init__(self, kind: Cat, total: int, length: int, memory: torch.Tensor | None) -> None:
        super().__init__(total, length, memory)
        self._kind = kind

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        out = next(outs)
        if self._whole is None:
            self._whole = self._allocated(self._kind.shape(out.shape, self._total), out)
            self._places = iter(_views(self._whole, self._kind.axis, self._length))
        place = next(self._places)
        place.copy_(out.view(place.shape))


class _Rows(_Allocated):
    """Adds up products of pairs of outputs; the sum is the rows of a chunk, at their place."""

    def __init__(self, kind: Rows, total: int, length: int, memory: torch.Tensor | None) -> None:
        super().__init__(total, length, memory)
        self._kind = kind

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        a, b = next(outs), next(outs)
        if self._whole is None:
            self._whole = self._allocated(self._kind.shape(self._total), a)
            *leading, columns = self._whole.shape
            rows = self._whole.view(prod(leading), columns)
            self._places = iter(_split(rows, rows.shape[0] // self._total * self._length))
        place = next(self._places)
        torch.mm(a, b, out=place)
        for _ in range(self._kind.count - 1):
            place.addmm_(next(outs), next(outs))


class _AddedUp:
    """Adds up in `dtype`, and returns the sum in dtype `result`."""

    def __init__(self, dtype: torch.dtype, result: torch.dtype) -> None:
        self._dtype, self._result = dtype, result
        self._total: torch.Tensor | None = None

    def finished(self) -> torch.Tensor:
        assert self._total is not None
        return self._total.to(self._result)


class _Sum(_AddedUp):
    """Adds up one output of each chunk."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        out = next(outs)
        if self._total is None:
            self._total = out.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            self._total.add_(out)


class _Outer(_AddedUp):
    """Adds up A^T B of two outputs of each chunk, A [n, i] and B [n, j], or batches of such."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        a, b = next(outs).mT, next(outs)
        if self._total is None:
            self._total = product(a, b, self._dtype)
        else:
            add_product(self._total, a, b)


class _Grouped(_AddedUp):
    """Adds up A^T B of each group of rows: two outputs of each chunk, A [n, i] and B [n, j], and the groups' ends."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        a, b, ends = next(outs), next(outs), next(outs)
        if self._total is None:
            self._total = grouped_product(a, b, ends, self._dtype)
        else:
            add_grouped_product(self._total, a, b, ends)
