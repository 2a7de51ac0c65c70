"""What stands in front of a region and belongs to its tokens alone is looped with it."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import assert_idempotent, captured, rewritten, tensors
from memory_probe import peak_bytes, saved_bytes
from numerics import looped

from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence

B, S, D, FF, V = 2, 16, 8, 32, 64


def mlp(x, up, down):
    return F.linear(F.gelu(F.linear(x, up)), down)


def head(x, w):
    return F.cross_entropy(F.linear(x, w).flatten(0, 1), torch.arange(B * S) % V)


def rms(x):
    return F.rms_norm(x, (D,))


def rms_by_hand(x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer(x):
    return F.layer_norm(x, (D,))


def scaled_and_clamped(x):
    return (x * 2.0).clamp(-3, 3)


FRONTS = (rms, rms_by_hand, layer, scaled_and_clamped)


def stream_of(fn, *inputs):
    """The op that makes what the loop splits, and the ops that are left outside."""
    looped_graph, report = rewritten(captured(fn, *inputs))
    assert len(report.regions) == 1
    (call,) = looped_graph.graph.find_nodes(op="call_function", target=mini_sequence)
    spec = CallSpec(*call.args[4])
    ins = (spec.forward_spec or spec.backward_spec)[2]
    stream = next(operand for operand, axis in zip(call.args[5:], ins, strict=True) if axis is not None)
    return stream, {node.name for node in looped_graph.graph.nodes if node.op.startswith("call")}


def inputs_of(region):
    return tensors((B, S, D), (FF, D), (D, FF)) if region is mlp else tensors((B, S, D), (V, D))


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("region", [mlp, head])
def test_the_loop_reads_what_the_front_reads(region, front):
    def block(x, *weights):
        h = x + torch.sin(x)  # read twice, as a residual is
        return h.sum() + region(front(h), *weights).sum()

    inputs = inputs_of(region)
    stream, outside = stream_of(block, *inputs)
    assert stream.target is operator.add
    assert not any("norm" in name or "rsqrt" in name or "clamp" in name for name in outside)
    assert_idempotent(block, *inputs)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("region", [mlp, head])
def test_gradients(region, front):
    def block(x, scale, *weights):
        h = x + torch.sin(x)
        return h.square().mean() + region(front(h) * scale, *weights).square().mean()

    inputs = [
        x.double().detach().requires_grad_() for x in (*inputs_of(region)[:1], torch.rand(D), *inputs_of(region)[1:])
    ]
    compiled = looped(block, inner="eager", chunk_tokens=10)
    truth = torch.autograd.grad(block(*inputs), inputs)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    near = {"rtol": 1e-4, "atol": 1e-7}  # a norm by hand goes through float32
    for ours, expected in zip(torch.autograd.grad(compiled(*inputs), inputs), truth, strict=True):
        torch.testing.assert_close(ours, expected, **(near if front is rms_by_hand else exact))


def shared(x, *weights):
    """The norm is read by something else as well, as by a router or by attention beside the MLP."""
    normed = rms(x)
    return normed.sum() + mlp(normed, *weights).sum()


def dropped(x, *weights):
    """Random numbers are drawn in the order of the program."""
    return mlp(F.dropout(rms(x), 0.5), *weights)


def two_streams(x, *weights):
    """An addition reads two values: its result is the smaller thing to read."""
    return mlp(torch.sin(x) + torch.cos(x).cumsum(1), *weights)


def in_float32(x, *weights):
    """A wider dtype would be more to keep."""
    wide = x.float() * 2
    return wide.sum() + mlp(wide.to(x.dtype), *weights).sum()


@pytest.mark.parametrize(("block", "maker"), [(shared, "rms_norm"), (dropped, "dropout"), (two_streams, "add")])
def test_what_is_not_taken_in(block, maker):
    stream, _ = stream_of(block, *inputs_of(mlp))
    assert stream.target.__name__ == maker


def test_a_wider_dtype_is_not_read_in_its_place():
    stream, _ = stream_of(in_float32, *[x.bfloat16().detach().requires_grad_() for x in inputs_of(mlp)])
    assert stream.meta["example_value"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "mixing", [lambda x: x.cumsum(1), lambda x: x.softmax(1), lambda x: x.roll(1, 1), lambda x: x - x.mean(1, True)]
)
def test_tokens_that_are_mixed_in_front_are_mixed_outside(mixing):
    """The loop still goes over the tokens, and not over the batch, which is what the front would leave to it."""

    def block(x, *weights):
        return mlp(mixing(x), *weights)

    _, report = rewritten(captured(block, *inputs_of(mlp)))
    assert [region.axis for region in report.regions] == [f"dim 1 ({S} positions)"]


@pytest.mark.parametrize("region", [mlp, head])
def test_a_sum_that_the_norm_alone_reads_is_made_outside(region):
    """In place of its two terms, as behind the last layer of a model; the norm has a weight."""

    def last(x, out, scale, *weights):
        return region(F.rms_norm(x + F.linear(x, out), (D,), scale), *weights)

    stream, outside = stream_of(last, *tensors((B, S, D), (D, D), (D,)), *inputs_of(region)[1:])
    assert stream.target is operator.add
    assert not any("norm" in name for name in outside)


def test_one_block_behind_the_other():
    def blocks(x, up, down, again, back):
        x = x + mlp(rms(x), up, down)
        return x + mlp(layer(x), again, back)

    looped_graph, report = rewritten(captured(blocks, *tensors((B, S, D), (FF, D), (D, FF), (FF, D), (D, FF))))
    assert len(report.regions) == 2
    called = [node.target for node in looped_graph.graph.nodes if node.op == "call_function"]
    assert set(called) == {mini_sequence, operator.getitem, operator.add}


def block(x, scale, out, up, down):
    """A residual stream behind a projection, and an MLP with its norm."""
    h = x + F.linear(x, out)
    return h + mlp(F.rms_norm(h, (h.shape[-1],), scale), up, down)


def read_once_more(x, scale, out, up, down):
    """The same with a norm of which the graph reads a number more."""
    h = x + F.linear(x, out)
    normed = F.rms_norm(h, (h.shape[-1],), scale)
    return h + mlp(normed, up, down) + 0 * normed[0, 0, 0]


def test_the_normed_tokens_are_not_saved_and_never_exist():
    s, d, ff = 4096, 64, 128
    inputs = tensors((1, s, d), (d,), (d, d), (ff, d), (d, ff))
    stream = s * d * 4
    saved, peaks = [], []
    for fn in (block, read_once_more):
        compiled = looped(fn, chunk_tokens=256, inner="inductor")
        saved.append(saved_bytes(lambda compiled=compiled: compiled(*inputs), inputs))
        peaks.append(peak_bytes(lambda compiled=compiled: compiled(*inputs).sum().backward()))
    assert saved[0] == stream
    assert saved[1] >= 2 * stream
    assert peaks[0] <= peaks[1] - 0.9 * stream
