"""Custom autograd functions in a region: the loop has the gradients that the user wrote, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions
from fuzzing.harness import indices, weight
from graphs import captured
from memory_probe import saved_bytes
from numerics import looped
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.capture.fingerprint import likeness_of_node
from mst_fx.engine import Engine
from mst_fx.recognise.pattern import patterns

INPUTS = ((2, 24, 8), (8, 32), (32, 8))


def mlp_inputs(_):
    return [leaf(*shape) for shape in INPUTS]


class Rounded(Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reversed(Function):
    """Passes the values on, and reverses and scales the gradients."""

    @staticmethod
    def forward(ctx, x, factor, unused=None):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None, None


class Clipped(Function):
    """Passes the values on, and clips the gradients."""

    @staticmethod
    def forward(ctx, x, low, high, on=True):
        ctx.bounds = (low, high) if on else (None, 1e9)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(*ctx.bounds), None, None, None


class ClippedByNorm(Function):
    """Clips the gradient of each token by its norm."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm(dim=-1, keepdim=True).clamp_min(0.5)


class QuantisedByRow(Function):
    """Rounds with a scale a token; values out of range have no gradient."""

    @staticmethod
    def forward(ctx, x, levels):
        scale = x.abs().amax(-1, keepdim=True) / levels
        scaled = x / scale
        ctx.save_for_backward(scaled)
        ctx.levels = levels
        return scaled.round() * scale

    @staticmethod
    def backward(ctx, grad):
        (scaled,) = ctx.saved_tensors
        return grad * (scaled.abs() < 0.9 * ctx.levels), None


class QuantisedByChannel(Function):
    """Rounds with a learnt scale a channel, which has a gradient of its own, a sum over the tokens."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return (x / scale).round() * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        residue = (x / scale).round() - x / scale
        return grad, (grad * residue).flatten(0, -2).sum(0) * 0.1


class ValueAndIndex(Function):
    """Gives two tensors; one has no gradient."""

    @staticmethod
    def forward(ctx, x):
        indices = x.argmax(-1, keepdim=True)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, indices)
        ctx.shape = x.shape
        return x.tanh(), indices

    @staticmethod
    def backward(ctx, grad, _):
        x, indices = ctx.saved_tensors
        return (2 * grad * torch.zeros_like(x).scatter(-1, indices, 1.0) + grad).view(ctx.shape)


class TwoValues(Function):
    """Gives two tensors with gradients, and saves one of them."""

    @staticmethod
    def forward(ctx, gate, up):
        s = gate.sigmoid()
        ctx.save_for_backward(s, up)
        return gate * s * up, s

    @staticmethod
    def backward(ctx, grad, grad_s):
        s, up = ctx.saved_tensors
        return grad * up * s + 3 * grad_s, 0.5 * grad * s


class FirstAlone(Function):
    """Has no gradient for its second tensor, which needs one."""

    @staticmethod
    def forward(ctx, x, other):
        ctx.save_for_backward(other)
        return x * other

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].sign(), None


class ByContext(Function):
    """With `setup_context`, for transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].sqrt()


class OnceDifferentiable(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0] > 0, grad, 0.01 * grad)


class Outer(Function):
    """Calls another function in its forward: the gradient of that one does not count."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Rounded.apply(x) + 1

    @staticmethod
    def backward(ctx, grad):
        return Reversed.apply(grad, 2.0) * ctx.saved_tensors[0].cos()


class Projected(Function):
    """A projection with a scale a token, and the gradients of a plain one."""

    @staticmethod
    def forward(ctx, x, w, bias=None):
        ctx.save_for_backward(x, w)
        scale = x.abs().amax(-1, keepdim=True) / 7
        out = ((x / scale).round() * scale) @ w
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return grad @ w.t(), x.reshape(-1, x.shape[-1]).t() @ rows, rows.sum(0) if ctx.needs_input_grad[2] else None


class OfWeight(Function):
    """Fakes the quantisation of a weight; its gradient passes where it was in range."""

    @staticmethod
    def forward(ctx, w):
        scale = w.abs().amax() / 3
        ctx.save_for_backward(w.abs() < 0.8 * w.abs().amax())
        return (w / scale).round() * scale

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] * 1.5


class Wide(Function):
    """Multiplies in another dtype: the sum of a gradient is cast."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x.double() @ w.double()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, w = (saved.double() for saved in ctx.saved_tensors)
        grad = grad.double()
        return (grad @ w.t()).float(), (x.flatten(0, -2).t() @ grad.flatten(0, -2)).float()


def between(*functions):
    """An MLP with these between its projections."""

    def program(x, up, down):
        h = x @ up
        for function in functions:
            h = function(h)
        return h @ down

    return program


def tokens_first(x, up, down):
    return Rounded.apply(F.gelu(Reversed.apply(x, 2.0) @ up) * 2) @ Clipped.apply(down, -1.0, 1.0)


def weights_quantised(x, up, down):
    return F.gelu(x @ OfWeight.apply(up)) @ OfWeight.apply(down)


def value_and_index(x, up, down):
    value, index = ValueAndIndex.apply(x @ up)
    return (value + index) @ down


def two_values(x, up, down):
    value, gate = TwoValues.apply(x @ up, x @ up.cos())
    return (value + gate) @ down


def with_biases(x, up, down):
    return Projected.apply(F.gelu(Projected.apply(x, up, down[:, 0])), down, up[:, 0])


def one_of_two_values(x, up, down):
    return TwoValues.apply(x @ up, x @ up.cos())[0] @ down


PROGRAMS = {
    "straight_through": between(F.gelu, Rounded.apply),
    "reversed": between(lambda h: Reversed.apply(h, 0.5), F.silu),
    "reversed_with_none": between(lambda h: Reversed.apply(h, 2, None), F.silu),
    "clipped": between(F.gelu, lambda h: Clipped.apply(h, -0.5, 0.25)),
    "clipped_with_a_flag": between(F.gelu, lambda h: Clipped.apply(h, -0.5, 0.25, False)),
    "clipped_by_norm": between(F.gelu, ClippedByNorm.apply),
    "a_scale_a_row": between(F.gelu, lambda h: QuantisedByRow.apply(h, 7)),
    "value_and_index": value_and_index,
    "two_values": two_values,
    "one_of_two_values": one_of_two_values,
    "setup_context": between(ByContext.apply),
    "once_differentiable": between(OnceDifferentiable.apply),
    "nested": between(Outer.apply),
    "around_the_region": tokens_first,
    "of_weights": weights_quantised,
    "projections": lambda x, up, down: Projected.apply(F.gelu(Projected.apply(x, up, None)), down, None),
    "projections_with_biases": with_biases,
    "frozen_weights": lambda x, up, down: Projected.apply(
        F.gelu(Projected.apply(x, up.detach(), None)), down.detach(), None
    ),
    "learnt_scale": lambda x, up, down: QuantisedByChannel.apply(x @ up, down[:, 0]) @ down,
    "one_without_gradient": lambda x, up, down: FirstAlone.apply(x @ up, down[:, 0]) @ down,
    "under_checkpoint": lambda x, up, down: checkpoint(
        between(F.gelu, Rounded.apply), x, up, down, use_reentrant=False
    ),
    "several": between(lambda h: Reversed.apply(h, 0.5), Rounded.apply, F.gelu, lambda h: QuantisedByRow.apply(h, 3)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_the_users(name):
    reports = beside_eager(PROGRAMS[name], mlp_inputs, inner="aot_eager")
    assert looped_regions(reports) == 1


def test_no_gradient_where_the_function_gives_none():
    def program(x, up, down, other):
        return FirstAlone.apply(x @ up, other) @ down

    (report,) = beside_eager(program, lambda k: [*mlp_inputs(k), leaf(32)], inner="aot_eager")
    assert len(report.regions) == 1


def test_activations_that_are_found_to_be_split_late():
    def program(x, up, down):
        return (F.silu(Projected.apply(x.sin(), up, None)) * Projected.apply(x.cos(), up, None)) @ down

    assert looped_regions(beside_eager(program, mlp_inputs, inner="aot_eager")) == 1


class Precise(Function):
    """Multiplies in float32 in its backward, whatever autocast says in the forward."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad.float() @ w.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2).float()


def test_a_backward_runs_without_the_autocast_of_its_forward():
    inputs = [torch.randint(0, 2, shape).float() for shape in INPUTS]
    inputs[1] += 256 * (inputs[1] > 0)  # bfloat16 has no 257
    for x in inputs:
        x.requires_grad_()

    def mlp(x, up, down):
        with torch.autocast("cpu", torch.bfloat16):
            return (F.relu(Precise.apply(x, up)) @ down).sum()

    torch._dynamo.reset()
    compiled, made = looped(mlp, num_chunks=3), len(mst_fx.reports())
    ours, eager = (torch.autograd.grad(run(*inputs), inputs[0])[0] for run in (compiled, mlp))
    assert len(mst_fx.reports()[made].regions) == 1
    assert torch.equal(ours, eager)


def test_gradients_that_are_cast():
    inputs = [torch.randint(-3, 4, shape).float().requires_grad_() for shape in INPUTS]  # their sums are exact

    def program(x, up, down):
        return Wide.apply(F.relu(Wide.apply(x, up)), down).sum()

    torch._dynamo.reset()
    compiled, made = looped(program, num_chunks=3), len(mst_fx.reports())
    ours, eager = (torch.autograd.grad(run(*inputs), inputs) for run in (compiled, program))
    assert len(mst_fx.reports()[made].regions) == 1
    assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize("name", ["a_scale_a_row", "value_and_index", "projections", "around_the_region", "several"])
def test_of_any_length(name):
    def inputs(k):
        return [leaf(2, 24 + 7 * k, 8), weight(8, 32), weight(32, 8)]

    reports = beside_eager(PROGRAMS[name], inputs, 3, dynamic=True, inner="aot_eager")
    assert [len(report.regions) for report in reports] == [1]


# --- heads


class PenalisedLogits(Function):
    """Passes a loss on; its backward adds a gradient of the logits that no gradient of the loss scales."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        top, ids = logits.max(-1, keepdim=True)
        penalty = torch.zeros_like(logits)
        penalty.scatter_(-1, ids, top * (1e-2 / logits.shape[0]))
        return grad, penalty


class FusedLoss(Function):
    """A cross-entropy that computes the gradient of the logits in its forward."""

    @staticmethod
    def forward(ctx, logits, target):
        scores = logits.log_softmax(-1)
        hot = F.one_hot(target, logits.shape[-1]).to(logits.dtype)
        ctx.save_for_backward((scores.exp() - hot) / target.numel())
        return -(scores * hot).sum() / target.numel()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class SmoothedLoss(Function):
    """A loss a token, from logits that its backward reads again."""

    @staticmethod
    def forward(ctx, logits, target, smoothing):
        ctx.save_for_backward(logits, target)
        ctx.smoothing = smoothing
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    @staticmethod
    def backward(ctx, grad):
        logits, target = ctx.saved_tensors
        hot = F.one_hot(target, logits.shape[-1]) * (1 - ctx.smoothing) + ctx.smoothing / logits.shape[-1]
        return (logits.softmax(-1) - hot) * grad.unsqueeze(-1), None, None


def penalised(x, head, y):
    logits = x @ head
    return PenalisedLogits.apply(F.cross_entropy(logits, y), logits)


HEADS = {
    "penalised": penalised,
    "fused": lambda x, head, y: FusedLoss.apply(x @ head, y),
    "smoothed": lambda x, head, y: SmoothedLoss.apply(x @ head, y, 0.1).mean(),
    "clipped": lambda x, head, y: F.cross_entropy(Clipped.apply(x @ head, -0.01, 0.01), y),
    "reversed": lambda x, head, y: Reversed.apply(F.cross_entropy(x @ head, y), 3.0),
    "clipped_loss": lambda x, head, y: Clipped.apply(F.cross_entropy(x @ head, y), -0.5, 0.1),
    "rounded": lambda x, head, y: F.cross_entropy(Rounded.apply(4 * (x @ head)) / 4, y),
}
"""Where the gradients of the logits are no multiple of that of the loss, they have to wait for it."""


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("scale", [1.0, -7.5])
def test_heads(name, scale):
    def inputs(_):
        return leaf(24, 8), weight(8, 48), indices(48, 24)

    def program(x, head, y):
        return HEADS[name](x, head, y) * scale

    reports = beside_eager(program, inputs, inner="aot_eager")
    assert looped_regions(reports) == 1


class ScaledByAll(Function):
    """Mixes tokens in the forward: one scale for all."""

    @staticmethod
    def forward(ctx, x):
        return x / x.abs().max()

    @staticmethod
    def backward(ctx, grad):
        return grad


class ClippedByAll(Function):
    """Mixes tokens in the backward: one norm for all."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm().clamp_min(1.0)


class Centred(Function):
    """Mixes tokens in the backward: the mean of the gradients goes off."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean((0, 1))


class Flipped(Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad.flip((0, 1))


class ClippedWeight(Function):
    """Clips the gradient of a whole weight, which is known after the loop alone."""

    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        return h * w

    @staticmethod
    def backward(ctx, grad):
        h, w = ctx.saved_tensors
        return grad * w, (grad * h).sum((0, 1)).clamp(-1, 1)


class OnesForWeight(Function):
    """Gives a weight a gradient that no token has a part in."""

    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(w)
        return h * w

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.saved_tensors[0])


@pytest.mark.parametrize("name", ["of_logits", "of_projection"])
def test_cuts_and_pieces_of_logits_leave_the_gradients_alone(name):
    def cut(x, head, y):
        logits = Clipped.apply(x @ head, -0.01, 0.01) if name == "of_logits" else Projected.apply(x, head, None)
        return F.cross_entropy(logits[:, :-1].reshape(-1, 48), y[:, 1:].reshape(-1))

    def pieces(x, head, y):
        logits = Clipped.apply(x @ head, -0.01, 0.01) if name == "of_logits" else Projected.apply(x, head, None)
        return F.cross_entropy(logits[0], y[0]) + F.cross_entropy(logits[1], y[1])

    def inputs(_):
        return leaf(2, 24, 8), weight(8, 48), indices(48, 2, 24)

    for program in (cut, pieces):
        beside_eager(program, inputs, inner="aot_eager")


def test_a_cut_behind_a_functions_view_of_what_is_written_to():
    """Autograd cannot tell the history of such a view any more; nothing asks for it."""

    def program(x, head, y):
        with torch.no_grad():
            x.mul_(2)
        logits = Reversed.apply(x, 0.5) @ head
        return F.cross_entropy(logits[:, :-1].reshape(-1, 48), y[:, 1:].reshape(-1))

    def inputs(_):
        return leaf(2, 24, 8), weight(8, 48), indices(48, 2, 24)

    reports = beside_eager(program, inputs)
    assert looped_regions(reports) == 1


# --- functions that Dynamo leaves as a call


@torch.compiler.allow_in_graph
def rounded_in_graph(x, scale):
    return Rounded.apply(x * scale) / scale


class Opaque(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad * (ctx.saved_tensors[0] > -1), None


class OpaqueProjection(Projected):
    pass


class OpaqueMixer(ClippedByAll):
    pass


for function in (Opaque, OpaqueProjection, OpaqueMixer):
    torch.compiler.allow_in_graph(function)


class Steps(NamedTuple):
    up: float
    down: float


@dataclass(frozen=True)
class Settings:
    steps: Steps
    names: tuple[str, ...] = ("rounded",)


@torch.compiler.allow_in_graph
class WithSettings(Function):
    """Rounds in steps; the gradients have steps of their own."""

    @staticmethod
    def forward(ctx, x, settings, steps):
        ctx.step = settings.steps.down
        return (x * settings.steps.up).round() / steps.up

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.step, None, None


def with_settings(*steps):
    return between(F.gelu, lambda h: WithSettings.apply(h, Settings(Steps(*steps)), Steps(*steps)))


CALLS = {
    "settings": with_settings(4.0, 0.5),
    "function": between(F.gelu, lambda h: rounded_in_graph(h, 4.0)),
    "trampoline": between(lambda h: Opaque.apply(h, 3.0)),
    "trampolines_that_project": lambda x, u, d: OpaqueProjection.apply(
        OpaqueProjection.apply(x, u, None).tanh(), d, None
    ),
    "frozen": lambda x, u, d: OpaqueProjection.apply(x, u.detach(), None).tanh() @ d.detach(),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_have_the_gradients_of_what_they_call(name):
    assert looped_regions(beside_eager(CALLS[name], mlp_inputs, inner="aot_eager")) == 1


def test_a_call_that_mixes_tokens_is_refused():
    (report,) = beside_eager(between(F.gelu, OpaqueMixer.apply), mlp_inputs, inner="aot_eager")
    (refusal,) = report.refusals
    assert not report.regions
    assert "in a backward of its own" in refusal.text


# --- refusals


MIXES = {
    "forward": (between(F.gelu, ScaledByAll.apply), "x / x.abs().max()", ["aten.max.default"], ["backward"]),
    "norm": (between(F.gelu, ClippedByAll.apply), "grad.norm()", ["norm", "in a backward of its own"], []),
    "mean": (between(F.gelu, Centred.apply), "grad.mean((0, 1))", ["sub", "in a backward of its own"], []),
    "flip": (between(F.gelu, Flipped.apply), "grad.flip((0, 1))", ["aten.flip", "in a backward of its own"], []),
    "clip": (lambda x, u, d: ClippedWeight.apply(x @ u, d[:, 0]) @ d, "clamp(-1, 1)", ["clamp", "in a backward"], []),
    "whole": (lambda x, u, d: OnesForWeight.apply(x @ u, d[:, 0]) @ d, "ones_like", ["whole gradient of a whole"], []),
}
"""The program, the user's line, and what the text says and does not say."""


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_tokens_is_refused_with_its_op_and_direction(name):
    program, line, words, others = MIXES[name]
    (report,) = beside_eager(program, mlp_inputs, inner="aot_eager")
    assert not report.regions
    (refusal,) = report.refusals
    assert refusal.reason in ("AXIS_MIXED", "TWO_PASSES")
    assert line in refusal.source
    assert all(word in refusal.text for word in words), refusal.text
    assert not any(word in refusal.text for word in others), refusal.text


# --- what is shared and what is saved


def sites_of(program, inputs):
    graph = captured(program, *inputs)
    return Engine(graph, mst_fx.Config(min_bytes=0, chunk_tokens=4), patterns()).surveyed.sites


def test_layers_share_the_work_only_where_both_graphs_are_alike():
    def program(x, up, down):
        for factor in (0.5, 0.25, 0.5):
            x = between(F.gelu, lambda h, factor=factor: Reversed.apply(h, factor))(x, up, down)
        return x.sin()

    first, second, third = (site.work for site in sites_of(program, mlp_inputs(0)))
    assert first is third
    assert first is not second


def test_nodes_are_alike_only_where_their_settings_are():
    def program(x):
        return [WithSettings.apply(x, Settings(Steps(4.0, step)), Steps(1.0, 1.0)) for step in (0.5, 0.25, 0.5)]

    nodes = [node for node in captured(program, leaf(3)).graph.nodes if "trampoline" in str(node.target)]
    first, second, third = map(likeness_of_node, nodes)
    assert first == third
    assert first != second


def test_layers_share_the_work_only_where_their_settings_are_alike():
    def program(x, up, down):
        for step in (0.5, 0.25, 0.5):
            x = with_settings(4.0, step)(x, up, down)
        return x.sin()

    first, second, third = (site.work for site in sites_of(program, mlp_inputs(0)))
    assert first is third
    assert first is not second


class Packed(Function):
    """A product with a packed weight, which is unpacked in forward and again in backward."""

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        return x @ (codes.to(x.dtype) * scale).t()

    @staticmethod
    def backward(ctx, grad):
        codes, scale = ctx.saved_tensors
        return grad @ (codes.to(grad.dtype) * scale), None, None


def codes(*shape):
    return torch.randint(-8, 8, shape, dtype=torch.int8)


def packed_inputs(_):
    scales = [torch.rand(rows, 1, dtype=torch.float64) / 8 for rows in (32, 32, 8)]
    return [leaf(2, 24, 8), codes(32, 8), codes(32, 8), codes(8, 32), *scales, leaf(2, 8), leaf(32, 2)]


def packed_with_adapter(x, gate, up, down, gate_scale, up_scale, down_scale, a, b):
    g = Packed.apply(x, gate, gate_scale) + x @ a.t() @ b.t()
    return Packed.apply(F.silu(g) * Packed.apply(x, up, up_scale), down, down_scale)


def test_packed_weights_with_an_adapter():
    (report,) = beside_eager(packed_with_adapter, packed_inputs, inner="aot_eager", verify=True)
    assert [region.verified for region in report.regions] == [True]
    assert not any("codes.to(" in value.source for value in report.unlooped)
    assert looped_regions(beside_eager(packed_with_adapter, packed_inputs, inner="inductor")) == 1


def test_a_weight_is_unpacked_once_for_both_directions():
    (site,) = sites_of(packed_with_adapter, packed_inputs(0))
    unpacked = [node for node in site.work.stages.prologue if node.target == torch.ops.aten.mul.Tensor]
    assert len(unpacked) == 3


@pytest.mark.parametrize(
    ("program", "inputs", "tokens"),
    [
        (packed_with_adapter, packed_inputs, 2 * 24 * (8 + 2)),
        (PROGRAMS["projections"], mlp_inputs, 2 * 24 * 8),
        (PROGRAMS["two_values"], mlp_inputs, 2 * 24 * 8 + 8 * 32),
        (PROGRAMS["several"], mlp_inputs, 2 * 24 * 8),
        (CALLS["trampoline"], mlp_inputs, 2 * 24 * 8),
    ],
    ids=["packed", "projections", "two_values", "several", "trampoline"],
)
def test_neither_wide_values_nor_unpacked_weights_are_saved(program, inputs, tokens):
    torch._dynamo.reset()
    given = inputs(0)
    own = {x.untyped_storage().data_ptr() for x in given}
    saved: dict[int, int] = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = looped(program, num_chunks=3, inner="aot_eager")(*given)
    assert kept.requires_grad
    assert sum(saved.values()) <= tokens


class InFewBits(Function):
    """A product with a rounded weight, whose gradient passes the rounding by."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ (w * 8).round()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ (w * 8).round().t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


def test_parameters_in_another_form_are_not_saved():
    x, *weights = (leaf(*shape) for shape in INPUTS)
    weights = [torch.nn.Parameter(weight) for weight in weights]
    torch._dynamo.reset()
    step = looped(
        lambda: InFewBits.apply(InFewBits.apply(x, weights[0]).tanh(), weights[1]).sum(),
        num_chunks=3,
        inner="aot_eager",
    )
    assert saved_bytes(step, [x, *weights]) < weights[0].nbytes
