"""The largest values that no loop covers: which they are, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten, tensors
from models import FF, D, MlpLM, SwiGLU, V, tokens
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mst_fx

T, WIDE = 24, 64


def unlooped(fn, *given, **options):
    """The entries of the report of one graph."""
    return rewritten(captured(fn, *given), **options)[1].unlooped


def scores(q, k):
    return (q @ k.transpose(-1, -2) / 4).softmax(-1)


def attention(q, k, v):
    return (scores(q, k) @ v).square().mean()


def mlp(x, up, down, between=F.gelu):
    return F.linear(between(F.linear(x, up)), down)


def weights():
    return tensors((2, T, 8), (WIDE, 8), (8, WIDE))


def test_attention_by_hand_is_told_with_its_line_and_what_would_help():
    found = unlooped(attention, *tensors(*[(2, 4, T, 4)] * 3))
    assert [(value.op, value.shape) for value in found[:2]] == [
        ("operator.matmul", (2, 4, T, T)),
        ("Tensor.softmax", (2, 4, T, T)),
    ]
    for value in found[:2]:
        assert (value.reason, value.count, value.saved) == ("NO_PATTERN", 1, True)
        assert (value.bytes, value.dtype) == (2 * 4 * T * T * 4, "float32")
        assert value.why == "no pattern for it: operator.matmul makes it of smaller values"
        assert "scaled_dot_product_attention" in value.advice
        assert "return (q @ k.transpose(-1, -2) / 4).softmax(-1)" in value.source


def test_values_that_a_compiler_fuses_are_not_told():
    """Neither the scaled scores nor their softmax and sine are written: only what a product makes or reads is."""
    found = unlooped(lambda q, k, v: (scores(q, k).sin().cos() @ v).sum(), *tensors(*[(2, 4, T, 4)] * 3))
    assert {value.op for value in found if value.shape == (2, 4, T, T)} == {"operator.matmul", "Tensor.cos"}


class Layer(nn.Module):
    def forward(self, x):
        return x + scores(x, x) @ x


class Layers(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def test_values_that_are_alike_are_counted_together():
    first = unlooped(Layers(), *tensors((2, 4, T, 4)))[0]
    assert (first.count, first.module, first.bytes) == (3, "layers.*", 2 * 4 * T * T * 4)
    assert first.total == 3 * first.bytes
    assert f"3 x {2 * 4 * T * T * 4 / 1024:.1f} KiB saved" in str(first)


def test_values_of_checkpointed_blocks_do_not_exist_at_once():
    def blocks(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.mean()

    layers = Layers().layers
    first = unlooped(blocks, *tensors((2, 4, T, 4)))[0]
    assert (first.count, first.saved, first.total) == (3, False, first.bytes)


def test_at_most_ten_are_told_and_these_are_the_largest():
    def products(*xs):
        return sum(scores(x, x).sin().sum() for x in xs)

    lengths = range(20, 32)
    found = unlooped(products, *tensors(*((1, 1, length, 4) for length in lengths)))
    assert [value.shape[-1] for value in found] == sorted(lengths, reverse=True)[:10]


def test_values_below_min_bytes_are_not_told():
    given, size = tensors(*[(2, 4, T, 4)] * 3), 2 * 4 * T * T * 4
    assert len(unlooped(attention, *given, min_bytes=size)) == 2
    assert not unlooped(attention, *given, min_bytes=size + 1)


def test_values_below_two_percent_of_the_peak_are_not_told():
    def beside(q, k, v, x):
        return attention(q, k, v) + attention(x, x, x)

    given = tensors(*[(1, 1, 8, 2)] * 3)
    for length, told in [(8, True), (128, False)]:
        found = unlooped(beside, *given, torch.randn(1, 2, length, 2, requires_grad=True))
        assert ((1, 1, 8, 8) in {value.shape for value in found}) is told
        assert (1, 2, length, length) in {value.shape for value in found}


def test_small_models_have_none():
    _, report = rewritten(captured(MlpLM(), *tokens()), min_bytes=None, chunk_tokens=None)
    assert report.refusals
    assert report.unlooped == ()


def test_values_of_loops_inputs_and_views_are_not_told():
    found = unlooped(lambda *given: mlp(*given).transpose(0, 1), *weights())
    assert found == ()


class Wished(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = SwiGLU()

    def forward(self, x):
        return self.mlp(x).square().mean()


def test_values_that_the_plan_leaves():
    found = unlooped(Wished(), *tensors((2, T, D)), modules={"mlp": False})
    wide = [value for value in found if value.shape[-1] == FF]
    assert {value.why for value in wide} == {"left by the plan: the option `modules` says so"}
    assert {value.reason for value in wide} == {"SMALL"}
    assert {value.module for value in wide} >= {"mlp.gate", "mlp.up"}


def test_values_of_refused_regions():
    found = unlooped(lambda *given: mlp(*given, between=lambda h: h.flatten(0, 1).sort(0)[0]), *weights())
    wide = next(value for value in found if value.shape == (2, T, WIDE))
    assert wide.reason == "AXIS_MIXED"
    assert "sort" in wide.why


def depthwise(h):
    return F.conv1d(h.transpose(1, 2), torch.ones(WIDE, 1, 3), padding=1, groups=WIDE).transpose(1, 2)


def test_the_op_that_stands_in_the_way():
    found = unlooped(lambda *given: mlp(*given, between=depthwise), *weights())
    wide = {value.op: value for value in found if value.bytes == 2 * T * WIDE * 4}
    assert {"torch.nn.functional.linear", "torch.conv1d"} <= {*wide}
    for value in wide.values():
        assert value.reason == "UNKNOWN_OP"
        assert "torch.conv1d" in value.why


def test_a_convolution_joins_no_several_values():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.between = nn.Conv1d(WIDE, WIDE, 3, padding=1, groups=WIDE)

        def forward(self, *given):
            return mlp(*given, between=lambda h: self.between(h.transpose(1, 2)).transpose(1, 2))

    wide = next(value for value in unlooped(Between(), *weights()) if value.shape == (2, T, WIDE))
    assert wide.why == "torch.conv1d: aten.convolution.default has no placement rule"


def test_the_op_that_stands_in_the_way_of_what_ends_in_a_small_value():
    for between, name in [(depthwise, "torch.conv1d"), (lambda h: h.renorm(2, 0, 1.0), "Tensor.renorm")]:
        found = unlooped(lambda x, up, between=between: between(F.linear(x, up)).square().mean(), *weights()[:2])
        wide = next(value for value in found if value.op == "torch.nn.functional.linear")
        assert (wide.reason, name in wide.why) == ("UNKNOWN_OP", True)


def test_an_op_without_a_rule_that_makes_the_value():
    kernel = torch.ones(WIDE, 1, 3)

    def grouped(x):
        return F.conv1d(x, kernel, padding=1, groups=8).square().mean()

    (wide,) = unlooped(grouped, *tensors((2, 8, T)))
    assert (wide.reason, wide.shape) == ("UNKNOWN_OP", (2, WIDE, T))
    assert "torch.conv1d" in wide.why


@pytest.mark.parametrize(
    "transformed",
    [
        lambda x, up, down: torch.vmap(lambda row: mlp(row, up, down))(x).sum(),
        lambda x, up, down: torch.func.grad(lambda y: mlp(y, up, down).sum())(x),
        lambda x, up, down: torch.func.jvp(lambda y: mlp(y, up, down), (x,), (x,))[1],
    ],
)
def test_transforms_are_told(transformed):
    wide = [value for value in unlooped(transformed, *weights()) if value.shape == (2, T, WIDE)]
    assert wide
    for value in wide:
        assert value.reason == "TRANSFORM"
        assert value.bytes == 2 * T * WIDE * 4  # with the rows that vmap hides
        assert "runs inside a transform of torch.func" in value.why


def test_subgraphs_that_no_region_looks_into():
    def branches(x, up, down):
        return torch.cond(x.sum() > 0, lambda y: mlp(y, up, down), torch.sin, (x,)).sum()

    wide = [value for value in unlooped(branches, *weights()) if value.shape == (2, T, WIDE)]
    assert [value.reason for value in wide] == 2 * ["SUBGRAPH"]
    assert all(value.why.startswith("torch.ops.higher_order.cond runs the subgraph") for value in wide)


def test_repeated_parts_that_dynamo_puts_in_a_subgraph():
    def layers(x, *matrices):
        for up, down in zip(matrices[::2], matrices[1::2], strict=True):
            x = x + mlp(x, up, down)
        return x

    with torch._dynamo.config.patch(use_graph_deduplication=True):
        found = unlooped(layers, *tensors((2, T, 8), *[(WIDE, 8), (8, WIDE)] * 3))
    wide = [value for value in found if value.shape == (2, T, WIDE)]
    assert [(value.count, value.reason) for value in wide] == 2 * [(3, "NO_VALUE")]
    assert "use_graph_deduplication = False" in wide[0].advice
    assert (
        sum(value.count for value in found if value.op == "operator.getitem") == 0
    )  # they are told where they are made


def as_it_likes():
    """A block whose user says what it saves stays a block."""
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


def test_a_checkpointed_head_does_not_leave_the_graph():
    def loss(x, head, labels):
        return F.cross_entropy(checkpoint(F.linear, x, head, use_reentrant=False, context_fn=as_it_likes), labels)

    _, report = rewritten(captured(loss, *tensors((T, 8), (V, 8)), torch.zeros(T, dtype=torch.int64)))
    (logits,) = report.unlooped
    assert (logits.reason, logits.shape) == ("NO_LOSS", (T, V))
    assert "leave a checkpointed block" in logits.why
    assert "one block hold the head and its loss" in logits.advice
    assert "leave the graph" not in " ".join(str(report).split())


def test_a_checkpointed_loss_has_its_logits_from_outside_of_the_block():
    def loss(x, head, labels):
        logits = F.linear(x, head)
        return checkpoint(F.cross_entropy, logits, labels, use_reentrant=False, context_fn=as_it_likes)

    _, report = rewritten(captured(loss, *tensors((T, 8), (V, 8)), torch.zeros(T, dtype=torch.int64)))
    inside = next(refusal for refusal in report.refusals if refusal.reason == "NO_HEAD")
    assert "from outside of a checkpointed block" in inside.text
    assert "outside the graph" not in " ".join(str(report).split())


def test_values_as_large_as_the_tokens_have_nothing_to_gain():
    def hidden(ids, table, w):
        x = F.embedding(ids, table)
        return (F.linear(x, w).sin() @ w + x).square().mean()

    found = unlooped(hidden, torch.zeros(2, T, dtype=torch.int64), *tensors((10, 8), (8, 8)))
    assert found
    assert {(value.reason, value.why) for value in found} == {
        ("NO_GAIN", "it is no larger than the tokens that it is made of")
    }


def test_projections_of_tokens_are_no_larger_whatever_makes_the_tokens():
    def patches(image, kernel, w):
        x = F.conv1d(image, kernel, stride=2, padding=1).transpose(1, 2)
        return F.linear(x.sin(), w).sin() @ w

    found = unlooped(patches, *tensors((2, 3, T), (16, 3, 3), (16, 16)))
    why = {value.op: value.why for value in found}
    assert why["torch.conv1d"] == "torch.conv1d: aten.convolution.default has no placement rule"
    assert why["torch.nn.functional.linear"] == "it is no larger than the tokens that it is made of"


def test_joined_halves_are_no_larger_than_the_value_that_they_are_of():
    def turned(x, a, b, c):
        x = x.sin()
        one, other = F.linear(x, a).chunk(2, -1)
        return torch.cat([-other, one.cos()], -1) @ b, torch.cat([F.linear(x, a), F.linear(x, b)], -1) @ c

    given = tensors((2, T, 8), (8, 8), (8, 8), (16, 16))
    why = {(value.op, value.shape[-1]): value.why for value in unlooped(turned, *given)}
    assert why["torch.cat", 8] == "it is no larger than the tokens that it is made of"
    assert why["torch.cat", 16] == "no pattern for it: torch.cat makes it of smaller values"


def test_values_that_are_made_of_none():
    def filled(x):
        return (torch.ones(T, 4 * T) @ x).square().mean()

    (wide, *_) = unlooped(filled, *tensors((4 * T, 8)))
    assert (wide.shape, wide.why) == ((T, 4 * T), "no pattern for it: torch.ones makes it of no other values")


def test_values_made_of_parameters_alone():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(64, 4)), nn.Parameter(torch.randn(4, 64))

        def forward(self, x):
            return F.linear(x, self.a @ self.b).square().mean()

    merged = unlooped(Merged(), *tensors((4, 64)))[0]
    assert (merged.shape, merged.reason) == ((64, 64), "NO_GAIN")
    assert "made of parameters alone" in merged.why


def test_large_values_that_meet_in_a_product():
    def alike(x, head, other):
        return torch.einsum("btv,bsv->bts", F.linear(x, head).softmax(-1), F.linear(x, other).softmax(-1)).mean()

    found = [value for value in unlooped(alike, *tensors((2, T, 8), (V, 8), (V, 8))) if value.shape == (2, T, V)]
    assert found
    for value in found:
        assert "einsum multiplies large values with one another" in value.why
        assert "scaled_dot_product_attention" in value.advice


def test_large_values_that_are_widened_once_more():
    found = unlooped(
        lambda x, a, b: F.linear(F.linear(x, a).sin(), b).sin().sum(), *tensors((T, 8), (32, 8), (128, 32))
    )
    once = next(value for value in found if value.shape == (T, 32))
    assert (once.reason, once.why) == ("NO_PATTERN", "torch.nn.functional.linear widens the large value once more")


def test_ops_of_several_large_values_that_nobody_knows():
    def mixing(x, up):
        h = F.linear(x, up)
        return torch.cdist(h, h.sin()).mean()

    wide = next(value for value in unlooped(mixing, *tensors((2, T, 8), (WIDE, 8))) if value.shape == (2, T, WIDE))
    assert "cdist" in wide.why


def test_attention_without_dropout_draws_no_numbers():
    def attending(x, up):
        h = F.linear(x, up).unsqueeze(1)
        return F.scaled_dot_product_attention(h, h.sin(), h.cos()).mean()

    (wide, *_) = unlooped(attending, *tensors((2, T, 8), (WIDE, 8)))
    assert wide.reason == "AXIS_MIXED"
    assert "lets tokens read one another, and it joins several values" in wide.why


def test_the_nearest_match_tells_why():
    def attending(x, first, up):
        h = F.linear(F.linear(x, first), up).unsqueeze(1)
        return F.scaled_dot_product_attention(h, h.sin(), h.cos()).mean()

    found = unlooped(attending, *tensors((2, T, 4), (8, 4), (WIDE, 8)))
    wide = next(value for value in found if value.op == "torch.nn.functional.linear" and value.shape[-1] == WIDE)
    assert "scaled_dot_product_attention" in wide.why  # and not that the first projection is widened once more


def test_projections_that_are_split_into_what_is_as_large():
    def split(x, w):
        return [part.sin() for part in F.linear(x, w).split(8, -1)]

    found = unlooped(split, *tensors((T, 8), (24, 8)))
    assert "what is made of torch.nn.functional.linear is as large as its own value" in {value.why for value in found}


def test_repeated_rows_without_experts():
    def repeated(x, w):
        return F.linear(x.repeat_interleave(4, 0), w).square().mean()

    found = unlooped(repeated, *tensors((T, 8), (8, 8)))
    wide = next(value for value in found if value.shape == (4 * T, 8))
    assert wide.reason == "NO_PATTERN"
    assert wide.why.endswith("repeats values, and no experts' matrices multiply them")


def test_returned_values_have_to_exist():
    wide, *_ = unlooped(lambda q, k: scores(q, k), *tensors((2, 4, T, 4), (2, 4, T, 4)))
    assert ("Tensor.softmax", "OTHER_GRAPH", "the function that this graph holds returns it") in {
        (value.op, value.reason, value.why) for value in unlooped(scores, *tensors((2, 4, T, 4), (2, 4, T, 4)))
    }
    assert wide.shape == (2, 4, T, T)


def test_lengths_that_vary_are_told_as_captured():
    x = torch.randn(T, 4, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    wide, *_ = unlooped(lambda x: (x @ x.t()).sin().sum(), x)
    assert wide.shape == (T, T)


def test_an_error_in_looking_costs_no_loop(monkeypatch):
    def broken(*_):
        raise RuntimeError("looking failed")

    monkeypatch.setattr("mst_fx.engine.unlooped", broken)
    _, report = rewritten(captured(mlp, *weights()))
    assert len(report.regions) == 1
    assert "looking failed" in report.refusals[0].text


def test_reports_of_all_compiles_have_them():
    torch._dynamo.reset()
    report = mst_fx.explain(attention, *tensors(*[(2, 4, T, 4)] * 3), options={"min_bytes": 0})
    assert report.unlooped == mst_fx.reports()[-1].unlooped != ()
    assert "not looped, the largest first:\n" in str(report)
    assert "no pattern for it: operator.matmul" in str(report)
