"""Lengths that vary: one compile, no guard of ours, as many chunks as there are."""

from __future__ import annotations

import random

import pytest
import torch
from models import CheckpointedLM, MlpLM, tokens
from numerics import gradients, looped, relative_error

import mst_fx
from mst_fx import pipeline
from mst_fx.core.config import Config
from mst_fx.recognise.pattern import patterns
from mst_fx.runtime import loop_operator

LENGTHS = random.Random(0).sample(range(2, 200), 50)


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def bodies_run(monkeypatch):
    """Grows by one for each mini-sequence that is run."""
    calls = []
    run = loop_operator.run_loop

    def counted(bodies, spec, operands):
        def body(number):
            return lambda args: calls.append(number) or bodies[number](args)

        return run((body(0), body(1)), spec, operands)

    monkeypatch.setattr(loop_operator, "run_loop", counted)
    return calls


def marked(ids, labels):
    for x in (ids, labels):
        torch._dynamo.mark_dynamic(x, 1)
    return ids, labels


def unmarked(ids, labels):
    return ids, labels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "dynamic", "prepared", "more"),
    [(1, True, unmarked, 0), (2, True, unmarked, 0), (2, None, marked, 0), (2, None, unmarked, 1)],
    ids=["dynamic", "dynamic batch", "mark_dynamic", "automatic"],
)
def test_one_compile_serves_fifty_lengths(batch, dynamic, prepared, more):
    """Automatic dynamic shapes compile once more, for the second length."""
    model = MlpLM()
    compiled = looped(model, dynamic=dynamic)
    compiled(*prepared(*tokens(batch, 201, ignored=1)))
    first = len(mst_fx.reports())
    for length in LENGTHS:
        given = prepared(*tokens(batch, length, ignored=1))
        torch.testing.assert_close(compiled(*given), model(*given))
    assert len(mst_fx.reports()) - first == more
    assert len(mst_fx.reports()[-1].regions) == 2


@pytest.mark.slow
def test_gradients_of_many_lengths_through_inductor():
    model = MlpLM()
    compiled = looped(model, inner="inductor", dynamic=True)
    before = 0
    for length in (37, 50, 3, 48, 41):
        batch = tokens(2, length, ignored=1)
        eager, ours = gradients(model, model, batch), gradients(model, compiled, batch)
        for name, value in eager.items():
            assert relative_error(ours[name], value) < 1e-5, name
        before = before or len(mst_fx.reports())
    assert len(mst_fx.reports()) == before


def planned(model, prepared, length=8):
    """Names of the patterns that are looped by default, for lengths that vary, where a short one comes first."""
    compiled = torch.compile(model, backend="mst_fx", options={"inner": "aot_eager", "strict": True})
    compiled(*prepared(*tokens(2, length)))
    return {region.pattern for region in mst_fx.reports()[-1].regions}, compiled


@pytest.mark.parametrize(("model", "patterns"), [(MlpLM, {"head"}), (CheckpointedLM, {"gated_mlp", "head"})])
def test_a_short_batch_in_front_loops_what_costs_it_nothing(model, patterns):
    """An MLP that is not checkpointed would be computed again for every short batch."""
    assert planned(model(), marked)[0] == patterns
    for refused in mst_fx.reports()[-1].refusals:
        assert refused.pattern == "gated_mlp"
        assert refused.text.endswith("(for the length 8; mark_dynamic(..., hint_override=) names another)")


def test_a_long_batch_behind_a_short_one_is_looped(bodies_run):
    model = MlpLM()
    compiled = planned(model, marked)[1]
    for length, chunks in ((9, 1), (20_000, 10)):
        bodies_run.clear()
        batch = tokens(2, length)
        torch.testing.assert_close(compiled(*marked(*batch)), model(*batch))
        assert len(bodies_run) == chunks


@pytest.mark.parametrize(
    ("known", "patterns"), [({"hint_override": 65536}, {"gated_mlp", "head"}), ({"min": 2, "max": 64}, set())]
)
def test_what_the_caller_says_of_the_length(known, patterns):
    """A length to compile for, or the longest that there will be."""

    def told(*batch):
        for x in batch:
            torch._dynamo.mark_dynamic(x, 1, **known)
        return batch

    assert planned(MlpLM(), told)[0] == patterns


def test_a_cut_moves_in_front_of_the_head_whatever_length_comes_first():
    model = MlpLM(tail=lambda logits: logits[:, :-1])
    compiled = torch.compile(
        lambda ids, labels: model(ids, labels[:, 1:]), backend="mst_fx", options={"inner": "aot_eager"}
    )
    compiled(*marked(*tokens(2, 8)))
    assert len(mst_fx.reports()[-1].cuts) == 1


def test_no_guard_on_the_length_is_ours():
    guards = []

    def watched(gm, inputs):
        values = [node.meta.get("example_value") for node in gm.graph.nodes]
        (shape_env,) = {value.node.shape_env for value in values if isinstance(value, torch.SymInt)}
        guards.append(len(shape_env.guards))
        config = Config(min_bytes=0, chunk_tokens=16)
        rewritten, report = pipeline.rewrite(gm, config, patterns())
        assert len(report.regions) == 2
        guards.append(len(shape_env.guards))
        return rewritten

    torch.compile(MlpLM(), backend=watched)(*marked(*tokens(2, 37)))
    assert guards[0] == guards[1]


def test_tokens_that_experts_choose_are_looped_without_a_guard():
    """As many tokens as there are features: what is asked of two sizes that happen to be equal is no guard."""

    def program(x, router, up, down):
        tokens = x.flatten(0, -2)
        weights, chosen = (tokens @ router).softmax(-1).t().topk(tokens.shape[0] // 2, -1)
        made = torch.bmm(tokens[chosen], up).relu() @ down * weights[..., None]
        return torch.zeros_like(tokens).index_add(0, chosen.flatten(), made.flatten(0, 1))

    x = torch.randn(2, 3, 3)
    torch._dynamo.mark_dynamic(x, 1)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 3), (3, 3, 8), (3, 8, 3))]
    looped(program, num_chunks=2)(x, *weights)
    assert [region.pattern for region in mst_fx.reports()[-1].regions] == ["experts"]


def test_an_op_whose_derivative_asks_for_sizes():
    compiled = looped(lambda x, up, down: ((x @ up).sgn() * (x @ up).abs().sqrt()) @ down)
    for length in (20, 37):
        compiled(torch.randn(2, length, 8), torch.randn(8, 40), torch.randn(40, 8, requires_grad=True)).sum().backward()
    assert [len(report.regions) for report in mst_fx.reports()[-2:]] == [1, 1]


def test_a_head_whose_cut_leaves_nothing():
    def program(x, head, labels, start):
        return torch.nn.functional.cross_entropy((x @ head)[:, start:].flatten(0, 1), labels[:, start:].flatten())

    compiled = looped(program, dynamic=True, num_chunks=3)
    x, head, labels = torch.randn(3, 2, 4), torch.randn(4, 12), torch.randint(0, 12, (3, 2))
    assert compiled(x, head, labels, 2).isnan()


def test_chunks_are_counted_at_run_time(bodies_run):
    compiled = looped(MlpLM())
    for first in (37, 50):
        compiled(*tokens(1, first))
    for length, chunks in ((2, 1), (15, 1), (16, 1), (17, 2), (32, 2), (100, 7)):
        bodies_run.clear()
        compiled(*tokens(1, length))
        assert len(bodies_run) == 2 * chunks  # the MLP and the head
