"""Which modules of the user a loop stands for, for errors at run time.

Generated code and the keys of caches hold no paths, so that layers that are alike share their code. The pass, which
runs in every process before a cache is asked, leaves the paths here, by the literals of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

SHOWN = 3
"""Number of regions that an error names."""


class Place(NamedTuple):
    """A region with a loop.

    Attributes:
        pattern: name of the pattern that recognised it.
        module: path of its module, "" at the top.
        weights: shapes of operands that every chunk reads as a whole.
    """

    pattern: str
    module: str
    weights: frozenset[tuple[int, ...]]


_places: dict[tuple[Any, ...], dict[Place, None]] = {}


def remember(place: Place, *specs: tuple[Any, ...]) -> None:
    """Store which region the loops with these literals stand for."""
    for spec in specs:
        _places.setdefault(spec, {})[place] = None


def out_of_memory(spec: tuple[Any, ...], operands: Sequence[torch.Tensor]) -> str:
    """Return what is said where a loop runs out of memory: its region, or those that are alike, and what to do.

    Args:
        spec: the literals of the loop.
        operands: its operands.
    """
    known, shapes = list(_places.get(spec, ())), {tuple(x.shape) for x in operands}
    fitting = [place for place in known if place.weights <= shapes] or known
    names = [f"{place.pattern} at {place.module or 'the top'}" for place in fitting]
    where = " or ".join(names[:SHOWN]) + (f" or {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    path = fitting[0].module if fitting and fitting[0].module else "*"
    return (
        f"mst_fx: out of memory in the loop of {where or 'a region'}, in chunks of {spec[1]} positions. Shorter chunks "
        f"take less: options={{'modules': {{{path!r}: {{'chunk_tokens': ...}}}}}}, or 'chunk_tokens' or "
        "'memory_budget' for all regions"
    )
