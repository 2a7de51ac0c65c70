"""Bytes of a region's temporaries as a function of the chunk length. No policy here."""

from __future__ import annotations

import torch

from mst_fx.lower import hint
from mst_fx.placement import split_of
from mst_fx.rules.view import FREE
from mst_fx.stages import Stages


def temporary_bytes(stages: Stages, length: int) -> int:
    """Bytes of the split values that the loop makes and does not return, for `length` positions of the axis.

    Views count nothing. It is what eager execution keeps for backward or frees at the region's end at the latest; a
    compiler that fuses elementwise ops makes fewer of them.
    """
    total = 0
    for node in stages.loop:
        split = split_of(stages.placements.of[node])
        if node in stages.results or node.target in FREE or split is None:
            continue
        value: torch.Tensor = node.meta["val"]
        per_position = hint(value.numel()) // hint(split.axis_length(value.shape))
        total += per_position * length * value.element_size()
    return total
