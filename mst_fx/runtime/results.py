"""How the outputs of the chunks become the results of a loop: written to their places, or added up in place.

A result takes what the body gave for one chunk after the other, and is contiguous. What can be done once for all chunks
is done with the first: the host must not fall behind the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from mst_fx.runtime.result_kinds import Axis, Cat, Outer, ResultKind, Rows


class Result(Protocol):
    """One result of a loop."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        """Take the outputs of the next chunk that belong to this result."""

    def finished(self) -> torch.Tensor:
        """The result, after the last chunk."""


def result_of(kind: ResultKind, total: int, chunk: int) -> Result:
    """An empty result.

    Args:
        kind: how it is made.
        total: positions of the axis.
        chunk: positions in one mini-sequence; if that is all, nothing adds up, and no other dtype is needed for it.
    """
    if isinstance(kind, Cat):
        return _Written(kind, total, chunk)
    if isinstance(kind, Rows):
        return _Rows(kind, total, chunk)
    sums = _Outer if isinstance(kind, Outer) else _Sum
    return sums(kind.adds_up_in(several=total > chunk), kind.result)


def pieces(x: torch.Tensor, axis: Axis, chunk: int) -> Iterator[torch.Tensor]:
    """The mini-sequences along the axis of `x`, contiguous, in shapes as `piece_shape` has them: views if they can be.

    Args:
        x: of any strides.
        axis: (dim, outer, inner).
        chunk: positions in one mini-sequence; the last one may have fewer.
    """
    return map(torch.Tensor.contiguous, _views(x, axis, chunk))


def piece_shape(shape: Sequence[int], axis: Axis, length: int) -> list[int]:
    """The shape in which a body takes a mini-sequence of a value: the axis has a dim of its own.

    So code that is compiled for any length finds the length among the sizes, and not a multiple of it.

    Args:
        shape: of the whole value, of any number of positions.
        axis: (dim, outer, inner).
        length: positions in the mini-sequence.
    """
    dim = axis[0]
    return [*shape[:dim], *_factors(axis, length), *shape[dim + 1 :]]


def _factors(axis: Axis, length: int) -> list[int]:
    """Sizes that one dim is taken apart into: the axis, and the factors around it that are not 1."""
    _, outer, inner = axis
    return [*([outer] if outer != 1 else []), length, *([inner] if inner != 1 else [])]


def _views(x: torch.Tensor, axis: Axis, chunk: int) -> tuple[torch.Tensor, ...]:
    """The mini-sequences of `x` in its own memory, in shapes as `piece_shape` has them."""
    dim, outer, inner = axis
    if outer != 1 or inner != 1:
        x = x.unflatten(dim, _factors(axis, x.shape[dim] // (outer * inner)))
    return x.split(chunk, dim + (outer != 1))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A contiguous value where compiled bodies may read 16 bytes at a time, as from memory that torch has allocated."""
    return x.clone() if x.data_ptr() % 16 else x


def laid_out(x: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """A whole value, aligned, in the layout that the bodies were made for: itself where it lies like that.

    Args:
        x: of any strides.
        strides: those that the bodies take; None for contiguous memory.
    """
    if strides is None:
        return aligned(x.contiguous())
    if x.stride() == strides and not x.data_ptr() % 16:
        return x
    return example(x, None, 0, strides).copy_(x)


def example(x: torch.Tensor, axis: Axis | None, length: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """Memory of the shape and layout in which a body takes a value.

    Args:
        x: the whole value.
        axis: (dim, outer, inner); None for a value that is whole.
        length: positions in one mini-sequence.
        strides: of a value that is whole; None for contiguous memory.
    """
    shape = list(x.shape) if axis is None else piece_shape(x.shape, axis, length)
    if strides is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


class _Placed:
    """A result that is allocated as a whole with the first chunk, and written place by place."""

    def __init__(self, total: int, chunk: int) -> None:
        self._total, self._chunk = total, chunk
        self._whole: torch.Tensor | None = None
        self._places: Iterator[torch.Tensor] = iter(())

    def finished(self) -> torch.Tensor:
        assert self._whole is not None
        return self._whole


class _Written(_Placed):
    """One output a chunk, copied to its place."""

    def __init__(self, kind: Cat, total: int, chunk: int) -> None:
        super().__init__(total, chunk)
        self._kind = kind

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        out = next(outs)
        if self._whole is None:
            shape = self._kind.shape(out.shape, self._total)
            self._whole = torch.empty(shape, dtype=out.dtype, device=out.device)
            axis = (self._kind.dim, self._kind.outer, self._kind.inner)
            self._places = iter(_views(self._whole, axis, self._chunk))
        place = next(self._places)
        place.copy_(out.view(place.shape))


class _Rows(_Placed):
    """Pairs of factors whose products add up to the rows of a chunk, which are written where they belong."""

    def __init__(self, kind: Rows, total: int, chunk: int) -> None:
        super().__init__(total, chunk)
        self._kind = kind

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        a, b = next(outs), next(outs)
        if self._whole is None:
            self._whole = torch.empty(self._kind.shape(self._total), dtype=a.dtype, device=a.device)
            rows = self._whole.view(-1, self._whole.shape[-1])
            self._places = iter(rows.split(rows.shape[0] // self._total * self._chunk))
        place = next(self._places)
        torch.mm(a, b, out=place)
        for _ in range(self._kind.count - 1):
            place.addmm_(next(outs), next(outs))


class _AddedUp:
    """A result that adds up in `dtype`, and is given in dtype `result`."""

    def __init__(self, dtype: torch.dtype, result: torch.dtype) -> None:
        self._dtype, self._result = dtype, result
        self._total: torch.Tensor | None = None

    def finished(self) -> torch.Tensor:
        assert self._total is not None
        return self._total.to(self._result)


class _Sum(_AddedUp):
    """One output a chunk."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        out = next(outs)
        if self._total is None:
            self._total = out.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            self._total.add_(out)


class _Outer(_AddedUp):
    """Two outputs a chunk, A [n, i] and B [n, j]; A^T B adds up."""

    def add(self, outs: Iterator[torch.Tensor]) -> None:
        a, b = next(outs).t(), next(outs)
        if self._total is not None:
            _add_product(self._total, a, b)
        elif self._dtype == a.dtype:
            self._total = torch.mm(a, b)
        elif _widens(a.device, a.dtype, self._dtype):
            self._total = torch.mm(a, b, out_dtype=self._dtype)
        else:
            self._total = torch.mm(a, b).to(self._dtype)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Total += A B, in the dtype of the total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _widens(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


@functools.cache
def _widens(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether this device multiplies `dtype` matrices into `wide` without a rounding in between."""
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(x, x, out_dtype=wide)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
