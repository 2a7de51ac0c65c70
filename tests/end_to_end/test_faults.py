"""A fault costs the loop that it meets, is told, and never breaks the compile."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from models import MlpLM, tokens
from through_inductor import of_the_backend_alone

import mst_fx
from mst_fx import engine
from mst_fx.core.torch_private.dynamo import PASSING
from mst_fx.passes.gated_mlp import GatedMlp
from mst_fx.pipeline import compiled_and_told
from mst_fx.recognise import early_cut
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence
from mst_fx.survey import survey

LOOP_ALL = {"min_bytes": 0, "chunk_tokens": 8, "inner": "eager"}


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    model, batch, seen = MlpLM().double(), tokens(), []

    def backend(gm, _):
        return lambda *inputs: seen.append((gm, inputs)) or gm(*inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=False)(*batch)
    return *seen[0], model(*batch)


def run(graph, **options):
    """The report about the graph, whose compiled function must be right."""
    gm, inputs, expected = graph
    compiled, report = compiled_and_told(gm, inputs, None, {**LOOP_ALL, **options})
    torch.testing.assert_close(compiled(*inputs)[0], expected)
    return report


def decided(report):
    return [region.pattern for region in report.regions], [(r.pattern, r.reason) for r in report.refusals]


def recomputes(work):
    return work.backward == "recompute"


def failing(function, fails):
    def run(*args, **kwargs):
        if fails(*args):
            raise KeyError("a bug")
        return function(*args, **kwargs)

    return run


FAULTS = {
    "match": (GatedMlp, "match", lambda self, reader, node: "silu" in node.name),
    "analysis": (survey, "analysed", lambda region, *_: region.name == "mlp"),
    "lengths": (survey, "written_after", lambda work, *_: recomputes(work)),
    "assembly": (survey, "assembled", lambda work, *_: recomputes(work)),
    "memory": (survey, "memory_of", lambda work, *_: recomputes(work)),
    "fixing": (engine, "fix_for", lambda region, work: recomputes(work)),
    "splice": (
        engine,
        "loop",
        lambda owner, place, node_of, replacement: replacement.call.spec.backward == "recompute",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_one_region(graph, monkeypatch, caplog, name):
    owner, attribute, fails = FAULTS[name]
    if name == "match":
        fails = lambda self, reader, node: node.op == "call_function"  # noqa: E731
    monkeypatch.setattr(owner, attribute, failing(getattr(owner, attribute), fails))
    with caplog.at_level(logging.WARNING, "mst_fx"):
        regions, refusals = decided(run(graph))
    assert refusals == [("gated_mlp", "INTERNAL")]
    assert regions == ["head"]
    assert [record.getMessage().count("a bug") for record in caplog.records] == [1]
    with pytest.raises(KeyError, match="a bug"):
        run(graph, strict=True)


@pytest.mark.parametrize("backward", ["recompute", "in_forward", None])
def test_what_the_inner_compiler_cannot_do(graph, caplog, backward):
    def inner(gm, inputs):
        for node in gm.graph.nodes:
            if node.target is mini_sequence and backward in (CallSpec(*node.args[4]).backward, None):
                raise RuntimeError("no such loops here\nand a second line")
        return gm

    with caplog.at_level(logging.WARNING, "mst_fx"):
        report = run(graph, inner=inner)
    regions, refusals = decided(report)
    left = {"recompute": ["gated_mlp"], "in_forward": ["head"], None: ["gated_mlp", "head"]}[backward]
    assert sorted([*regions, *left]) == ["gated_mlp", "head"]
    assert refusals == [(pattern, "INTERNAL") for pattern in left]
    assert all("no such loops here" in refusal.text for refusal in report.refusals)
    assert len(caplog.records) == 1
    assert "second line" not in caplog.text
    if backward is None:
        assert report.peak == report.peak_whole
    with pytest.raises(RuntimeError, match="no such loops"):
        run(graph, inner=inner, strict=True)


def test_an_inner_compiler_may_change_what_it_is_given(graph):
    """Each attempt gets a graph of its own."""
    spoiled = []

    def inner(gm, inputs):
        spoiled.append(any("spoiled" in node.meta for node in gm.graph.nodes))
        for node in gm.graph.nodes:
            node.meta["spoiled"] = True
        if any(node.target is mini_sequence for node in gm.graph.nodes):
            raise RuntimeError("no loops here")
        return gm

    run(graph, inner=inner)
    assert spoiled == [False] * 4  # both loops, none, each of the two


@of_the_backend_alone
@pytest.mark.parametrize("options", [{}, {"returned_logits": "drop"}])
def test_a_graph_without_any_loop_is_neither_cut_nor_does_it_drop_logits(options):
    def inner(gm, inputs):
        if any(node.target is mini_sequence for node in gm.graph.nodes):
            raise RuntimeError("no loops here")
        return gm

    def program(x, w):
        logits = (x @ w)[:, 1:] if not options else x @ w
        return logits.logsumexp(-1).sum(), *([logits] if options else [])

    torch._dynamo.reset()
    x, w = torch.randn(2, 40, 8, requires_grad=True), torch.randn(8, 64)
    compiled = torch.compile(program, backend="mst_fx", options={**LOOP_ALL, "inner": inner, **options}, dynamic=False)
    value = compiled(x, w)
    torch.testing.assert_close(value, program(x, w))
    report = mst_fx.reports()[-1]
    assert (report.regions, report.cuts, report.dropped) == ((), (), ())
    assert [refusal.reason for refusal in report.refusals] == ["INTERNAL"]


def test_a_program_that_does_not_compile_at_all_raises_its_own_error(graph):
    def inner(gm, inputs):
        raise RuntimeError("looped" if any(node.target is mini_sequence for node in gm.graph.nodes) else "plain")

    with pytest.raises(RuntimeError, match="plain"):
        run(graph, inner=inner)


@pytest.mark.parametrize("name", ["TensorifyScalarRestartAnalysis", "_StopRecomputationError"])
def test_what_is_nobodys_error_passes(graph, monkeypatch, name):
    (passing,) = [error for error in PASSING if error.__name__ == name]

    def stops(*args, **kwargs):
        raise passing(*([] if "Stop" in name else ["again"]))

    monkeypatch.setattr(survey, "analysed", stops)
    with pytest.raises(passing):
        run(graph)


def test_a_name_that_torch_lacks_is_told(graph, monkeypatch, caplog):
    monkeypatch.delattr(torch._C._autograd, "_saved_tensors_hooks_set_tracing")
    with caplog.at_level(logging.WARNING, "mst_fx"):
        report = run(graph)
    assert decided(report) == ([], [("all", "TORCH")])
    assert "torch._C._autograd._saved_tensors_hooks_set_tracing" in str(report)
    assert len(caplog.records) == 1


def test_a_fault_of_a_cut_costs_the_cut(monkeypatch):
    monkeypatch.setattr(early_cut, "_chain", failing(early_cut._chain, lambda reader, node: "linear" in node.name))
    model, batch = MlpLM(), tokens()
    report = mst_fx.explain(model, *batch, options={**LOOP_ALL})
    assert len(report.regions) == 2
    assert {(refusal.pattern, refusal.reason) for refusal in report.refusals} == {("cut", "INTERNAL")}


WITHOUT = """
import importlib, os, sys
import torch, torch._dynamo, torch._inductor.compile_fx, torch._inductor.lowering
from torch._functorch import pyfunctorch
from torch.fx.experimental import proxy_tensor

def check(full_name):
    module, name = full_name.rsplit(".", 1)
    delattr(importlib.import_module(module), name)
    import mst_fx

    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    assert mst_fx.backend(gm, [torch.ones(2)], options={"inner": "eager"})(torch.ones(2)) is not None
    (refusal,) = mst_fx.reports()[-1].refusals
    assert refusal.reason == "TORCH" and name in refusal.text, refusal

for full_name in sys.argv[1:]:
    child = os.fork()  # so that torch is loaded once
    if child == 0:
        check(full_name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, full_name
"""


def test_a_missing_name_breaks_neither_the_import_nor_a_compile():
    names = ["torch._dispatch.python.enable_python_dispatcher", "torch._C._len_torch_function_stack"]
    run = subprocess.run([sys.executable, "-c", WITHOUT, *names], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("mst_fx: ") == len(names)
