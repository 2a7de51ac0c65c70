"""Every loss, metric and head of `losses`: values and gradients are eager's, and the logits never exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import losses
import pytest
import torch
from losses import CROSS_ENTROPY, DISTILLATION, HEADS, PER_TOKEN, REINFORCEMENT, RETURNED, SHIFTED, B, D, T, V
from memory_probe import peak_bytes, saved_bytes
from torch.utils._pytree import tree_leaves

import mst_fx

LOGITS = B * T * V * 8  # bytes
CHUNK = 8  # tokens
SEVERAL_RESULTS = {
    "sequence_level_ratio",  # a ratio of each sequence, known when its last token is
    "dpo",
    "orpo",
    "kto",
    "reduction_none",
    "label_smoothing_none",
    "class_weights_none",
    "k_dim_none",
    "probabilities_none",
    "binary_none",
    "squared_error_none",
    "log_softmax_and_gather",
    "gather_minus_logsumexp",
    "row_by_row",
    "cross_entropy_as_log_probabilities",
    "log_probabilities_and_entropy",
    "loss_and_top_k",
    "two_cuts",
}
"""Programs without one scalar that all gradients pass: their backward recomputes."""


WITHOUT_GRADIENTS = ("only_a_metric", "reference_model", "dpo", "kto")
"""Programs with a head that needs no gradient."""


def inputs() -> list[torch.Tensor]:
    """Hidden states, head and labels."""
    torch.manual_seed(0)
    x, w = torch.randn(B, T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64) * 0.5
    return [x.requires_grad_(), w.requires_grad_(), torch.randint(0, V, (B, T))]


def step(fn: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results, then the gradients of their weighted sum."""
    for tensor in tensors[:2]:
        tensor.grad = None
    results = tree_leaves(fn(*tensors))
    weights = [torch.sin(torch.arange(1.0, r.numel() + 1, dtype=torch.float64)).view(r.shape) for r in results]
    terms = [(r * w).sum() for r, w in zip(results, weights, strict=True) if r.requires_grad]
    if terms:
        sum(terms).backward()
    grads = [t.grad for t in tensors[:2] if t.grad is not None]
    return [value.detach().double() for value in (*results, *grads)]


def looped(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"min_bytes": 0, "chunk_tokens": CHUNK, "strict": True, "inner": "aot_eager", **options}
    return torch.compile(fn, backend=mst_fx.backend, options=options)


def check(fn: Callable[..., Any], **options: Any) -> mst_fx.Report:
    """Compare with eager; every graph's report."""
    tensors = inputs()
    expected = step(fn, tensors)
    before = len(mst_fx.reports())
    values = step(looped(fn, **options), tensors)
    tolerance = 1e-5 if ".float()" in inspect.getsource(fn) or fn is HEADS["autocast_head"] else 1e-10
    assert len(values) == len(expected)
    for value, exact in zip(values, expected, strict=True):
        assert float((value - exact).norm() / exact.norm().clamp_min(1e-30)) <= tolerance
    (report,) = mst_fx.reports()[before:]
    return report


def cases(*groups: dict[str, losses.Program]) -> Any:
    named = {name: fn for group in groups for name, fn in group.items()}
    return pytest.mark.parametrize(("name", "fn"), list(named.items()), ids=list(named))


FEW_TOKENS = ("last_token", "last_tokens")
"""Programs whose logits are cut to a few, which are returned: no loop is needed."""


@cases(CROSS_ENTROPY, SHIFTED, PER_TOKEN, REINFORCEMENT, DISTILLATION, HEADS)
def test_logits_never_exist(name, fn):
    report = check(fn)
    if name not in FEW_TOKENS:
        expected = set() if name == "only_a_metric" else {"recompute" if name in SEVERAL_RESULTS else "in_forward"}
        expected |= {"none"} if name in WITHOUT_GRADIENTS else set()
        assert {region.backward for region in report.regions} == expected
        assert not report.refusals
    tensors = inputs()
    compiled = looped(fn)
    assert saved_bytes(lambda: compiled(*tensors), tensors) < LOGITS / 4
    assert peak_bytes(lambda: step(compiled, tensors)) < LOGITS
    if name != "under_checkpoint":
        assert peak_bytes(lambda: step(fn, tensors)) > LOGITS


@cases(RETURNED)
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_returned_logits_exist_once(name, fn, inner):
    report = check(fn, inner=inner)
    (region,) = report.regions
    assert region.returned_bytes == LOGITS
    assert region.returned_gradient_bytes == (0 if name == "loss_and_detached_logits" else LOGITS)
    tensors = inputs()
    compiled, plain = looped(fn, inner=inner), looped(fn, inner=inner, disable="head")

    def backward_of_the_first(fn):
        for tensor in tensors[:2]:
            tensor.grad = None
        first, logits = fn(*tensors)
        first.sum().backward()
        return logits

    peak, plain_peak = (peak_bytes(lambda fn=fn: backward_of_the_first(fn)) for fn in (compiled, plain))
    gradients = 0 if name == "loss_and_detached_logits" else 3 if name == "shifted_loss_and_logits" else 1
    assert peak < (1.6 + gradients) * LOGITS
    if name != "shifted_loss_and_logits":
        assert peak < plain_peak


@pytest.mark.parametrize("name", [name for name in RETURNED if name != "loss_and_detached_logits"])
def test_detached_logits_have_no_gradient(name):
    fn, tensors = RETURNED[name], inputs()
    first, logits = fn(*tensors)
    first.sum().backward()
    expected = [first, logits, *(t.grad for t in tensors[:2])]
    for t in tensors[:2]:
        t.grad = None
    compiled = looped(fn, returned_logits="detach")

    def run():
        for t in tensors[:2]:
            t.grad = None
        first, logits = compiled(*tensors)
        assert not logits.requires_grad
        first.sum().backward()
        return [first, logits, *(t.grad for t in tensors[:2])]

    for value, exact in zip(run(), expected, strict=True):
        torch.testing.assert_close(value.detach(), exact.detach(), rtol=1e-10, atol=1e-12)
    (region,) = mst_fx.reports()[-1].regions
    assert (region.returned_bytes, region.returned_gradient_bytes) == (LOGITS, 0)
    gradients = 2 if name == "shifted_loss_and_logits" else 0  # of the cut logits, and padded
    assert peak_bytes(run) < (1.6 + gradients) * LOGITS
