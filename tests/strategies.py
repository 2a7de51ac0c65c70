"""Hypothesis strategies for shapes and splits, and the property that every placement rule must have."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from hypothesis import event, note
from hypothesis import strategies as st
from looping import Call, accepted_axes, as_list, aten_graph, looped, placeholders

from mst_fx.placement.placement import Split
from mst_fx.verify.by_chunks import EXACT, all_splits, divisors

SIZES = (1, 2, 3, 4, 6)


def shapes(min_dims: int = 1, max_dims: int = 4) -> st.SearchStrategy[list[int]]:
    """Small shapes with at least one dim that can be cut."""
    return st.lists(st.sampled_from(SIZES), min_size=min_dims, max_size=max_dims).filter(lambda s: max(s) > 1)


def dims(shape: Sequence[int]) -> st.SearchStrategy[int]:
    """A dim, counted from either end."""
    return st.integers(-len(shape), len(shape) - 1)


@st.composite
def splits(draw: st.DrawFn, shape: Sequence[int]) -> Split:
    """Half of them cut a whole dim, as most streams are cut."""
    found = all_splits(shape)
    plain = [split for split in found if split.outer == split.inner == 1]
    return draw(st.sampled_from(plain) | st.sampled_from(found))


@st.composite
def broadcasts(draw: st.DrawFn, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts to `shape`."""
    kept = shape[draw(st.integers(0, len(shape))) :] if draw(st.booleans()) else shape
    return [draw(st.sampled_from((size, size, 1))) for size in kept]


@st.composite
def views(draw: st.DrawFn, shape: Sequence[int]) -> list[int]:
    """Another shape for the same memory: dims are cut into factors, and neighbours are merged."""
    factors: list[int] = []
    for size in shape:
        factor = draw(st.sampled_from(divisors(size)))
        factors += [factor, size // factor]
    cuts = draw(st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1))
    view = [factors[0]]
    for factor, keep_apart in zip(factors[1:], cuts, strict=True):
        if keep_apart:
            view.append(factor)
        else:
            view[-1] *= factor
    assert prod(view) == prod(shape)
    return view


def chunk_by_chunk(data: st.DataObject, call: Call) -> bool:
    """Split any operand anyhow: a rule refuses, or chunks of any length put together equal the whole.

    Returns whether it accepted.
    """
    sliceable = [i for i, x in enumerate(call.inputs) if all_splits(x.shape)]
    position = data.draw(st.sampled_from([sliceable[0], *sliceable]), label="split operand")
    split = data.draw(splits(call.inputs[position].shape), label="split")
    module = aten_graph(call)
    note(module.code)
    note([tuple(x.shape) for x in call.inputs])
    expected = as_list(call.function(*call.inputs))
    found = list(accepted_axes(module, placeholders(module)[position], split))
    for stages in found:
        chunk = data.draw(st.integers(1, stages.length), label="chunk")
        for result, whole in zip(looped(module, stages, call.inputs, chunk), expected, strict=True):
            torch.testing.assert_close(result, whole, **EXACT)
    event("accepted" if found else "refused")
    return bool(found)
