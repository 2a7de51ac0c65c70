"""Option `verify`: what is right is said to be, a fault costs the loop that has it, and nobody notices the runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from experts import DENSE, GROUPED, Experts, routed
from experts import D as EXPERTS_D
from graphs import tensors
from models import FF, D, MlpLM, NanoGPT, V, tokens
from numerics import gradients, relative_error
from verifying import assert_verified, wrong_body

import mst_fx
from mst_fx.runtime import loop_operator, mini_sequence, results
from mst_fx.verify import verify

ON = {"verify": True, "strict": True, "min_bytes": 0, "chunk_tokens": 16, "inner": "eager"}


def compiled(fn, dynamic=None, **options):
    torch._dynamo.reset()
    return torch.compile(fn, backend=mst_fx.backend, options={**ON, **options}, dynamic=dynamic)


def report_of(fn, *inputs, dynamic=None, **options):
    compiled(fn, dynamic, **options)(*inputs)
    return mst_fx.reports()[-1]


def test_is_off_and_then_never_called(monkeypatch):
    def fail(*args):
        raise AssertionError("verified without being asked")

    monkeypatch.setattr(verify, "verified", fail)
    report = report_of(MlpLM(), *tokens(), verify=False)
    assert [(region.verified, region.verification) for region in report.regions] == [(None, "")] * 2
    assert "erified" not in str(report)
    assert mst_fx.Config().verify is False
    with pytest.raises(TypeError, match="verify"):
        mst_fx.Config(verify=1)


@pytest.mark.parametrize(
    ("dtype", "accumulate"),
    [(torch.float64, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "native"), (torch.float16, "float32")],
)
def test_right_in_every_dtype(dtype, accumulate):
    report = report_of(MlpLM().to(dtype), *tokens(2), accumulate=accumulate)
    assert_verified(report, regions=2)
    assert str(report).count("Verified at its own sizes.") == 2


def reads_views(x_btd, up_fd, down_df):
    """Reads its tokens from every second position, and its weights transposed and from an expanded row."""
    x = x_btd[:, ::2]
    return (F.gelu(x @ up_fd.t()) @ down_df).sum(-1)


def strided():
    x, up, down = torch.randn(2, 74, D), torch.randn(FF, D).t().contiguous().t(), torch.randn(1, D).expand(FF, D)
    return reads_views, (x.requires_grad_(), up.requires_grad_(), down)


def dropout():
    return lambda x, w, v: F.dropout(F.gelu(x @ w), 0.3) @ v, tensors((2, 37, D), (D, FF), (FF, D))


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def own_gradients():
    return lambda x, w, v: Rounded.apply(4 * F.gelu(x @ w)) @ v, tensors((2, 37, D), (D, FF), (FF, D))


def own_gradients_beside_dropout():
    return lambda x, w, v: Rounded.apply(4 * F.dropout(x @ w, 0.3)) @ v, tensors((2, 37, D), (D, FF), (FF, D))


def no_grad_inside():
    def fn(x, w, v):
        h = x @ w
        with torch.no_grad():
            scale = h.abs().amax(-1, keepdim=True)
        return (h / scale).relu() @ v

    return fn, tensors((2, 37, D), (D, FF), (FF, D))


def autocast():
    def fn(x, w, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.gelu(x @ w) @ v

    return fn, tensors((2, 37, D), (D, FF), (FF, D))


def ignored():
    def fn(x, w, labels):
        return F.cross_entropy((x @ w).flatten(0, 1), labels.flatten(), ignore_index=7, label_smoothing=0.1)

    return fn, [*tensors((2, 37, D), (D, V)), torch.randint(0, V, (2, 37))]


def accuracy():
    def fn(x, w, labels):
        logits = x @ w
        return logits.logsumexp(-1).sum(), (logits.argmax(-1) == labels).sum()

    return fn, [*tensors((2, 37, D), (D, V)), torch.randint(0, V, (2, 37))]


CASES = (
    strided,
    dropout,
    own_gradients,
    own_gradients_beside_dropout,
    no_grad_inside,
    autocast,
    ignored,
    accuracy,
)


@pytest.mark.parametrize("case", CASES)
def test_right_whatever_is_inside(case):
    fn, inputs = case()
    assert_verified(report_of(fn, *inputs), regions=1)


@pytest.mark.parametrize("form", [*GROUPED[:1], *DENSE[:1]])
def test_right_with_experts(form):
    report = report_of(Experts(form).bfloat16(), torch.randn(24, EXPERTS_D).bfloat16(), routed(24))
    assert_verified(report, regions=1)


def test_right_for_any_length():
    assert_verified(report_of(MlpLM(), *tokens(2, 37), dynamic=True), regions=2)


def test_alike_regions_are_run_once(monkeypatch):
    runs = []
    found = verify.verified
    monkeypatch.setattr(verify, "verified", lambda *args: runs.append(args) or found(*args))
    assert_verified(report_of(NanoGPT(layers=3), *tokens(ignored=0)), regions=4)
    assert len(runs) == 2


def wrong_sum(monkeypatch):
    """Products of mini-sequences but the first are not added."""
    monkeypatch.setattr(results, "add_product", lambda total, a, b: None)


def wrong_scale(monkeypatch):
    """A gradient that was made in the forward is not multiplied with the one that comes in."""
    monkeypatch.setattr(mini_sequence, "_scaled", lambda grad, factor, dtype: grad.to(dtype))


def wrong_memory(monkeypatch):
    """Gradients are read as if they were contiguous."""
    right = loop_operator.chunks_of

    def chunks_of(x, axis, length):
        strides = torch.empty(x.shape, device="meta").stride()
        return right(x if x.requires_grad else x.as_strided(x.shape, strides), axis, length)

    monkeypatch.setattr(loop_operator, "chunks_of", chunks_of)


@pytest.mark.parametrize(
    ("fault", "patterns", "dtype"),
    [
        (wrong_body, ["gated_mlp"], torch.bfloat16),
        (wrong_sum, ["gated_mlp", "head"], torch.float16),
        (wrong_scale, ["head"], torch.float32),
        (wrong_memory, ["gated_mlp"], torch.float64),
    ],
)
def test_a_fault_costs_the_loops_that_have_it(monkeypatch, fault, patterns, dtype):
    fault(monkeypatch)
    model, inputs = MlpLM().to(dtype), tokens(2)
    report = report_of(model, *inputs)
    assert [(refusal.pattern, refusal.reason) for refusal in report.refusals] == [(p, "DIFFERS") for p in patterns]
    assert len(report.regions) == 2 - len(patterns)
    assert all(region.verified for region in report.regions)


def test_a_refusal_names_value_size_and_line_and_nothing_is_wrong(monkeypatch):
    wrong_body(monkeypatch)
    model, inputs = MlpLM().double(), tokens(2)
    refusal = report_of(model, *inputs).refusals[0]
    assert "the gradient of l_self_modules_mlp_modules_down_parameters_weight_ by 1.0e-01 (eager by " in refusal.text
    assert "self.down(F.silu" in refusal.source
    assert "report" in refusal.advice
    truth = gradients(model, model, inputs)
    for name, value in gradients(model, compiled(model), inputs).items():
        assert relative_error(value, truth[name]) < 1e-10, name


def test_what_raises_differs(monkeypatch):
    def fail(*args):
        raise RuntimeError("no sum")

    monkeypatch.setattr(results, "add_product", fail)
    assert "it raises RuntimeError: no sum" in report_of(MlpLM(), *tokens(2)).refusals[0].text


def seen_by(fn):
    """What a user's hooks and generators notice of a compile and a backward: tensors saved, and the next numbers."""
    torch.manual_seed(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        loss = fn(*tokens(2))
    modes = torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()
    return saved, torch.get_rng_state().tolist(), modes, float(loss.detach())


def test_nobody_notices():
    model = MlpLM()
    off, on = (seen_by(compiled(model, verify=on)) for on in (False, True))
    assert off == on
    with torch.no_grad():
        compiled(model)(*tokens(2))
        assert not torch.is_grad_enabled()
    inputs = tokens(2)
    with torch.device("meta"):
        assert_verified(report_of(model, *inputs), regions=2)


def test_right_where_returned_logits_are_detached():
    def fn(x, w, labels):
        logits = x @ w
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    inputs = [*tensors((2, 37, D), (D, V)), torch.randint(0, V, (2, 37))]
    assert_verified(report_of(fn, *inputs, returned_logits="detach"), regions=1)


def test_a_gradient_of_nothing_but_rounding_is_no_fault():
    """Softmax does not see a shift of all logits: eager's gradient of it and the loop's are two kinds of noise."""

    def fn(x, w, shifts, labels):
        logits = x @ w
        for shift in shifts.unbind():
            logits = logits + shift
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    inputs = [*tensors((2, 37, D), (D, V), (5,)), torch.randint(0, V, (2, 37))]
    assert_verified(report_of(fn, *inputs), regions=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_of_nothing_but_rounding_is_no_fault(dtype):
    """The divergence of a distribution from itself is zero; what eager computes for it is noise, and so is ours."""

    def fn(x, w):
        logits = x @ w
        return F.kl_div(logits.log_softmax(-1), logits.detach().softmax(-1), reduction="batchmean")

    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors((37, D), (D, V))]
    assert_verified(report_of(fn, *inputs), regions=1)
