"""How many wide values a backward body holds at once: what becomes a buffer, and what is overwritten."""

from __future__ import annotations

import predictions
import pytest
import torch
from graphs import captured, rewritten
from torch.utils._pytree import tree_leaves

from mst_fx.kernels.liveness import peak

CHUNK = 16
SIZES = predictions.Sizes(t=64, d=32, ff=128, v=512)


@pytest.mark.parametrize(
    ("program", "reductions_apart", "ordered", "unordered"),
    [
        (predictions.swiglu, True, 4, 6),
        (predictions.swiglu, False, 4, 6),
        (predictions.gelu, True, 2, 3),
        (predictions.gelu, False, 2, 3),
        (predictions.normed, True, 2, 3),
        (predictions.normed, False, 3, 4),  # a norm's gradient does not overwrite what the same kernel reduces
        (predictions.pre_normed, True, 4, 6),  # two products of the body read what the kernel makes
        (predictions.pre_normed, False, 4, 6),
    ],
)
def test_wide_values_of_a_backward(program, reductions_apart, ordered, unordered):
    """As many as Inductor's kernels have wide arguments, on a CPU and on a GPU."""
    inputs = predictions.inputs_of(program, SIZES, torch.float32, "cpu")
    looped, _ = rewritten(captured(program, *inputs), chunk_tokens=CHUNK)

    def wide(node):
        parts = tree_leaves(node.meta["val"])
        return any(part.numel() == CHUNK * SIZES.ff for part in parts if part is not None)

    body = looped.mini_sequence_backward_0
    for in_order, expected in ((True, ordered), (False, unordered)):
        assert peak(body, wide, reductions_apart=reductions_apart, ordered=in_order) == expected
