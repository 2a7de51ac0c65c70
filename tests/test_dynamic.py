"""Lengths that vary: one compile, no guard of ours, as many chunks as there are."""

from __future__ import annotations

import random

import pytest
import torch
from models import MlpLM, tokens
from numerics import gradients, looped, relative_error

import mst_fx
from mst_fx import loop, pipeline
from mst_fx.config import Config
from mst_fx.pattern import patterns

LENGTHS = random.Random(0).sample(range(2, 200), 50)


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


def marked(ids, labels):
    for x in (ids, labels):
        torch._dynamo.mark_dynamic(x, 1)
    return ids, labels


def unmarked(ids, labels):
    return ids, labels


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


@pytest.mark.parametrize(("length", "chunks"), [(2, 1), (15, 1), (16, 1), (17, 2), (32, 2), (100, 7)])
def test_chunks_are_counted_at_run_time(monkeypatch, length, chunks):
    calls = []
    run = loop.run_loop

    def counted(bodies, spec, operands):
        def body(number):
            return lambda args: calls.append(args) or bodies[number](args)

        return run((body(0), body(1)), spec, operands)

    model = MlpLM()
    compiled = looped(model)
    for first in (37, 50):
        compiled(*tokens(1, first))
    monkeypatch.setattr(loop, "run_loop", counted)
    compiled(*tokens(1, length))
    assert len(calls) == 2 * chunks  # the MLP and the head
