"""Random numbers that every mini-sequence can draw again: a hash of a seed and of the element's position.

One seed a random op is drawn from torch's generator before the loop, so `torch.manual_seed` decides, and the backward
loop makes the very numbers of the forward loop, whatever the chunks. The distribution is that of the op; the numbers
are not those that eager would draw.

The hash is a 32-bit mixer of two multiplications (constants from https://github.com/skeeto/hash-prospector), in int64
without overflow: every factor is below 2^32 and 2^31.
"""

from __future__ import annotations

import torch

LOW_32 = 0xFFFFFFFF
SEEDS = 2**62


def uniform_like(x: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), multiples of 2^-24, in float32, one for each element of `x`."""
    seed = torch.randint(0, SEEDS, (), dtype=torch.int64, device=x.device)
    position = _positions(x)
    low = _mixed(torch.bitwise_xor(torch.bitwise_and(position, LOW_32), torch.bitwise_and(seed, LOW_32)))
    high = torch.bitwise_xor(torch.bitwise_right_shift(position, 32), torch.bitwise_right_shift(seed, 32))
    bits = _mixed(torch.bitwise_xor(low, high))
    return torch.bitwise_right_shift(bits, 8).to(torch.float32) * 2.0**-24


def _positions(x: torch.Tensor) -> torch.Tensor:
    """The index of each element in contiguous order, from one range a dim, so that each of them can be cut."""
    position = torch.zeros((1,) * x.dim(), dtype=torch.int64, device=x.device)
    stride: int = 1
    for dim in reversed(range(x.dim())):
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        position = position + (torch.arange(x.shape[dim], device=x.device) * stride).view(shape)
        stride = stride * x.shape[dim]
    return position


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers that spreads every bit over all."""
    for factor, shift in ((0x21F0AAAD, 16), (0x735A2D97, 15)):
        bits = torch.bitwise_xor(bits, torch.bitwise_right_shift(bits, shift))
        bits = torch.bitwise_and(bits * factor, LOW_32)
    return torch.bitwise_xor(bits, torch.bitwise_right_shift(bits, 15))
