"""Convolutions whose kernel is one position wide are products over channels: MLPs, gates and heads made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from fuzzing.harness import indices, weight

B, C, H, V = 2, 8, 32, 96  # sequences or images, channels, wide channels, classes
ONE_WIDE = {"1-d": (F.conv1d, (24,)), "2-d": (F.conv2d, (6, 5)), "3-d": (F.conv3d, (4, 3, 5))}
"""The convolution, and the positions of a sequence, an image or a volume."""


def kernel(out: int, into: int, positions: tuple[int, ...]) -> torch.Tensor:
    return weight(out, into, *(1,) * len(positions), scale=0.4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("conv", "positions"), ONE_WIDE.values(), ids=ONE_WIDE.keys())
def test_an_mlp(conv, positions, channels_last):
    def program(x, up, bias, down):
        return x + conv(F.gelu(conv(F.group_norm(x, 1), up, bias)), down)

    def given(_):
        x = leaf(B, C, *positions)
        last = (0, *range(2, x.dim()), 1)
        if channels_last:
            x = x.detach().permute(last).contiguous().movedim(-1, 1).requires_grad_()
        return x, kernel(H, C, positions), weight(H), kernel(C, H, positions)

    (report,) = beside_eager(program, given, inner="aot_eager")
    assert [region.pattern for region in report.regions] == ["mlp"]


@pytest.mark.parametrize(("conv", "positions"), ONE_WIDE.values(), ids=ONE_WIDE.keys())
def test_a_gated_mlp(conv, positions):
    def program(x, gate, up, down):
        return conv(F.silu(conv(x, gate)) * conv(x, up), down)

    def given(_):
        wide = [kernel(H, C, positions) for _ in range(2)]
        return leaf(B, C, *positions), *wide, kernel(C, H, positions)

    (report,) = beside_eager(program, given, inner="aot_eager")
    assert [region.pattern for region in report.regions] == ["gated_mlp"]


@pytest.mark.parametrize(("conv", "positions"), ONE_WIDE.values(), ids=ONE_WIDE.keys())
def test_a_head(conv, positions):
    def program(x, head, labels):
        return F.cross_entropy(conv(x, head), labels)

    def given(_):
        return leaf(B, C, *positions), kernel(V, C, positions), indices(V, B, *positions)

    (report,) = beside_eager(program, given, inner="aot_eager")
    assert [region.pattern for region in report.regions] == ["head"]


def test_transposed_ones_and_a_linear_layer_behind():
    def program(x, up, bias, down):
        wide = F.conv_transpose1d(x, up, bias)
        return F.linear(F.gelu(wide).transpose(1, 2), down)

    def given(_):
        return leaf(B, C, 24), weight(C, H, 1), weight(H), weight(C, H)

    (report,) = beside_eager(program, given, inner="aot_eager")
    assert [region.pattern for region in report.regions] == ["mlp"]


@pytest.mark.parametrize("how", [{"stride": 2}, {"padding": 1}, {"groups": 2}], ids=["stride", "padding", "groups"])
def test_what_is_no_product_over_all_channels_is_left_alone(how):
    def program(x, up, down):
        return F.conv1d(F.gelu(F.conv1d(x, up, **how)), down)

    def given(_):
        return leaf(B, C, 24), weight(H, C // how.get("groups", 1), 1), weight(C, H, 1)

    (report,) = beside_eager(program, given, inner="aot_eager")
    assert not report.regions
