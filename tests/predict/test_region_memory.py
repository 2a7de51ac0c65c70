"""Predicted memory against measured memory: what is saved for backward, and the peak of a step."""

from __future__ import annotations

from dataclasses import replace

import predictions
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from memory_probe import saved_bytes
from numerics import looped
from predictions import CHUNK, HEADS, MLPS, Sizes, inputs_of, offer, peaks, peaks_without_a_loop

from mst_fx.plan.lengths import Lengths
from mst_fx.plan.offer import held

SIZES = Sizes(t=2048, d=64, ff=512, v=4096)


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("program", [*MLPS, *HEADS], ids=lambda program: program.__name__)
def test_saved_bytes(program, dtype):
    inputs = inputs_of(program, SIZES, dtype, "cpu")
    compiled = looped(program, chunk_tokens=CHUNK, inner="inductor")
    saved = saved_bytes(lambda: compiled(*inputs), inputs)
    scalars = 16 if program is predictions.cross_entropy else 0  # the mean's denominator
    assert 0 <= saved - offer(program, inputs).memory.saved <= scalars


def test_sums_are_those_of_several_chunks_where_one_would_be_long_enough():
    """A sequence that fits into one chunk is looped in two, if at all."""
    sizes = Sizes(t=64, d=64, ff=256, v=0)
    found = offer(predictions.gelu, inputs_of(predictions.gelu, sizes, torch.bfloat16, "cpu"), chunk_tokens=None)
    assert found.terms.lengths.chunk == sizes.t
    assert found.memory.backward.sums == 4 * (2 * sizes.d * sizes.ff + sizes.ff)


def test_one_chunk_needs_no_sums():
    """What is not added up is multiplied in the dtype of its result."""
    sizes, options = Sizes(t=32, d=256, ff=1024, v=0), {"dtype": torch.bfloat16, "device": "cpu", "chunk_tokens": 32}
    wide, native = (peaks(predictions.swiglu, sizes, accumulate=how, **options) for how in ("float32", "native"))
    assert wide == native


class Unpacked(torch.autograd.Function):
    """A product with a weight of eight bits."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x @ w.to(x.dtype).t()

    @staticmethod
    def backward(ctx, upstream):
        return upstream @ ctx.saved_tensors[0].to(upstream.dtype), None


def test_weights_unpacked_in_front_of_a_loop_are_there_as_long_as_it_runs():
    up, down = (torch.ones(*shape, dtype=torch.int8) for shape in ((512, 64), (64, 512)))
    x = torch.randn(64, 64, requires_grad=True)
    found = offer(lambda x, up, down: Unpacked.apply(F.gelu(Unpacked.apply(x, up)), down), [x, up, down])
    without = replace(found, memory=replace(found.memory, prologue=0))
    more, less = held(found, Lengths(32, 32)), held(without, Lengths(32, 32))
    assert more.forward - less.forward == more.backward - less.backward == 2 * 512 * 64 * 4
    assert held(found, None) == held(without, None)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", ["native", "float32"])
@pytest.mark.parametrize("chunk", [64, 512])
def test_peak_of_a_wide_head(accumulate, chunk):
    """Its gradients are most of what it holds; backward scales them in place, or while it casts them."""
    sizes = Sizes(t=512, d=512, ff=0, v=8192)
    options = {"chunk_tokens": chunk, "accumulate": accumulate}
    measured, predicted = peaks(predictions.cross_entropy, sizes, torch.bfloat16, "cpu", **options)
    assert abs(measured / predicted - 1) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [128, 512])
@pytest.mark.parametrize("program", [*MLPS, *HEADS], ids=lambda program: program.__name__)
def test_peak(program, chunk):
    if program is predictions.cross_entropy and torch.__version__ < "2.13":
        pytest.skip("2.11's C++ fuses the loss with the gradient of the logits, which then has a buffer of its own")
    measured, predicted = peaks(program, SIZES, torch.float32, "cpu", chunk_tokens=chunk)
    assert abs(measured / predicted - 1) <= 0.1


@pytest.mark.slow
def test_peak_of_experts():
    """Most of what their loop holds are the float32 sums, and not a gradient of all matrices beside them."""
    sizes = Sizes(t=1024, d=64, ff=256, v=16)
    measured, predicted = peaks(predictions.experts, sizes, torch.bfloat16, "cpu", chunk_tokens=128)
    assert abs(measured / predicted - 1) <= 0.05


@pytest.mark.parametrize(
    ("program", "sizes", "dtype"),
    [
        (predictions.swiglu, SIZES, torch.float32),
        (predictions.pre_normed, SIZES, torch.bfloat16),
        (predictions.cross_entropy, Sizes(t=512, d=512, ff=0, v=8192), torch.bfloat16),
        (predictions.capped, SIZES, torch.float32),
    ],
)
def test_peak_without_a_loop(program, sizes, dtype):
    if program is predictions.capped and torch.__version__ < "2.13":
        pytest.skip("2.11's C++ computes a tanh anew in each loop, and writes logits once")
    measured, predicted = peaks_without_a_loop(program, sizes, dtype, "cpu")
    assert abs(measured / predicted - 1) <= 0.1
