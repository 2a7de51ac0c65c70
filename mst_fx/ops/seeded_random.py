"""Random numbers that every chunk can draw again: a hash of a seed and of the element's position.

For each random op, one seed is drawn from torch's generator before the loop. So `torch.manual_seed` decides, and the
backward loop makes the same numbers as the forward loop, whatever the chunks. The distribution is that of the op; the
numbers are not those that eager execution draws.

The hash is a 32-bit mixer of two multiplications (constants from https://github.com/skeeto/hash-prospector), in int64
without overflow: every factor is below 2^32 and 2^31.
"""

from __future__ import annotations

import torch

LOW_32 = 0xFFFFFFFF
SEEDS = 2**62


def uniform_like(x: torch.Tensor) -> torch.Tensor:
    """Return uniform numbers in [0, 1), multiples of 2^-24, in float32 and in the shape of `x`."""
    seed = torch.randint(0, SEEDS, (), dtype=torch.int64, device=x.device)
    position = _positions(x)
    low = _mixed(torch.bitwise_xor(torch.bitwise_and(position, LOW_32), torch.bitwise_and(seed, LOW_32)))
    high = torch.bitwise_xor(torch.bitwise_right_shift(position, 32), torch.bitwise_right_shift(seed, 32))
    bits = _mixed(torch.bitwise_xor(low, high))
    return torch.bitwise_right_shift(bits, 8).to(torch.float32) * 2.0**-24


def _positions(x: torch.Tensor) -> torch.Tensor:
    """Return the contiguous index of each element as int64, summed from one range for each dim: each can be split."""
    position = torch.zeros((1,) * x.dim(), dtype=torch.int64, device=x.device)
    stride: int = 1
    for dim in reversed(range(x.dim())):
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        position = position + (torch.arange(x.shape[dim], device=x.device) * stride).view(shape)
        stride = stride * x.shape[dim]
    return position


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """Return a bijection of 32-bit numbers that spreads every bit over all bits."""
    for factor, shift in ((0x21F0AAAD, 16), (0x735A2D97, 15)):
        bits = torch.bitwise_xor(bits, torch.bitwise_right_shift(bits, shift))
        bits = torch.bitwise_and(bits * factor, LOW_32)
    return torch.bitwise_xor(bits, torch.bitwise_right_shift(bits, 15))
