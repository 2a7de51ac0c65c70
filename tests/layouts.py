"""Values in every layout: transposed, with gaps, expanded, overlapping, not aligned."""

from __future__ import annotations

import torch


def transposed(*shape):
    return torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape))))


def rolled_dims(*shape):
    return torch.randn(shape[-1:] + shape[:-1], dtype=torch.float64).movedim(0, -1)


def with_gaps(*shape):
    return torch.randn(*shape[:-1], 3 * shape[-1], dtype=torch.float64)[..., ::3]


def of_a_larger_one(*shape):
    return torch.randn([size + 2 for size in shape], dtype=torch.float64)[tuple(slice(1, 1 + size) for size in shape)]


def expanded_rows(*shape):
    return torch.randn(1, *shape[1:], dtype=torch.float64).expand(shape)


def expanded_columns(*shape):
    return torch.randn(*shape[:-1], 1, dtype=torch.float64).expand(shape)


def one_number(*shape):
    return torch.randn((), dtype=torch.float64).expand(shape)


def overlapping(*shape):
    return torch.randn(sum(shape), dtype=torch.float64).as_strided(shape, [1] * len(shape))


def misaligned(*shape):
    return torch.randn(torch.Size(shape).numel() + 1, dtype=torch.float64)[1:].view(shape)


LAYOUTS = [
    *(transposed, rolled_dims, with_gaps, of_a_larger_one, misaligned),
    *(expanded_rows, expanded_columns, one_number, overlapping),
]
