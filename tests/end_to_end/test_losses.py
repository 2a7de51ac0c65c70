"""Every loss, metric and head of `losses`: values and gradients are eager's, and the logits never exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import losses
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager
from graphs import captured, rewritten
from losses import (
    CHECKPOINTED,
    CROSS_ENTROPY,
    DISTILLATION,
    HEADS,
    MARKED,
    PER_TOKEN,
    PIECES,
    REINFORCEMENT,
    RETURNED,
    SHIFTED,
    B,
    D,
    T,
    V,
)
from memory_probe import peak_bytes, saved_bytes
from torch.utils._pytree import tree_leaves

import mst_fx
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence

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
    "expected_values",
    "under_checkpoint",
    *CHECKPOINTED,
    *(PIECES.keys() - {"log_probabilities_joined_again", "sequence_by_sequence", "joined_along_the_tokens"}),
}
"""Programs without one scalar that all gradients pass, or with a checkpoint: their backward recomputes."""


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


def check(fn: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], mst_fx.Report]:
    """Compare with eager; what was compiled, and its report."""
    tensors = inputs()
    expected = step(fn, tensors)
    before = len(mst_fx.reports())
    compiled = looped(fn, **options)
    values = step(compiled, tensors)
    tolerance = 1e-5 if ".float()" in inspect.getsource(fn) or fn is HEADS["autocast_head"] else 1e-10
    assert len(values) == len(expected)
    for value, exact in zip(values, expected, strict=True):
        assert float((value - exact).norm() / exact.norm().clamp_min(1e-30)) <= tolerance
    (report,) = mst_fx.reports()[before:]
    return compiled, report


def cases(*groups: dict[str, losses.Program]) -> Any:
    named = {name: fn for group in groups for name, fn in group.items()}
    return pytest.mark.parametrize(("name", "fn"), list(named.items()), ids=list(named))


FEW_TOKENS = ("last_token", "last_tokens")
"""Programs whose logits are cut to a few, which are returned: no loop is needed."""


@cases(CROSS_ENTROPY, SHIFTED, PER_TOKEN, REINFORCEMENT, DISTILLATION, HEADS, CHECKPOINTED, PIECES, MARKED)
def test_logits_never_exist(name, fn):
    compiled, report = check(fn, inner="eager")
    if name not in FEW_TOKENS:
        expected = set() if name == "only_a_metric" else {"recompute" if name in SEVERAL_RESULTS else "in_forward"}
        expected |= {"none"} if name in WITHOUT_GRADIENTS else set()
        assert {region.backward for region in report.regions} == expected
        assert not report.refusals
    tensors = inputs()
    assert saved_bytes(lambda: compiled(*tensors), tensors) < LOGITS / 4
    assert peak_bytes(lambda: step(compiled, tensors)) < LOGITS
    if name != "under_checkpoint":
        assert peak_bytes(lambda: step(fn, tensors)) > LOGITS


@cases(CHECKPOINTED)
def test_checkpointed_heads_save_no_gradients(name, fn):
    compiled, tensors = looped(fn), inputs()
    weights_as_rolled, shifted_and_normed = 3 * 8 * V * D, 2 * 8 * B * T * D
    allowed = weights_as_rolled if "several" in name else shifted_and_normed if "norm" in name else 0
    assert saved_bytes(lambda: compiled(*tensors), tensors) <= allowed + 64  # and the count of labels


RETURNED_WITHIN = [
    *[(name, "aot_eager") for name in RETURNED],
    *[(name, "inductor") for name in ("loss_and_logits", "shifted_loss_and_logits")],
]


@pytest.mark.parametrize(("name", "inner"), RETURNED_WITHIN)
def test_returned_logits_exist_once(name, inner):
    fn = RETURNED[name]
    compiled, report = check(fn, inner=inner)
    (region,) = report.regions
    assert region.returned_bytes == pytest.approx(LOGITS, rel=0.01)
    detached = name == "loss_and_detached_logits"
    assert region.returned_gradient_bytes == (0 if detached else region.returned_bytes)
    tensors = inputs()

    def backward_of_the_first(fn):
        first, logits = fn(*tensors)
        first.sum().backward()
        for tensor in tensors[:2]:
            tensor.grad = None  # not at the start: a profile knows no memory that was there before it
        return logits

    peak = peak_bytes(lambda: backward_of_the_first(compiled))
    plain = looped(fn, inner=inner, disable="head")
    plain_peak = peak_bytes(lambda: backward_of_the_first(plain))
    # autograd has one gradient for a returned view and one for what it views
    gradients = {"loss_and_detached_logits": 0, "loss_and_views_of_logits": 2}.get(name, 1)
    assert peak < (1.6 + gradients) * LOGITS
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
    assert region.returned_bytes == pytest.approx(LOGITS, rel=0.01)
    assert region.returned_gradient_bytes == 0
    assert peak_bytes(run) < (2.2 if name == "shifted_loss_and_logits" else 1.6) * LOGITS  # joined of two parts


def test_a_small_part_of_detached_logits_has_its_gradient():
    def program(x, w, y):
        scores = F.linear(x, w).log_softmax(-1)
        return F.nll_loss(scores.flatten(0, 1), y.flatten()), scores[..., 7]

    (report,) = beside_eager(program, lambda _: inputs(), returned_logits="detach")
    assert [region.returned_bytes for region in report.regions] == [0]


@pytest.mark.parametrize(("name", "inner"), [*RETURNED_WITHIN, ("loss_and_logits", "eager")])
def test_dropped_logits_never_exist(name, inner):
    fn, tensors = RETURNED[name], inputs()

    def first_of(fn):
        return lambda *args: fn(*args)[0]

    truth = step(first_of(fn), tensors)
    compiled = looped(fn, returned_logits="drop", inner=inner)
    assert compiled(*tensors)[1] == None  # noqa: E711 - an object that says why, or None under `enable`
    for value, exact in zip(step(first_of(compiled), tensors), truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)
    report = mst_fx.reports()[-1]
    assert [entry.bytes for entry in report.dropped] == [pytest.approx(LOGITS, rel=0.01)]
    assert [region.returned_bytes for region in report.regions] == [0]
    assert peak_bytes(lambda: step(first_of(compiled), tensors)) < LOGITS
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors)[1], fn(*tensors)[1])


def test_logits_that_the_loss_is_made_of_elsewhere_are_not_dropped():
    def predictions(x, w, y):
        logits = x @ w.t()
        return (logits.argmax(-1) == y).double().mean(), logits

    tensors = inputs()
    accuracy, logits = looped(predictions, returned_logits="drop")(*tensors)
    assert len(mst_fx.reports()[-1].regions) == 1
    torch.testing.assert_close((accuracy, logits), predictions(*tensors))
    assert logits.requires_grad


@pytest.mark.parametrize("name", ["loss_and_logits", "loss_and_upcast_logits", "log_probabilities_and_logits"])
def test_returned_logits_are_not_computed_again(name):
    assert products_in_backward(RETURNED[name]) == 0  # those of the gradients leave the body as factors
    assert products_in_backward(PER_TOKEN["log_softmax_and_gather"]) == 1


def products_in_backward(fn):
    x, w, y = inputs()
    gm, report = rewritten(captured(fn, x.detach().flatten(0, 1).requires_grad_(), w, y.flatten()))
    assert report.regions[0].backward == "recompute"
    (call,) = (node for node in gm.graph.nodes if node.target is mini_sequence)
    forward = LoopSpec(*CallSpec(*call.args[4]).forward_spec)
    assert {kind[0] for kind in forward.outs} <= {"cat", "sum"}  # the body needs the logits: no product leaves it
    return sum(node.target == torch.ops.aten.mm.default for node in gm.mini_sequence_backward_0.graph.nodes)


@pytest.mark.parametrize("name", ["log_softmax_and_gather", "gather_minus_logsumexp"])
def test_backward_of_a_picked_class_scatters_nothing(name):
    gm, report = rewritten(captured(PER_TOKEN[name], *inputs()))
    assert len(report.regions) == 1
    ops = {node.target for node in gm.mini_sequence_backward_0.graph.nodes}
    assert torch.ops.aten.nll_loss_backward.default in ops
    assert torch.ops.aten.scatter_add.default not in ops


def test_a_class_is_picked_by_a_short_integer():
    def program(x, w, y):
        return -F.linear(x, w).log_softmax(-1).gather(-1, y.int().unsqueeze(-1)).mean()

    (report,) = beside_eager(program, lambda _: inputs())
    assert len(report.regions) == 1


def test_a_gradient_scaler_reaches_half_precision():
    """Gradients of 1e-9 a logit vanish in fp16 unless the scale is there when they are made."""
    tensors = inputs()
    exact = torch.autograd.grad(small(*tensors) * 2.0**14, tensors[:2])
    half = [t.detach().half().requires_grad_() for t in tensors[:2]]
    compiled = looped(small)
    (compiled(*half, tensors[2]) * 2.0**14).backward()
    (region,) = mst_fx.reports()[-1].regions
    assert region.backward == "recompute"
    for tensor, truth in zip(half, exact, strict=True):
        assert float((tensor.grad.double() - truth).norm() / truth.norm()) < 1e-2
    late = torch.autograd.grad(small(*half, tensors[2]), half)
    assert float((late[1].double() * 2.0**14 - exact[1]).norm() / exact[1].norm()) > 0.1  # without the scale


def small(x, w, y):
    return (F.cross_entropy(*losses.flat(x, w, y), reduction="none") * 2.0**-12).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sliced_contiguous_logits", "grpo", "loss_and_accuracy", "jensen_shannon"])
def test_one_compile_serves_every_length(name):
    fn = {**SHIFTED, **PER_TOKEN, **REINFORCEMENT, **DISTILLATION}[name]
    compiled = looped(fn)
    before = len(mst_fx.reports())
    for length in (T, 150, 201, 130, 163):
        torch.manual_seed(length)
        x, labels = torch.randn(B, length, D, dtype=torch.float64), torch.randint(0, V, (B, length))
        tensors = [x.requires_grad_(), inputs()[1], labels]
        for value, exact in zip(step(compiled, tensors), step(fn, tensors), strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    made = mst_fx.reports()[before:]
    assert [len(report.regions) for report in made] == [1, 1]  # the first length, then all of them


def test_both_directions_of_two_towers_are_refused():
    def contrastive(x, w, y):
        scores = F.normalize(x[0], dim=-1) @ F.normalize(w, dim=-1).t()
        columns = torch.arange(V) % T
        return F.cross_entropy(scores, y[0]) + F.cross_entropy(scores.t(), columns)

    _, report = rewritten(captured(contrastive, *inputs()))
    (refusal,) = report.refusals
    assert refusal.reason == "AXIS_MIXED"
    assert "log_softmax" in refusal.text
    assert "F.cross_entropy(scores, y[0]) + F.cross_entropy(scores.t(), columns)" in refusal.source


def test_unknown_option_value():
    with pytest.raises(TypeError, match="returned_logits"):
        mst_fx.Config(returned_logits="lose")


@pytest.mark.parametrize("option", ["drop", "detach"])
def test_logits_that_a_graph_break_hands_on_stay_as_they_are(option):
    """They are not returned to the caller: the rest of the function reads them."""

    def two_losses(x, w, y):
        logits = F.linear(x, w).flatten(0, 1)
        loss = F.cross_entropy(logits, y.flatten())
        torch._dynamo.graph_break()
        return loss + logits.logsumexp(-1).square().mean()

    torch._dynamo.reset()
    given = inputs()
    options = {"min_bytes": 0, "num_chunks": 4, "inner": "aot_eager", "returned_logits": option}
    compiled = torch.compile(two_losses, backend="mst_fx", options=options)
    results = [(loss := fn(*given), *torch.autograd.grad(loss, given[:2])) for fn in (two_losses, compiled)]
    torch.testing.assert_close(results[1], results[0])
    (note,) = (note for report in mst_fx.reports()[-2:] for note in report.notes)
    assert note.startswith(f"returned_logits: {option!r} does not hold before a graph break")


@pytest.mark.parametrize("shifted", [False, True])
def test_returned_logits_may_be_written_behind_a_graph_break(shifted):
    def program(x, head, labels):
        logits = F.linear(x, head)
        rows = logits[:, :-1] if shifted else logits
        loss = F.cross_entropy(rows.flatten(0, 1), labels[:, : rows.shape[1]].flatten())
        torch._dynamo.graph_break()
        logits.detach().mul_(3)
        return loss, logits

    reports = beside_eager(program, lambda _: inputs(), num_chunks=3)
    assert len(reports[0].regions) == 1
