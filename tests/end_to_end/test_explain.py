"""`explain`: what it tells, of which compile."""

from __future__ import annotations

import threading

import pytest
import torch
from models import MlpLM, tokens

import mst_fx

LOOP_ALL = {"min_bytes": 0, "chunk_tokens": 8, "inner": "eager"}


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


def test_explain():
    report = mst_fx.explain(MlpLM(), *tokens(2), options={"min_bytes": 0, "chunk_tokens": 32})
    mlp, head = report.regions
    assert (mlp.pattern, mlp.module, mlp.backward) == ("gated_mlp", "mlp", "recompute")
    assert (head.pattern, head.backward, head.axis) == ("head", "in_forward", "dim 1 (37 positions)")
    assert mlp.chunks == head.chunks == 3
    assert "models.py" in mlp.source
    assert "self.down(F.silu(self.gate(x)) * self.up(x))" in mlp.source
    assert "2 looped, 0 left alone" in str(report)


def test_explain_of_a_small_model_says_why_not():
    report = mst_fx.explain(MlpLM(), *tokens())
    assert [refusal.reason for refusal in report.refusals] == ["SMALL", "SMALL"]
    assert "min_bytes is 64.0 MiB" in str(report)


def test_explain_raises_errors_of_options_as_they_are():
    for options, error in (({"chunks": 4}, ValueError), ({"chunk_tokens": "many"}, TypeError)):
        with pytest.raises(error, match=r"mst_fx: (unknown )?option 'chunk"):
            mst_fx.explain(MlpLM(), *tokens(), options=options)


def test_explain_counts_graphs():
    def broken_in_two(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert mst_fx.explain(broken_in_two, torch.ones(2)).graphs == 2


def test_explain_of_what_is_compiled_already():
    model, batch = MlpLM(), tokens()
    expected = str(mst_fx.explain(model, *batch, options=LOOP_ALL))
    for compiled in (torch.compile(model, backend="eager"), torch.compile(model.forward, backend="eager")):
        told = str(mst_fx.explain(compiled, *batch, options=LOOP_ALL))
        assert told.startswith(expected)
        assert "compiled already" in told
    model.compile(backend="eager")
    report = mst_fx.explain(model, *batch, options=LOOP_ALL)
    assert len(report.regions) == 2
    assert "compiled already" in str(report)


def test_explain_of_what_nobody_captures():
    with torch.compiler.set_stance("force_eager"):
        assert "no graph was captured" in str(mst_fx.explain(MlpLM(), *tokens()))


def test_explain_tells_of_its_own_compile_alone():
    made = {}

    def explained(length):
        made[length] = mst_fx.explain(MlpLM(), *tokens(1, 36), options={"min_bytes": 0, "chunk_tokens": length})

    threads = [threading.Thread(target=explained, args=(length,)) for length in (9, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for length, report in made.items():
        assert [region.chunks for region in report.regions] == 2 * [36 // length]
