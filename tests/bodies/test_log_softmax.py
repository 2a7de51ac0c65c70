"""The log-softmax and the log-sum-exp of wide rows, reduced in parts, against a float64 truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import TOLERANCE, relative_error

from mst_fx.bodies import log_softmax
from mst_fx.kernels.liveness import peak

aten = torch.ops.aten
PART = 8


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch):
    monkeypatch.setattr(log_softmax, "TILE", PART)


def in_parts(x, kind):
    return log_softmax._LogSumExp.apply(x) if kind == "sum" else log_softmax._LogSoftmax.apply(x, kind == "to float")


def as_written(x, kind):
    if kind == "sum":
        return x.logsumexp(-1, keepdim=True)
    return x.log_softmax(-1, dtype=torch.float32 if kind == "to float" else None)


@settings(deadline=None, max_examples=150)
@given(
    lead=st.sampled_from([(3,), (2, 3), (1,)]),
    classes=st.integers(PART, 5 * PART),
    kind=st.sampled_from(["softmax", "to float", "sum"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    masked=st.floats(0, 0.9),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients(lead, classes, kind, dtype, scale, masked, seed):
    dtype = torch.bfloat16 if kind == "to float" else dtype
    make = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*lead, classes, generator=make, dtype=torch.float64) * scale + 40).to(dtype)
    hidden = torch.rand(*lead, classes, generator=make) < masked
    hidden[..., 0] = False
    logits[hidden] = -torch.inf

    def run(fn, x, kind):
        x = x.detach().requires_grad_()
        out = fn(x, kind)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        upstream = torch.where(out.isinf(), 0, upstream).to(out.dtype)
        return out.detach(), torch.autograd.grad(out, x, upstream)[0]

    truth = run(as_written, logits.double(), "sum" if kind == "sum" else "softmax")
    eager, ours = run(as_written, logits, kind), run(in_parts, logits, kind)
    for own, theirs, true in zip(ours, eager, truth, strict=True):
        assert own.dtype == theirs.dtype
        assert torch.equal(own.isinf(), theirs.isinf())
        own, theirs, true = (torch.where(x.isinf(), 0, x).double() for x in (own, theirs, true))
        assert relative_error(own, true) <= relative_error(theirs, true) * 1.01 + TOLERANCE[dtype]


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_a_row_of_nothing_finite(value):
    row = torch.full((1, 3 * PART + 1), value)
    assert in_parts(row, "sum").item() == value
    assert in_parts(row, "softmax").isnan().all()


@pytest.mark.parametrize(("classes", "wide"), [(8191, False), (8192, True), (9001, True)])
def test_bodies_reduce_wide_rows_in_parts(classes, wide):
    def loss(x, w, y):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, y) + logits.logsumexp(-1).square().sum()

    inputs = torch.randn(8, 4).requires_grad_(), torch.randn(classes, 4).requires_grad_(), torch.arange(8)
    looped, _ = rewritten(captured(loss, *inputs), chunk_tokens=4)
    called = [node.target for node in looped.mini_sequence_backward_0.graph.nodes]
    for target in (aten._log_softmax.default, aten.logsumexp.default):
        assert (target in called) == (not wide)


def test_a_class_that_is_all_but_sure():
    """Its log-probability is smaller than the rounding of its logit."""
    logits = torch.full((50, 4 * PART), 40.0)
    logits[:, 0] += torch.linspace(6, 10, 50)
    error = in_parts(logits, "softmax").double() - logits.double().log_softmax(-1)
    assert error[:, 0].abs().max() < 5e-7


def test_the_gradient_overwrites_the_logits():
    """As predicted for a GPU, where a kernel that reduces them as well would have to keep them."""
    inputs = torch.randn(8, 4).requires_grad_(), torch.randn(log_softmax.WIDE, 4).requires_grad_(), torch.arange(8)
    looped, _ = rewritten(captured(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), *inputs), chunk_tokens=4)

    def elements(node):
        value = node.meta["val"]
        return value.numel() if isinstance(value, torch.Tensor) else 0

    most = peak(looped.mini_sequence_backward_0.graph, elements, reductions_apart=False, ordered=True)
    assert most <= 1.3 * 4 * log_softmax.WIDE
