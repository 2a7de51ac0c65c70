"""Ops that the model of memory does not know are told, with how sure the peaks are; those that it knows are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten, tensors
from torch.utils.checkpoint import checkpoint

from mst_fx.report.report import Report
from mst_fx.report.unknown_ops import UnknownOp

T, D = 64, 16


@torch.library.custom_op("mst_fx_tests::roughly", mutates_args=())
def roughly(x: torch.Tensor) -> torch.Tensor:
    """It may allocate anything."""
    return x.round()


@roughly.register_fake
def _(x):
    return torch.empty_like(x)


torch.library.register_autograd("mst_fx_tests::roughly", lambda ctx, grad: grad)


def report_of(program, *inputs):
    return rewritten(captured(program, *inputs))[1]


def attention(x):
    q = F.layer_norm(x, (D,)).view(1, T, 2, D // 2).transpose(1, 2)
    return F.dropout(F.scaled_dot_product_attention(q, q, q, is_causal=True), 0.1).sort(-1).values.sum()


def mlp(x, up, down):
    return F.linear(F.gelu(F.linear(x, up)), down).logsumexp(-1).mean()


@pytest.mark.parametrize("program", [attention, mlp])
def test_what_decomposes_and_attention_are_known(program):
    inputs = tensors((T, D)) if program is attention else tensors((T, D), (4 * D, D), (D, 4 * D))
    report = report_of(program, *inputs)
    assert (report.unknown_ops, report.how_sure) == ((), "")
    assert "allocate besides" not in str(report)


def test_an_op_of_another_library_is_told_with_its_line_and_bytes():
    """Once for each checkpointed block that runs it."""
    (x,) = tensors((T, D))

    def program(x):
        for _ in range(2):
            x = checkpoint(lambda y: roughly(y.sin()), x, use_reentrant=False)
        return roughly(x).sum()

    report = report_of(program, x)
    assert sum(op.count for op in report.unknown_ops) == 3
    for op in report.unknown_ops:
        assert (op.op, op.bytes) == ("mst_fx_tests.roughly.default", 2 * T * D * 4)
        assert "roughly(" in op.source
    assert report.how_sure.startswith("the peaks count what 3 ops read and make, 24.0 KiB, and nothing that they allo")
    assert report.how_sure in " ".join(map(str.strip, str(report).splitlines()))
    assert report.to_dict()["how_sure"] == report.how_sure


def test_a_kernel_of_a_library_is_told_without_its_parameters():
    image, weight = torch.randn(2, 3, 8, 8), torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    (op,) = report_of(lambda image, weight: F.conv2d(image, weight).sum(), image, weight).unknown_ops
    assert (op.op, op.bytes) == ("aten.convolution.default", 4 * (2 * 3 * 8 * 8 + 2 * 4 * 6 * 6))


def test_the_text_leaves_out_small_shares_of_the_peak_and_tells_the_largest():
    ops = tuple(UnknownOp("lib.f", f"layers.{layer}", "a.py:1: f(x)", 10) for layer in range(2))
    other = UnknownOp("lib.g", "", "a.py:2: g(x)", 7)
    report = Report(peak=1000, peak_whole=1000, unknown_ops=ops).joined(Report(unknown_ops=(other,)))
    assert [(op.module, op.count) for op in report.unknown_ops] == [("layers.*", 2), ("", 1)]
    assert "2 x lib.f at layers.* and 1 more kind" in report.how_sure
    for peak, told in ((27 * 50, True), (27 * 50 + 1, False)):
        text = str(Report(peak=peak, peak_whole=peak, unknown_ops=report.unknown_ops))
        assert ("allocate besides" in text) == ("a.py:1: f(x)" in text) == told
